"""`convert`: any layout into any other, tensor by tensor, so that it can be stopped and go on."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mllama_jax.config import QUANTIZATIONS, TextConfig
from mllama_jax.convert import edits
from mllama_jax.convert.apply import renamed, tensors
from mllama_jax.convert.export import hf_files, meta_params
from mllama_jax.convert.files import LazyArray, nbytes
from mllama_jax.convert.hub import local
from mllama_jax.convert.manifest import DTYPES, EXTRA, digest_of
from mllama_jax.convert.model import Model, read_model
from mllama_jax.convert.orbax import write_arrays, write_index
from mllama_jax.convert.progress import Progress
from mllama_jax.convert.pth import write_pth
from mllama_jax.convert.safetensors import write_safetensors
from mllama_jax.convert.sources import open_checkpoint
from mllama_jax.convert.store import BucketPath, Store, absolute, is_bucket
from mllama_jax.convert.table import Layout, table
from mllama_jax.errors import InputError

_HF_FILE = 5 * 10**9  # bytes of a safetensors file, as transformers splits them
_SPARE = 2**20  # for the files beside the weights


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: Layout,
    dtype: str | None = None,
    shards: int = 1,
    revision: str | None = None,
    text_only: bool = False,
    text_from: str | os.PathLike[str] | None = None,
    lora: str | os.PathLike[str] | None = None,
    quantize: str | None = None,
) -> dict[str, Any]:
    """Write the checkpoint `source` in another layout into the new or empty directory `target`.

    A run that was stopped is finished by the same call; what it wrote is kept, and the result is the same to the byte.

    Args:
        source: a directory of any layout, one of ours or Hugging Face's in a bucket (`gs://`), or a name on
            huggingface.co.
        target: a directory, or, for our layout, a place in a bucket.
        to: "orbax" (ours), "hf" or "meta".
        dtype: of all tensors, "bfloat16", "float32" or "float16", rounded to nearest even; None keeps each tensor's.
        shards: number of Meta's model-parallel files: 1, 2, 4 or 8.
        revision: of a source that is a name on huggingface.co; the newest by default.
        text_only: leave out vision and cross-attention; what is left is a plain Llama 3.1 model.
        text_from: directory of a text-only checkpoint whose decoder takes the place of the source's.
        lora: directory of a LoRA adapter in PEFT's layout, which is added to the weights.
        quantize: what the decoder's kernels become, as in `load`; in our layout only.

    Returns:
        What was done: layouts, numbers of tensors and bytes, how many tensors an earlier run had finished, seconds;
        `notes`: what the target's layout does not hold, a line each.

    Raises:
        InputError: the source, the target or an argument cannot be used; the disk is full.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if shards not in (1, 2, 4, 8) or (shards > 1 and to != "meta"):
        raise InputError(f"shards must be 1, 2, 4 or 8, and 1 but for Meta's layout, got {shards} for {to!r}")
    if is_bucket(target) and to != "orbax":
        raise InputError(f"{target}: Hugging Face's and Meta's files are written to disks only; choose orbax")
    if quantize not in (None, *QUANTIZATIONS) or (quantize and to != "orbax"):
        known = ", ".join(QUANTIZATIONS)
        raise InputError(f"quantize must be {known}, and for our layout (orbax), got {quantize!r} for {to!r}")
    start = time.monotonic()
    source = local(source, revision)
    checkpoint = open_checkpoint(source)
    if checkpoint.quantized:
        raise InputError(f"{source}: holds {checkpoint.quantized} weights already; convert what it was made from")
    model = read_model(checkpoint)
    if text_from is not None:
        model = edits.with_text(model, read_model(open_checkpoint(text_from)), text_from)
    if lora is not None:
        model = edits.merge_lora(model, lora)
    if text_only:
        model = edits.text_only(model)
    if dtype is None:
        _check_dtypes(model)
    else:
        model = edits.cast(model, DTYPES[dtype])
    if quantize is not None:
        model = edits.quantized(model, quantize)
    plan = _PLANS[to](model, shards)
    job = {"from": str(absolute(source)), "to": to, "dtype": dtype, "shards": shards, "text_only": text_only}
    job |= {key: str(absolute(value)) for key, value in (("text_from", text_from), ("lora", lora)) if value}
    job |= {"quantize": quantize} if quantize else {}
    job["fingerprint"] = _fingerprint([absolute(each) for each in (source, text_from, lora) if each is not None])
    notes, context = [], model.config.text.context
    if to == "meta" and context != TextConfig.context:
        notes = [f"params.json has no field for the context, {context}; it will be read as {TextConfig.context}"]
    store = Store(target)
    done = _written(plan, store, job, f"{checkpoint.layout} -> {to}", "run the same command again")
    return {
        "source": str(source),
        "target": str(target),
        "from": checkpoint.layout,
        "to": to,
        "tensors": len(plan.sizes),
        "bytes": sum(plan.sizes.values()),
        "resumed": done.resumed,
        "seconds": round(time.monotonic() - start, 3),
        "notes": notes,
    }


def write(model: Model, target: str | os.PathLike[str], to: Layout, title: str) -> None:
    """Write `model` into the new or empty directory `target`, in one go: what is left of a stopped run is refused."""
    job = {title: os.fspath(target), "begun": time.time()}
    _written(_PLANS[to](model, 1), Store(target), job, title, "delete it and try again")


def _written(plan: Plan, store: Store, job: Mapping[str, Any], title: str, again: str) -> Progress:
    """The progress of a job that is done; `again` is how to go on where there was no room."""
    with _full_disk(store, again), _progress(store, job, plan.sizes, title, again) as done:
        plan.write(store, done)
        done.finish()
    return done


