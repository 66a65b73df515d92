"""One of several processes that export what they train; run by long/test_train_export.py.

python -m mllama_jax.run tests/exported.py COORDINATOR NUMBER COUNT RECIPE OUT
"""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mllama_jax import gathering, processes
from mllama_jax.train.export import write_trained
from mllama_jax.train.recipe import read_recipe
from mllama_jax.train.trainer import Trainer


def export(recipe: Path, out: Path) -> int:
    """Write random values as what was trained; returns the most bytes of them that were on this host at once."""
    trainer, rng, held, most = Trainer.of(read_recipe(recipe)), np.random.default_rng(0), 0, 0
    fetch = gathering.on_host

    def draw(leaf: jax.Array) -> jax.Array:
        values = rng.standard_normal(leaf.shape, np.float32)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, values.__getitem__)

    def forget(size: int) -> None:
        nonlocal held
        held -= size

    def fetched(array: Any) -> np.ndarray:
        nonlocal held, most
        found = np.array(fetch(array))
        held += found.nbytes
        most = max(most, held)
        weakref.finalize(found, forget, found.nbytes)
        return found

    gathering.on_host = fetched
    write_trained(str(out), trainer.recipe, trainer.loaded.config, jax.tree.map(draw, trainer.state.params))
    gathering.on_host = fetch
    return most


if __name__ == "__main__":
    coordinator, number, count, recipe, out = sys.argv[1:]
    processes.join(coordinator, int(number), int(count))
    print(json.dumps(export(Path(recipe), Path(out))))
