"""`load`: from a checkpoint directory to a model on its devices."""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mllama_jax.api import Mllama
from mllama_jax.config import CACHES, DTYPES, QUANTIZATIONS, MllamaConfig
from mllama_jax.convert.apply import load_parameters, parameters, paths, read_config
from mllama_jax.convert.model import CARRIED
from mllama_jax.convert.sources import Checkpoint, open_checkpoint
from mllama_jax.convert.verify import check
from mllama_jax.errors import InputError
from mllama_jax.model.layers import unconstrained
from mllama_jax.model.mllama import MllamaModel, abstract_parameters
from mllama_jax.model.quantize import QUANTIZERS, is_quantized, lay_out, quantize_parameters
from mllama_jax.processes import agree
from mllama_jax.processing.chat import load_template
from mllama_jax.processing.tokenizer import Tokenizer
from mllama_jax.sharding.mesh import make_mesh, slices_of
from mllama_jax.sharding.resolve import resolve
from mllama_jax.sharding.rules import MeshAxes, Rules, mesh_axes, preset_rules


def load(
    path: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    rules: str | Mapping[str, MeshAxes] = "serve",
    quantize: str | None = None,
    cache: str | None = None,
    verify: bool = False,
    trained: Callable[[tuple[str, ...]], bool] = lambda path: False,
) -> Mllama:
    """Load a checkpoint directory straight onto devices, one tensor at a time.

    Args:
        path: a Hugging Face directory (key names from before or after transformers 4.52), a Meta release directory, or
            one that `mllama convert` wrote, in a bucket too (`gs://bucket/path`).
        dtype: of the parameters and the computation; "float32" also means float32 products.
        mesh: to spread the parameters over, with the axes that the rules name (see `mllama_jax.sharding`), each process
            reading what its devices hold; the default device otherwise.
        rules: what lies where on the mesh: a preset's name, or a dictionary from logical to mesh axes. Several
            processes (see `mllama_jax.processes`) must all give the same of everything here, which is checked.
        quantize: "int8" keeps the decoder's kernels in int8, one scale an output, and quantises activations token by
            token; half the memory and less to read for each token. "int4" keeps them in int4, one scale for each group
            of 128 inputs, and activations as they are; a little more than a quarter. "int8-layers" and "int4-layers"
            leave the head's kernel as it is. A checkpoint that is stored so stays so.
        cache: "int8" keeps the keys and values of text and pictures in int8, one scale for each position and key/value
            head: room for nearly twice the rows or positions, and less to read for each token of long ones.
        verify: first compare every byte with the manifest, which directories of `mllama convert --to orbax` have.
        trained: which parameters, by their paths, are float32 whatever `dtype` the model computes in.

    Raises:
        InputError: the directory, its config or its tensors cannot be used.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    for name, value, known in (("quantize", quantize, QUANTIZATIONS), ("cache", cache, CACHES)):
        if value not in (None, *known):
            raise InputError(f"{name} must be {', '.join(known)} or None, got {value!r}")
    checkpoint = open_checkpoint(path)
    if quantize and checkpoint.quantized not in (None, quantize):
        raise InputError(
            f"{path}: holds {checkpoint.quantized} weights, which cannot become {quantize}; load what it was made from"
        )
    if verify and checkpoint.layout != "orbax":
        raise InputError(f"{path}: has no manifest to verify; `mllama convert` writes a checkpoint that has one")
    if verify:
        check(path)
    config = read_config(checkpoint)
    settings = {"dtype": dtype, "quantize": quantize, "cache": cache, "rules": rules}
    agree(_facts(config, settings | {"mesh": mesh and dict(mesh.shape)}))
    with _small_files(checkpoint) as directory:
        tokenizer, template = _tokenizer(directory, config), load_template(directory)
    constrain = unconstrained
    if mesh is not None:
        constrain = preset_rules(rules, config, mesh) if isinstance(rules, str) else Rules.of(mesh, rules)
    model = MllamaModel(config, jnp.dtype(dtype), constrain, cache=cache)
    stored = parameters(checkpoint, config)
    whole = _wanted(model, checkpoint.quantized, trained)
    if quantize is None or checkpoint.quantized:
        params = load_parameters(stored, _placer(whole))
    else:
        put = _quantizer(quantize, whole, _wanted(model, quantize, trained))
        params = quantize_parameters(load_parameters(stored, put), quantize, tuple)
    params = lay_out(params, constrain.platform)
    return Mllama(model, params, tokenizer, template, checkpoint.directory)


def preset_mesh(path: str | os.PathLike[str], preset: str = "serve", group: int | None = None) -> Mesh:
    """The mesh on which a preset spreads a checkpoint's model over all devices.

    `group` devices share a row, as many as the preset says by default. Raises InputError.
    """
    config = read_config(open_checkpoint(path))
    devices = jax.devices()
    return make_mesh(mesh_axes(preset, config, len(devices), group, slices_of(devices)), devices)


def _facts(config: MllamaConfig, settings: Mapping[str, object]) -> dict[str, str]:
    """What processes that load together must have alike, the configuration field by field."""
    facts = {name: str(value) for name, value in settings.items()}
    for part, value in dataclasses.asdict(config).items():
        fields = (
            {f"{part}.{name}": field for name, field in value.items()} if isinstance(value, dict) else {part: value}
        )
        facts |= {f"config {name}": str(field) for name, field in fields.items()}
    return facts


@contextmanager
def _small_files(checkpoint: Checkpoint) -> Iterator[Path]:
    """The directory of a checkpoint's tokenizer and template: a copy where they lie in a bucket."""
    if isinstance(checkpoint.directory, Path):
        yield checkpoint.directory
        return
    with tempfile.TemporaryDirectory() as copy:
        for name in CARRIED:
            if (source := checkpoint.directory / name).exists():
                Path(copy, name).write_bytes(source.read_bytes())
        yield Path(copy)


