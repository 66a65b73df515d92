"""What a run's loop does in which order: devices are never left without a step, and nothing unseen is saved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mllama_jax.errors import InputError
from mllama_jax.train import trainer
from mllama_jax.train.recipe import Recipe


def run(steps: int, save_every: int, told_at: int = 0, bad: int = 0) -> list[str]:
    """What happens, in order, in a run that is told to end at a step, or whose loss at a step is no number."""
    done: list[str] = []
    recipe = Recipe(model="", data="", part="full", steps=steps, save_every=save_every)

    def update(step: int) -> Any:
        done.append(f"begin {step}")
        return SimpleNamespace(loss=np.nan if step == bad else 0.0, gradient=0.0)

    batches = SimpleNamespace(chats=SimpleNamespace(digest="", path=Path("chats.jsonl")), lines=lambda step: [step + 1])
    held: Any = SimpleNamespace(
        recipe=recipe, place=lambda batch: batch, update=update, batches=batches, held_out=None, state=None
    )
    history: Any = SimpleNamespace(begun=0, add=lambda step, *_: done.append(f"note {step}"), keep=lambda: None)
    saved: Any = SimpleNamespace(out="", save=lambda *_: done.append("save"), close=lambda: None)
    try:
        trainer._run(held, iter(range(1, steps + 1)), saved, history, lambda step: step == told_at)
    except trainer.Preempted:
        done.append("end")
    except InputError as error:
        done.append(str(error).partition(";")[0])
    return done


def test_a_step_is_begun_before_the_one_before_is_noted() -> None:
    assert run(steps=4, save_every=4) == [
        "begin 1", "begin 2", "note 1", "begin 3", "note 2", "begin 4", "note 3", "note 4", "save",
    ]  # fmt: skip


def test_what_is_saved_has_been_noted() -> None:
    """Whether it is due or the run is told to end."""
    first = ["begin 1", "begin 2", "note 1", "note 2", "save"]
    assert run(steps=4, save_every=2) == [*first, "begin 3", "begin 4", "note 3", "note 4", "save"]
    assert run(steps=4, save_every=4, told_at=2) == [*first, "end"]


@pytest.mark.parametrize(("bad", "noted"), [(1, []), (2, ["note 1"])])
def test_no_number_is_never_saved(bad: int, noted: list[str]) -> None:
    assert run(steps=4, save_every=2, bad=bad) == [
        "begin 1", "begin 2", *noted, f"step {bad}: loss nan, gradient 0.0",
    ]  # fmt: skip
