"""What was trained as a checkpoint in Hugging Face's layout, or, of LoRA, as an adapter in PEFT's."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from mllama_jax.config import MllamaConfig
from mllama_jax.convert.apply import paths
from mllama_jax.convert.lora import write_lora
from mllama_jax.convert.model import read_model
from mllama_jax.convert.run import write
from mllama_jax.convert.sources import open_checkpoint
from mllama_jax.gathering import gathered
from mllama_jax.model.mllama import Params
from mllama_jax.train.recipe import Recipe


def write_trained(out: Path, recipe: Recipe, config: MllamaConfig, params: Params) -> Path:
    """Write the trained part under `out`, in place of what an earlier run of it left; returns where.

    LoRA becomes `out/adapter`, which PEFT loads and `mllama convert --lora` merges; other parts `out/model`, the whole
    checkpoint with the trained parameters in it, in each tensor's own dtype. All of several processes call it; the
    first writes, and what it writes comes from the devices as its turn comes.
    """
    place = out / ("adapter" if recipe.part == "lora" else "model")
    unfinished = place.with_suffix(".unfinished")
    model, leaves = read_model(open_checkpoint(recipe.model)), paths(params)
    dtypes = {path: model.parameters.get(path, leaf).dtype for path, leaf in leaves.items()}
    with gathered(leaves, dtypes) as trained:
        if trained is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
            if recipe.part == "lora":
                write_lora(unfinished, trained, config, recipe.lora.rank, recipe.lora.alpha, recipe.model)
            else:
                tuned = dataclasses.replace(model, parameters={**model.parameters, **trained})
                write(tuned, unfinished, "hf", "writing")
            shutil.rmtree(place, ignore_errors=True)
            unfinished.rename(place)
    return place
