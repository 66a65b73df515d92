"""`save`: a model that is on devices as a checkpoint directory."""

from __future__ import annotations

import dataclasses
import os

import jax
import numpy as np

from mllama_jax.api import Mllama
from mllama_jax.convert.apply import paths
from mllama_jax.convert.edits import cast
from mllama_jax.convert.model import read_model
from mllama_jax.convert.progress import check_new
from mllama_jax.convert.run import write
from mllama_jax.convert.sources import open_checkpoint
from mllama_jax.convert.store import Store
from mllama_jax.convert.table import table
from mllama_jax.errors import InputError
from mllama_jax.gathering import gathered
from mllama_jax.model.quantize import quantization
from mllama_jax.processes import agree


def save(model: Mllama, path: str | os.PathLike[str]) -> None:
    """Write a model in our layout, which `load` reads onto any mesh and `mllama convert` turns into the others.

    Its parameters as they are, quantised or not, with the configuration, tokenizer and template of the directory that
    it was loaded from. All of several processes call it, and each sees one whole parameter at a time; the first writes.

    Args:
        path: a new or empty directory, or a place in a bucket (`gs://bucket/path`).

    Raises:
        InputError: the directory is not empty, which all processes are told, or cannot be written.
    """
    leaves = paths(model.params)
    quantized = quantization({path: leaf.dtype for path, leaf in leaves.items()})
    source, problem = None, ""
    if jax.process_index() == 0:
        try:
            source = cast(read_model(open_checkpoint(model.directory)), leaves["text", "embedding"].dtype)
            check_new(Store(path))
        except InputError as error:
            if jax.process_count() == 1:
                raise
            problem = str(error)
    agree({"save to": os.fspath(path), "saving": problem})
    with gathered(leaves, {target: np.dtype(leaf.dtype) for target, leaf in leaves.items()}) as parameters:
        if source is not None and parameters is not None:
            held = {row.target: parameters[row.target] for row in table(model.config, quantized)}
            write(dataclasses.replace(source, parameters=held), path, "orbax", "saving")