def _check_dtypes(model: Model) -> None:
    """Without a dtype to convert to, the parts of each parameter must have one, and one that every layout has."""
    for row in table(model.config):
        parameter = model.parameters[row.target]
        if parameter.dtype.name not in DTYPES or parameter.mixed:
            raise InputError(
                f"{' and '.join(row.hf.names)}: expected one dtype, of {', '.join(DTYPES)}, got "
                f"{'several' if parameter.mixed else parameter.dtype}; name the --dtype to convert to"
            )


def _fingerprint(directories: list[Path | BucketPath]) -> str:
    """Changes when a source does: names, sizes and times of its files, or in a bucket their generations."""
    marks: list[Any] = []
    for directory in directories:
        if isinstance(directory, BucketPath):
            store = Store(directory)
            marks += [(key, store.generation(key).hex()) for key in store.names() if "/" not in key]
        else:
            stats = [(path.name, path.stat()) for path in sorted(directory.iterdir())]
            marks += [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return digest_of(json.dumps(marks).encode())


def _progress(store: Store, job: Mapping[str, Any], sizes: Mapping[str, int], title: str, again: str) -> Progress:
    """The conversion's progress, once there is room for what is left of it."""
    progress = Progress(store, job, sizes, title)
    left = sum(size for key, size in sizes.items() if progress.get(key) is None) + _SPARE
    if not store.remote and (free := shutil.disk_usage(store.location).free) < left:
        if not progress.resumed:
            progress.finish()  # nothing is there to go on with
        raise InputError(
            f"{store.location}: {left / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free; "
            f"make room, then {again}"
        )
    return progress


@contextlib.contextmanager
def _full_disk(store: Store, again: str) -> Iterator[None]:
    """A disk's refusal in one line."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        kept = f"; what is written stays: make room and {again}"
        raise InputError(
            f"{error.filename or store.location}: cannot be written: {error.strerror}"
            f"{kept if error.errno in (errno.ENOSPC, errno.EDQUOT) else ''}"
        ) from None


# ---- Targets ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """`sizes` has the bytes of each tensor by its key; `write` writes those that are not done, and all other files."""

    sizes: Mapping[str, int]
    write: Callable[[Store, Progress], None]


def _to_orbax(model: Model, _: int) -> Plan:
    sizes = {".".join(path): parameter.nbytes for path, parameter in model.parameters.items()}
    files = {
        **_hf_side_files(model),
        **({"params.json": _json(model.json["params.json"])} if model.json["params.json"] else {}),
    }

    def write(store: Store, done: Progress) -> None:
        write_arrays(store, model.parameters, model.config, model.extras, done)
        write_index(store, model.parameters, files, model.hf_names, done)

    return Plan(sizes | {EXTRA + name: value.nbytes for name, value in model.extras.items()}, write)


def _to_hf(model: Model, _: int) -> Plan:
    made = tensors(model.parameters, model.config, "hf")
    if model.hf_names == "4.52" and model.config.vision is not None:
        made = {renamed(name): tensor for name, tensor in made.items()}
    files = _split(made)
    index = {
        "metadata": {"total_size": sum(map(nbytes, made.values()))},
        "weight_map": {name: file for file, held in files.items() for name in held},
    }

    def write(store: Store, done: Progress) -> None:
        for file, held in files.items():
            if path := _unwritten(store, file):
                write_safetensors(path, held, {"format": "pt"}, done.within(file))
        if len(files) > 1:
            store.write("model.safetensors.index.json", _json(index))
        for name, content in _hf_side_files(model).items():
            store.write(name, content)

    return Plan({f"{file}/{name}": nbytes(t) for file, held in files.items() for name, t in held.items()}, write)


def _split(made: dict[str, LazyArray]) -> dict[str, dict[str, LazyArray]]:
    """Tensors by file, none above `_HF_FILE`."""
    files: list[dict[str, LazyArray]] = [{}]
    for name, tensor in made.items():
        if files[-1] and sum(map(nbytes, files[-1].values())) + nbytes(tensor) > _HF_FILE:
            files.append({})
        files[-1][name] = tensor
    if len(files) == 1:
        return {"model.safetensors": made}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": held for i, held in enumerate(files, start=1)}


def _to_meta(model: Model, shards: int) -> Plan:
    params = model.json["params.json"] or meta_params(model.config)
    parts = {
        f"consolidated.{shard:02d}.pth": tensors(model.parameters, model.config, "meta", model.extras, shard, shards)
        for shard in range(shards)
    }

    def write(store: Store, done: Progress) -> None:
        for file, held in parts.items():
            if path := _unwritten(store, file):
                write_pth(path, held, done.within(file))
        for name, content in {**model.carried, "params.json": _json(params)}.items():
            store.write(name, content)

    return Plan({f"{file}/{name}": nbytes(t) for file, held in parts.items() for name, t in held.items()}, write)


def _unwritten(store: Store, file: str) -> Path | None:
    """Where to write a file of tensors; None if it is there: it has its name only once it is whole."""
    path = Path(store.location) / file
    return None if path.exists() else path


def _hf_side_files(model: Model) -> dict[str, bytes]:
    """What stands beside the weights in Hugging Face's layout; config.json, without which it is none, last."""
    name = model.parameters[("text", "embedding")].dtype.name
    made = hf_files(model.config, name)
    if kept := model.json["config.json"]:
        made["config.json"] = kept | {key: name for key in ("torch_dtype", "dtype") if key in kept}
    files = {file: _json(content) for file, content in made.items()}
    files |= model.carried
    return files | {"config.json": files.pop("config.json")}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


_PLANS: dict[Layout, Callable[[Model, int], Plan]] = {
    "orbax": _to_orbax,
    "hf": _to_hf,
    "meta": _to_meta,
}
