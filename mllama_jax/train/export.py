"""What was trained as a checkpoint in Hugging Face's layout, or, of LoRA, as an adapter in PEFT's."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from mllama_jax.config import MllamaConfig
from mllama_jax.convert.apply import Parameter, paths
from mllama_jax.convert.lora import write_lora
from mllama_jax.convert.model import read_model
from mllama_jax.convert.run import write
from mllama_jax.convert.sources import open_checkpoint
from mllama_jax.generate.decode import on_host
from mllama_jax.model.mllama import Params
from mllama_jax.train.recipe import Recipe


def write_trained(out: Path, recipe: Recipe, config: MllamaConfig, params: Params) -> Path:
    """Write the trained part under `out`, in place of what an earlier run of it left; returns where.

    LoRA becomes `out/adapter`, which PEFT loads and `mllama convert --lora` merges; other parts `out/model`, the whole
    checkpoint with the trained parameters in it, in each tensor's own dtype.
    """
    params = on_host(params)
    place = out / ("adapter" if recipe.part == "lora" else "model")
    if jax.process_index() == 0:
        _write(place, recipe, config, params)
    if jax.process_count() > 1:  # JAX gives those that are done before others seconds only
        multihost_utils.sync_global_devices("trained parameters are written")
    return place


def _write(place: Path, recipe: Recipe, config: MllamaConfig, params: Params) -> None:
    unfinished = place.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    if recipe.part == "lora":
        write_lora(unfinished, params, config, recipe.lora.rank, recipe.lora.alpha, recipe.model)
    else:
        model = read_model(open_checkpoint(recipe.model))
        trained = {
            path: Parameter.of(value.astype(model.parameters[path].dtype)) for path, value in paths(params).items()
        }
        write(dataclasses.replace(model, parameters={**model.parameters, **trained}), unfinished, "hf", "writing")
    shutil.rmtree(place, ignore_errors=True)
    unfinished.rename(place)
