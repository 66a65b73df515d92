"""Which checkpoints of a run stay."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mllama_jax.errors import InputError
from mllama_jax.train.checkpoints import Checkpoints
from mllama_jax.train.recipe import Recipe
from mllama_jax.train.step import TrainState
from mllama_jax.train.trainer import train

RECIPE = Recipe(model="model", data="chats.jsonl", held_out="chats.jsonl", part="lora", steps=9, keep=2)


def state(step: int) -> TrainState:
    made = TrainState.of({"kernel": jnp.full(3, float(step))}, optax.adam(1.0))
    return dataclasses.replace(made, step=jnp.int32(step))


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    """Also where the last came between two evaluations, as when a run is told to end."""
    checkpoints = Checkpoints(str(tmp_path / "run"), RECIPE)
    for step, loss in enumerate([0.5, 0.9, 0.2, 0.8, 0.7, None], start=1):
        checkpoints.save(state(step), {"next": step}, loss)
    checkpoints.close()
    assert {each.name for each in (tmp_path / "run/checkpoints").iterdir()} == {"1", "3", "5", "6"}
    resumed = Checkpoints(str(tmp_path / "run"), RECIPE)
    found = resumed.latest(state(0))
    assert found is not None
    restored, reader = found
    assert (int(restored.step), reader) == (6, {"next": 6})
    np.testing.assert_array_equal(restored.params["kernel"], np.full(3, 6.0))
    resumed.save(state(7), {"next": 7}, 0.95)
    resumed.close()
    assert {each.name for each in (tmp_path / "run/checkpoints").iterdir()} == {"1", "3", "6", "7"}


def test_a_full_disk_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was saved before stays."""
    checkpoints = Checkpoints(str(tmp_path / "run"), RECIPE)
    checkpoints.save(state(1), {"next": 1}, 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=12))
        with pytest.raises(InputError, match=r"run: a checkpoint takes .* MB and 0\.0 are free; make room"):
            checkpoints.save(state(2), {"next": 2}, 0.4)
    checkpoints.close()
    found = Checkpoints(str(tmp_path / "run"), RECIPE).latest(state(0))
    assert found is not None
    assert int(found[0].step) == 1


def test_a_run_in_a_bucket_needs_gcsfs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"gs://bucket/run: a run in a bucket needs gcsfs: pip install 'mllama-jax\["):
        train(RECIPE, "gs://bucket/run")
