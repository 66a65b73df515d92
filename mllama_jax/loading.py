"""`load`: from a checkpoint directory to a model on its devices."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mllama_jax.api import Mllama
from mllama_jax.config import MllamaConfig
from mllama_jax.convert.apply import load_parameters, paths, read_config
from mllama_jax.convert.sources import open_checkpoint
from mllama_jax.errors import InputError
from mllama_jax.model.mllama import MllamaModel
from mllama_jax.processing.chat import load_template
from mllama_jax.processing.tokenizer import Tokenizer
from mllama_jax.sharding.resolve import resolve
from mllama_jax.sharding.rules import MeshAxes, Rules, preset_rules

DTYPES = ("bfloat16", "float32", "float16")


def load(
    path: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    rules: str | Mapping[str, MeshAxes] = "serve",
) -> Mllama:
    """Load a checkpoint directory straight onto devices, one tensor at a time.

    Args:
        path: a Hugging Face directory (key names from before or after transformers 4.52) or a Meta release directory.
        dtype: of the parameters and the computation; "float32" also means float32 products.
        mesh: to spread the parameters over, with the axes that the rules name (see `mllama_jax.sharding`); the default
            device otherwise.
        rules: what lies where on the mesh: a preset's name, or a dictionary from logical to mesh axes.

    Raises:
        InputError: the directory, its config or its tensors cannot be used.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    directory = Path(path)
    checkpoint = open_checkpoint(directory)
    config = read_config(checkpoint)
    tokenizer, template = _tokenizer(directory, config), load_template(directory)
    model, put = MllamaModel(config, jnp.dtype(dtype)), _cast(jnp.dtype(dtype))
    if mesh is not None:
        placed = preset_rules(rules, config, mesh) if isinstance(rules, str) else Rules.of(mesh, rules)
        model = MllamaModel(config, jnp.dtype(dtype), placed)
        put = _place(paths(resolve(config, placed, jnp.dtype(dtype))))
    params = load_parameters(checkpoint, config, put)
    return Mllama(model, params, tokenizer, template, directory)


Put = Callable[[tuple[str, ...], np.ndarray], jax.Array]


def _cast(dtype: np.dtype) -> Put:
    """Put parameters in this dtype on the default device."""
    return lambda path, value: jax.device_put(value.astype(dtype, copy=False))


def _place(wanted: Mapping[tuple[str, ...], jax.ShapeDtypeStruct]) -> Put:
    """Put each parameter where it shall lie, in the dtype that it shall have."""

    def put(path: tuple[str, ...], value: np.ndarray) -> jax.Array:
        return jax.device_put(value.astype(wanted[path].dtype, copy=False), wanted[path].sharding)

    return put


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
