"""What was trained as a checkpoint in Hugging Face's layout, or, of LoRA, as an adapter in PEFT's."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path

from mllama_jax.config import MllamaConfig
from mllama_jax.convert.apply import Parameters, paths
from mllama_jax.convert.lora import write_lora
from mllama_jax.convert.model import Model, read_model
from mllama_jax.convert.run import write
from mllama_jax.convert.sources import open_checkpoint
from mllama_jax.convert.store import Store, is_bucket
from mllama_jax.gathering import gathered
from mllama_jax.model.mllama import Params
from mllama_jax.train.recipe import Recipe


def write_trained(out: str, recipe: Recipe, config: MllamaConfig, params: Params) -> str:
    """Write the trained part under `out`, in place of what an earlier run of it left; returns where.

    LoRA becomes `out/adapter`, which PEFT loads and `mllama convert --lora` merges; other parts `out/model`, the whole
    checkpoint with the trained parameters in it, in each tensor's own dtype: in Hugging Face's layout, in a bucket in
    ours. All of several processes call it; the first writes, and what it writes comes from the devices as its turn
    comes.
    """
    place = f"{out}/{'adapter' if recipe.part == 'lora' else 'model'}"
    model, leaves = read_model(open_checkpoint(recipe.model)), paths(params)
    dtypes = {path: model.parameters.get(path, leaf).dtype for path, leaf in leaves.items()}
    with gathered(leaves, dtypes) as trained:
        if trained is not None and recipe.part == "lora":
            _write_adapter(Store(place), recipe, config, trained)
        elif trained is not None:
            _write_model(place, dataclasses.replace(model, parameters={**model.parameters, **trained}))
    return place


def _write_adapter(store: Store, recipe: Recipe, config: MllamaConfig, trained: Parameters) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "adapter")
        write_lora(made, trained, config, recipe.lora.rank, recipe.lora.alpha, recipe.model)
        for file in made.iterdir():
            store.write(file.name, file.read_bytes())


def _write_model(place: str, model: Model) -> None:
    if is_bucket(place):
        store = Store(place)
        for key in store.names():
            store.delete(key)
        write(model, place, "orbax", "writing")
        return
    unfinished = Path(f"{place}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write(model, unfinished, "hf", "writing")
    shutil.rmtree(place, ignore_errors=True)
    unfinished.rename(place)
