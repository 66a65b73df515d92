"""Checkpoints of a run: where training, its data and its recipe stand; whole or not there, whenever a run ends."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from mllama_jax.convert.files import parse_json
from mllama_jax.convert.store import Store, absolute, is_bucket
from mllama_jax.errors import InputError
from mllama_jax.processes import agree
from mllama_jax.train.recipe import Recipe
from mllama_jax.train.step import TrainState

RECIPE = "recipe.json"


class Checkpoints:
    """The checkpoints under `out`, written while training goes on; the last and the best `keep` stay.

    A directory that holds those of another recipe is refused, and one that only some of several processes see.
    """

    def __init__(self, out: str, recipe: Recipe):
        self.out, store = out, Store(out)
        _same_recipe(store, recipe)
        agree({})  # all wait until the first has written it
        if store.read(RECIPE) is None:
            raise InputError(f"{out}: not what process 0 writes to; processes need a directory that they all share")
        policy = AnyPreservationPolicy(
            [
                LatestN(recipe.keep),
                BestN(get_metric_fn=_loss, reverse=True, n=recipe.keep, keep_checkpoints_without_metrics=False),
            ]
        )
        self.measured = recipe.held_out is not None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=_loss if self.measured else None,  # else losses are not written, and forgotten with the process
            best_mode="min",
            cleanup_tmp_directories=True,
        )
        self.manager = ocp.CheckpointManager(f"{absolute(out)}/checkpoints", options=options)

    def save(self, state: TrainState, reader: dict[str, Any], loss: float | None) -> None:
        """Begin to write where training stands, behind the last checkpoint if that is still on its way.

        Args:
            reader: which data the steps read; how many of them is the state's `step`.
            loss: of what is held out, where it was just measured.
        """
        step = int(state.step)
        if step != self.manager.latest_step():
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), reader=ocp.args.JsonSave(reader))  # pyright: ignore[reportCallIssue]
            metrics = {"loss": math.inf if loss is None else loss} if self.measured else None
            with self._writing():
                self.manager.wait_until_finished()
                self._check_room(state)
                self.manager.save(step, args=args, metrics=metrics, force=True)

    def latest(self, state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """What the last checkpoint holds, placed as `state` is; None where there is none."""
        step = self.manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), reader=ocp.args.JsonRestore())  # pyright: ignore[reportCallIssue]
        found = self.manager.restore(step, args=args)
        return found["state"], found["reader"]

    def close(self) -> None:
        """Wait until all is on disk."""
        with self._writing():
            self.manager.wait_until_finished()
            self.manager.close()

    def _check_room(self, state: TrainState) -> None:
        """Raise InputError where a disk has no room for a checkpoint: orbax would say it hundreds of times."""
        if is_bucket(self.out):
            return
        size, free = sum(x.nbytes for x in jax.tree.leaves(state)), shutil.disk_usage(self.out).free
        if free < size:
            raise InputError(
                f"{self.out}: a checkpoint takes {size / 1e6:.1f} MB and {free / 1e6:.1f} are free; make room, and the "
                "same command goes on from the last one"
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Tell in a line what the disk says, here of what was begun before."""
        try:
            yield
        except (ValueError, OSError) as error:
            said = re.search(r"([\w ]+) \[os_error_code", str(error))  # TensorStore's words
            reason = error.strerror if isinstance(error, OSError) else said and said[1].strip()
            if reason is None:
                raise
            raise InputError(
                f"{self.out}: a checkpoint cannot be written: {reason}; the same command goes on from the last one"
            ) from None


def _loss(metrics: Any) -> float:
    return metrics["loss"]


def _same_recipe(store: Store, recipe: Recipe) -> None:
    """Note the recipe in a new directory; refuse one of another."""
    if jax.process_index() > 0:
        return
    mine = json.loads(json.dumps(dataclasses.asdict(recipe)))
    if (found := store.read(RECIPE)) is not None:
        theirs = parse_json(found, f"{store.location}/{RECIPE}")
        for name, value in mine.items():
            if theirs.get(name) != value:
                raise InputError(
                    f"{store.location}: holds a run of another recipe, {name}: expected {value!r}, got "
                    f"{theirs.get(name)!r}; choose another directory or delete this one"
                )
    elif not store.remote and Path(store.location).is_file():
        raise InputError(f"{store.location}: is a file; expected a new or empty directory or one of a run")
    elif store.names():
        raise InputError(f"{store.location}: expected a new or empty directory or one of a run; choose another")
    else:
        store.write(RECIPE, (json.dumps(mine, indent=1) + "\n").encode())
