"""What may be changed in a model while it is converted: its decoder alone, another decoder, LoRA adapters merged."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mllama_jax.config import MllamaConfig, TextConfig
from mllama_jax.convert.apply import Parameter, canonical
from mllama_jax.convert.axes import Index, forward, source_shapes
from mllama_jax.convert.files import read_json
from mllama_jax.convert.lora import CONFIG, PREFIX, WEIGHTS
from mllama_jax.convert.model import Model
from mllama_jax.convert.safetensors import SafetensorsFile
from mllama_jax.convert.store import BucketPath, absolute
from mllama_jax.convert.table import Row, table
from mllama_jax.errors import InputError
from mllama_jax.model.quantize import QUANTIZERS, Quantizer, is_quantized

# ---- What numbers are stored in -----------------------------------------------------------------------------------

_AT_ONCE = 2**24  # numbers that are quantised at once


def cast(model: Model, dtype: np.dtype) -> Model:
    """Every tensor in `dtype`, rounded to nearest even; but for what follows from the configuration."""
    return dataclasses.replace(
        model,
        parameters={path: parameter.astype(dtype) for path, parameter in model.parameters.items()},
        extras={name: value if value.ndim == 1 else value.astype(dtype) for name, value in model.extras.items()},
    )


def quantized(model: Model, quantize: str) -> Model:
    """The decoder's kernels as `quantize` says, each followed by its scales."""
    found: dict[tuple[str, ...], Parameter] = {}
    quantizer = QUANTIZERS[quantize]
    pair = functools.lru_cache(maxsize=1)(_pair)  # values and scales are asked for one after the other
    for path, parameter in model.parameters.items():
        if not is_quantized(path, quantize):
            found[path] = parameter
            continue
        pieces = jax.eval_shape(quantizer, jax.ShapeDtypeStruct(parameter.shape, parameter.dtype))
        for i, (name, piece) in enumerate(zip(("kernel", "scale"), pieces, strict=True)):
            read = functools.partial(_quantized, pair, quantizer, parameter, i)
            found[(*path[:-1], name)] = Parameter(piece.shape, np.dtype(piece.dtype), read)
    return dataclasses.replace(model, parameters=found)


def _quantized(pair: Callable, quantizer: Quantizer, parameter: Parameter, i: int, index: Index) -> np.ndarray:
    return pair(quantizer, parameter)[i][index]


