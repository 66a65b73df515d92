"""Run by long/test_train_sharded on fake CPU devices: the loss of 20 steps on meshes against the same on one device."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mllama_jax.errors import InputError
from mllama_jax.train.parts import Part
from mllama_jax.train.recipe import Recipe, read_recipe
from mllama_jax.train.trainer import Trainer

STEPS = 20
PRESETS: dict[Part, tuple[str, ...]] = {"adapter": ("fsdp", "fsdp+tensor"), "lora": ("serve",)}


def curve(recipe: Recipe) -> tuple[list[float], Any]:
    """The loss of each step, and the state behind the last."""
    trainer = Trainer.of(recipe)
    reader = trainer.batches.read()
    return [float(trainer.update(trainer.place(next(reader))).loss) for _ in range(STEPS)], trainer.state


def refusal(recipe: Recipe) -> str:
    """What is said of rows that the four devices cannot share out."""
    try:
        Trainer.of(dataclasses.replace(recipe, samples=6, preset="fsdp"))
    except InputError as error:
        return str(error)
    return ""


def main(file: str) -> None:
    for part, presets in PRESETS.items():
        recipe = dataclasses.replace(read_recipe(Path(file)), part=part)
        wanted, _ = curve(recipe)
        for preset in presets:
            found, state = curve(dataclasses.replace(recipe, preset=preset))
            error = float(np.abs(np.array(found) / np.array(wanted) - 1).max())
            moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim > 1]
            held = np.mean([leaf.addressable_shards[0].data.size / leaf.size for leaf in moments])
            fell = float(np.mean(wanted[:5]) - np.mean(wanted[-5:]))
            print(json.dumps({"part": part, "preset": preset, "error": error, "held": held, "fell": fell}), flush=True)
    print(json.dumps(refusal(read_recipe(Path(file)))))


if __name__ == "__main__":
    main(sys.argv[1])