Leaves = Mapping[tuple[str, ...], jax.ShapeDtypeStruct]
Read = Callable[[tuple[slice, ...]], np.ndarray]
Put = Callable[[tuple[str, ...], tuple[int, ...], Read], Any]


def _wanted(model: MllamaModel, quantize: str | None, trained: Callable[[tuple[str, ...]], bool]) -> Leaves:
    """What every parameter shall be, and on a mesh where."""
    if isinstance(model.constrain, Rules):
        tree = resolve(model.config, model.constrain, model.dtype, quantize)
    else:
        tree = nn.unbox(abstract_parameters(model.config, model.dtype, quantize))
    return {path: leaf.update(dtype=jnp.float32) if trained(path) else leaf for path, leaf in paths(tree).items()}


def _placer(wanted: Leaves) -> Put:
    """A function that puts a parameter where `wanted` says, reading what this process's devices hold of it."""

    def put(path: tuple[str, ...], shape: tuple[int, ...], read: Read) -> jax.Array:
        leaf = wanted[path]

        @functools.lru_cache(maxsize=1)  # replicas come one after another
        def piece(bounds: tuple[tuple[int | None, int | None], ...]) -> np.ndarray:
            return read(tuple(slice(*each) for each in bounds)).astype(leaf.dtype, copy=False)

        if leaf.sharding is None:
            return jax.device_put(piece(((None, None),) * len(shape)))
        return jax.make_array_from_callback(
            shape, leaf.sharding, lambda index: piece(tuple((cut.start, cut.stop) for cut in index or ()))
        )

    return put


def _quantizer(quantize: str, whole: Leaves, wanted: Leaves) -> Put:
    """A function that puts a parameter as `whole` says, and what is to be quantised then as its values and scales."""
    put, quantizer = _placer(whole), QUANTIZERS[quantize]

    def place(path: tuple[str, ...], shape: tuple[int, ...], read: Read) -> Any:
        if not is_quantized(path, quantize):
            return put(path, shape, read)
        places = tuple(wanted[each].sharding for each in (path, (*path[:-1], "scale")))
        return jax.jit(quantizer, out_shardings=None if None in places else places)(put(path, shape, read))

    return place


def _tokenizer(directory: Path, config: MllamaConfig) -> Tokenizer | None:
    """The directory's tokenizer, where there is one, once it is known to be this model's."""
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    tokenizer = Tokenizer.from_directory(directory)
    if tokenizer.vocab_size > config.text.vocab:
        raise InputError(
            f"{directory}: its tokenizer has {tokenizer.vocab_size} ids and its model {config.text.vocab}; "
            "they are of two models"
        )
    if config.vision is not None and tokenizer.image_token != config.image_token:
        raise InputError(
            f"{directory}: its tokenizer gives <|image|> the id {tokenizer.image_token}, its model embeds it at "
            f"{config.image_token}; they are of two models"
        )
    return tokenizer