def _pair(quantizer: Quantizer, parameter: Parameter) -> tuple[np.ndarray, ...]:
    """Values and scales, made some rows at a time: float32 has twice or four times the bytes."""
    rows = parameter.whole().reshape(-1, parameter.shape[-1])
    step = max(1, _AT_ONCE // rows.shape[1])
    with jax.default_device(jax.devices("cpu")[0]):
        made = [jax.device_get(quantizer(rows[start : start + step])) for start in range(0, len(rows), step)]
    whole = map(np.concatenate, zip(*made, strict=True))
    return tuple(each.reshape(*parameter.shape[:-1], *each.shape[1:]) for each in whole)


# ---- The decoder --------------------------------------------------------------------------------------------------

_OF_PICTURES = ("preprocessor_config.json", "processor_config.json")


def text_only(model: Model) -> Model:
    """The decoder of a vision model as a plain Llama 3.1 model: it was frozen while the adapter was trained."""
    if model.config.vision is None:
        raise InputError("--text-only: the source is text-only already; leave the option out")
    config = _text_config(model.config)
    found = {target: model.parameters[source] for target, source in _text_paths(model.config).items()}
    table = found[("text", "embedding")]
    found[("text", "embedding")] = dataclasses.replace(table, shape=(config.text.vocab, config.text.width))
    return Model(
        found,
        config,
        extras={},
        hf_names=model.hf_names,
        json={"config.json": {}, "params.json": {}},
        carried={name: content for name, content in model.carried.items() if name not in _OF_PICTURES},
    )


def with_text(model: Model, text: Model, where: str | os.PathLike[str]) -> Model:
    """A vision model with the decoder of `text`, a text-only model of the same shapes, under its adapter.

    The rows of the embedding that the adapter was trained with, such as the image token's, stay.
    """
    if model.config.vision is None or text.config.vision is not None:
        raise InputError(f"--text-from {os.fspath(where)}: expected a text-only model to put into a vision model")
    expected, got = (dataclasses.replace(c.text, context=0) for c in (_text_config(model.config), text.config))
    for field in dataclasses.fields(TextConfig):
        ours, theirs = getattr(expected, field.name), getattr(got, field.name)
        if ours != theirs:
            raise InputError(
                f"--text-from {os.fspath(where)}: {field.name}: expected {ours} as in the vision model, got {theirs}; "
                "choose a model of the same size and family"
            )
    found = dict(model.parameters)
    for target, source in _text_paths(model.config).items():
        found[source] = text.parameters[target]
    path = ("text", "embedding")
    found[path] = _stacked_rows(text.parameters[path], model.parameters[path])
    return dataclasses.replace(model, parameters=found)


def _text_config(config: MllamaConfig) -> MllamaConfig:
    text = dataclasses.replace(
        config.text, layers=len(config.text.self_layers), cross_layers=(), extra_embeddings=0
    )  # fmt: skip
    return dataclasses.replace(config, text=text, vision=None)


def _text_paths(config: MllamaConfig) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Paths in the decoder alone -> paths in the vision model."""
    layers = {f"layers_{i}": f"layers_{layer}" for i, layer in enumerate(config.text.self_layers)}
    targets = (row.target for row in table(_text_config(config)))
    return {target: tuple(layers.get(key, key) for key in target) for target in targets}


def _stacked_rows(first: Parameter, second: Parameter) -> Parameter:
    """`second` with its rows replaced by those of `first`, as far as there are any."""
    rows = first.shape[0]

    def read(index: Index) -> np.ndarray:
        cut, rest = index[0], index[1:]
        parts = []
        if cut.start < rows:
            parts.append(first.read((slice(cut.start, min(cut.stop, rows)), *rest)))
        if cut.stop > rows:
            parts.append(second.read((slice(max(cut.start, rows), cut.stop), *rest)))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    mixed = first.mixed or second.mixed or first.dtype != second.dtype
    return Parameter(second.shape, np.promote_types(first.dtype, second.dtype), read, mixed)


# ---- LoRA ---------------------------------------------------------------------------------------------------------

# Settings of PEFT under which a merge would be another sum than W + scale * B A.
_UNSUPPORTED = {"use_dora": False, "fan_in_fan_out": False, "bias": "none", "modules_to_save": None}
_ADAPTER = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclasses.dataclass(frozen=True)
class Delta:
    """`scale * b @ a`, a change of one tensor of Hugging Face's layout: a [rank, in], b [out, rank]."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    def value(self) -> np.ndarray:
        return self.scale * (self.b.astype(np.float32) @ self.a.astype(np.float32))


def merge_lora(model: Model, directory: str | os.PathLike[str]) -> Model:
    """A model with a LoRA adapter, in PEFT's safetensors layout, added to its weights; the sum is rounded once."""
    deltas = _read_lora(absolute(directory))
    found, merged = dict(model.parameters), set()
    for row in table(model.config):
        mine = {i: deltas[name] for i, name in enumerate(row.hf.names) if name in deltas}
        for i, delta in mine.items():
            merged.add(row.hf.names[i])
            shape, got = source_shapes(row, row.hf, found[row.target].shape)[i], (len(delta.b), delta.a.shape[1])
            if shape != got:
                raise InputError(f"{directory}: {row.hf.names[i]}: expected a change of {list(shape)}, got {list(got)}")
        if mine:
            found[row.target] = _with_deltas(row, found[row.target], mine)
    if unknown := sorted(deltas.keys() - merged):
        raise InputError(f"{directory}: adapts {unknown[0]}, which this model has not; is it another model's adapter?")
    return dataclasses.replace(model, parameters=found)


def _with_deltas(row: Row, parameter: Parameter, deltas: Mapping[int, Delta]) -> Parameter:
    def read(index: Index) -> np.ndarray:
        value = np.array(parameter.read(index), np.float32)
        stack = row.hf.stack
        for i, delta in deltas.items():
            if stack is None:
                value += forward(row, row.hf.patterns[i], [delta.value()], None, index)
            elif index[stack].start <= i < index[stack].stop:
                rest = tuple(cut for axis, cut in enumerate(index) if axis != stack)
                place = (slice(None),) * stack + (i - index[stack].start,)
                value[place] += forward(row, row.hf.patterns[i], [delta.value()], None, rest)
        return value.astype(parameter.dtype)

    return dataclasses.replace(parameter, read=read)


def _read_lora(directory: Path | BucketPath) -> dict[str, Delta]:
    """Each adapted tensor's change by its name in the table."""
    path = directory / CONFIG
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type: expected 'LORA', got {settings.get('peft_type')!r}")
    for key, allowed in _UNSUPPORTED.items():
        if settings.get(key, allowed) not in (allowed, [] if allowed is None else allowed):
            raise InputError(f"{path}: {key}={settings[key]!r} cannot be merged; expected {allowed!r}")
    file = SafetensorsFile(directory / WEIGHTS)
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name in file.tensors:
        match = _ADAPTER.fullmatch(name)
        if match is None or len(file.tensors[name].shape) != 2:
            raise InputError(f"{file.path}: tensor {name!r} cannot be merged; expected matrices lora_A and lora_B only")
        halves.setdefault(match[1], {})[match[2]] = file.read(name)
    deltas = {}
    for module, half in halves.items():
        if half.keys() != {"A", "B"} or len(half["A"]) != half["B"].shape[1]:
            raise InputError(f"{file.path}: {module}: expected lora_A [rank, in] and lora_B [out, rank]")
        scale = _scale(path, settings, module, len(half["A"]))
        deltas[canonical(f"{module}.weight")] = Delta(half["A"], half["B"], scale)
    return deltas


def _scale(path: Path | BucketPath, settings: Mapping[str, Any], module: str, rank: int) -> float:
    """PEFT's scaling; the patterns name modules by the end of their names."""
    alpha = settings.get("lora_alpha")
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise InputError(f"{path}: lora_alpha: expected a number, got {alpha!r}")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
