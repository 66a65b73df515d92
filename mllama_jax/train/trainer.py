"""A recipe on its devices: parameters in two parts, data, and the compiled step; and the run, which can be resumed."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.util
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import multihost_utils

from mllama_jax.api import Mllama
from mllama_jax.convert.apply import paths, read_config
from mllama_jax.convert.sources import open_checkpoint
from mllama_jax.convert.store import is_bucket
from mllama_jax.errors import InputError
from mllama_jax.loading import load, preset_mesh
from mllama_jax.model.layers import REMAT
from mllama_jax.model.mllama import Params
from mllama_jax.processes import agree
from mllama_jax.sharding.rules import Rules
from mllama_jax.train.batch import Batch
from mllama_jax.train.chats import Chats, Reader
from mllama_jax.train.checkpoints import Checkpoints
from mllama_jax.train.export import write_trained
from mllama_jax.train.history import History
from mllama_jax.train.loader import Batches, Order, own_samples, placed
from mllama_jax.train.objective import READING, Frozen, optimizer_of, part_loss
from mllama_jax.train.parts import init_lora, is_trained, lora_shapes, split
from mllama_jax.train.pictures.drawn import Drawings
from mllama_jax.train.pictures.reading import init_reading
from mllama_jax.train.recipe import Recipe
from mllama_jax.train.step import Report, Step, TrainState, train_step


def start(recipe: Recipe, loaded: Mllama) -> tuple[Params, Frozen]:
    """The part that is trained, as it begins, and the rest."""
    params, frozen = split(loaded.params, loaded.config, recipe.part)
    if recipe.part == "lora":
        params = _placed_lora(recipe, loaded)
    if recipe.pictures is not None:
        if recipe.pictures.patches and all(path[0] == "text" for path in paths(params)):
            raise InputError("pictures.patches: does nothing where nothing that sees is trained; set it to 0")
        rules, reading = loaded.model.constrain, init_reading(loaded.config)
        params[READING] = jax.device_put(reading, rules.sharding()) if isinstance(rules, Rules) else reading
    if recipe.loss != "preference":
        return params, Frozen(frozen)
    copy = jax.jit(functools.partial(jax.tree.map, lambda leaf: leaf.astype(recipe.dtype)))
    return params, Frozen(frozen, copy(params))


def _placed_lora(recipe: Recipe, loaded: Mllama) -> Params:
    config, rules, shardings = loaded.config, loaded.model.constrain, None
    if isinstance(rules, Rules):
        shardings = jax.tree.map(
            lambda leaf: rules.sharding(*leaf.names),
            lora_shapes(config, recipe.lora),
            is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
        )
    make = functools.partial(init_lora, config, recipe.lora)
    return jax.jit(make, out_shardings=shardings)(jax.random.key(recipe.seed))


@dataclasses.dataclass
class Trainer:
    """Everything that training takes, on its devices.

    Attributes:
        mine: which of a batch's samples this process reads.
    """

    recipe: Recipe
    loaded: Mllama
    frozen: Frozen
    state: TrainState
    step: Step
    loss: Any
    batches: Batches
    held_out: Batches | None
    mine: slice

    @classmethod
    def of(cls, recipe: Recipe) -> Trainer:
        """Load the model and look through the data. Raises InputError."""
        if recipe.preset is None and jax.process_count() > 1:
            raise InputError("preset: missing; several processes train on one mesh, used as fsdp, fsdp+tensor, serve")
        mesh = preset_mesh(recipe.model, recipe.preset) if recipe.preset else None
        config = read_config(open_checkpoint(recipe.model))
        loaded = load(
            recipe.model, dtype=recipe.dtype, mesh=mesh, rules=recipe.preset or "serve", quantize=recipe.quantize,
            trained=functools.partial(is_trained, config, recipe.part),
        )  # fmt: skip
        if loaded.tokenizer is None:
            raise InputError(f"{recipe.model}: no tokenizer.json or tokenizer.model here, which chats need; add one")
        model = dataclasses.replace(loaded.model, remat=REMAT[recipe.remat])
        rules = model.constrain if isinstance(model.constrain, Rules) else None
        if rules is not None and recipe.samples % rules.parts("batch"):
            raise InputError(
                f"samples: expected a multiple of the {rules.parts('batch')} parts in which the mesh splits rows, got "
                f"{recipe.samples}"
            )
        mine = own_samples(recipe.samples, rules)
        reader = Reader(
            loaded.tokenizer, loaded.template, loaded.config, recipe.rows,
            min(recipe.length, loaded.config.text.context), recipe.too_long,
        )  # fmt: skip
        batches = _batches(recipe, _source(recipe, reader), mine, recipe.steps)
        held_out = None if recipe.held_out is None else _batches(recipe, Chats(recipe.held_out, reader), mine, None)
        agree({str(each.chats.path): each.chats.digest for each in (batches, held_out) if each is not None})
        params, frozen = start(recipe, loaded)
        loss, optimizer = functools.partial(part_loss, recipe, model), optimizer_of(recipe)
        state = TrainState.of(params, optimizer)
        if rules is not None:  # counts are made on no mesh, and a checkpoint would bring them back so
            state = jax.tree.map(lambda leaf: leaf if leaf.ndim else jax.device_put(leaf, rules.sharding()), state)
        return cls(recipe, loaded, frozen, state, train_step(loss, optimizer), jax.jit(loss), batches, held_out, mine)

    def place(self, batches: Batch) -> Batch:
        """A step's batches as `Batches` makes them, on the devices of all processes."""
        rules = self.loaded.model.constrain
        return placed(batches, self.recipe.samples, self.mine, rules if isinstance(rules, Rules) else None)

    def update(self, batches: Batch) -> Report:
        """One step on batches that `place` has placed."""
        self.state, report = self.step(self.state, self.frozen, batches)
        return report

    def evaluate(self) -> float:
        """The mean loss of what is held out."""
        assert self.held_out is not None
        total = count = 0.0
        for batches in self.held_out.read():
            placed = self.place(batches)
            for i in range(len(batches.tokens)):
                value, weight = self.loss(
                    self.state.params, self.frozen, jax.tree.map(lambda each, i=i: each[i], placed)
                )
                total, count = total + float(value), count + float(weight)
        return total / count


def _source(recipe: Recipe, reader: Reader) -> Chats | Drawings:
    if recipe.pictures is not None:
        return Drawings(recipe.pictures, recipe.steps * recipe.samples * recipe.accumulate, recipe.seed, reader)
    assert recipe.data is not None
    return Chats(recipe.data, reader)


def _batches(recipe: Recipe, chats: Chats | Drawings, mine: slice, steps: int | None) -> Batches:
    accumulate = recipe.accumulate if steps else 1
    order = Order(chats, recipe.samples * accumulate, recipe.seed if steps else None)
    return Batches(chats, order, steps or len(order), recipe.samples, accumulate, mine, recipe.workers if steps else 0)


class Preempted(Exception):
    """The machine is taken back; what was trained is saved."""


@contextmanager
def _notice() -> Iterator[Callable[[int], bool]]:
    """Whether, at a step, this process or one that trains with it has had SIGTERM, which ends none of them here.

    Of several processes it is JAX that catches the signal, and finds a step that all of them still reach.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    noted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: noted.append(number))
    try:
        yield lambda step: bool(noted)
    finally:
        signal.signal(signal.SIGTERM, before)


def train(recipe: Recipe, out: str | os.PathLike[str]) -> dict[str, Any]:
    """Train, or go on where a run of the same recipe in `out` was when it ended, and write what was trained.

    Args:
        out: a directory, or a place in a bucket (`gs://bucket/path`).

    Returns:
        what was done, see `History.summary`, and where the result is.

    Raises:
        InputError: the recipe, its data or `out` cannot be used; the loss is no number.
        Preempted: SIGTERM came; the state is saved.
    """
    out = os.fspath(out)
    if is_bucket(out) and importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"{out}: a run in a bucket needs gcsfs: pip install 'mllama-jax[train,gcs]'")
    checkpoints = Checkpoints(out, recipe)
    trainer = Trainer.of(recipe)
    if found := checkpoints.latest(trainer.state):
        trainer.state, read = found
        if read["digest"] != trainer.batches.chats.digest:
            raise InputError(f"{recipe.data}: has changed since the run in {out} began; choose another directory")
    begun = int(trainer.state.step)
    reader, history = trainer.batches.read(begun), History(out, recipe, begun, trainer.loaded.config)
    with closing(reader), _notice() as noticed, history:
        _run(trainer, reader, checkpoints, history, noticed)
    gc.collect()  # grain's last batches hang on errors that hold themselves; their shared memory would be called leaked
    checkpoints.close()
    params = {name: leaf for name, leaf in trainer.state.params.items() if name != READING}
    result = write_trained(out, recipe, trainer.loaded.config, params)
    return {
        **history.summary(),
        "dropped": trainer.batches.chats.dropped,
        "cut": trainer.batches.chats.cut,
        "result": result,
    }


def _run(
    trainer: Trainer, reader: Any, checkpoints: Checkpoints, history: History, noticed: Callable[[int], bool]
) -> None:
    """Steps to the last; while the devices are at one, the next is read and the one before is looked at."""
    recipe, ahead, unseen = trainer.recipe, None, None
    for step in range(history.begun + 1, recipe.steps + 1):
        batches = trainer.place(next(reader)) if ahead is None else ahead
        report = trainer.update(batches)
        due = step % recipe.save_every == 0 or step == recipe.steps
        ahead = None if due else trainer.place(next(reader))
        if unseen is not None:
            _look(trainer, history, *unseen)
        unseen = step, jax.tree.map(jax.typeof, batches), report  # the batch itself need not stay on the devices
        leaving = noticed(step)
        if due or leaving:
            loss = _look(trainer, history, *unseen, due)
            unseen = None
            history.keep()
            checkpoints.save(trainer.state, {"digest": trainer.batches.chats.digest}, loss)
        if leaving:
            checkpoints.close()
            raise Preempted(f"{checkpoints.out}: told to end; step {step} is saved, the same command goes on from it")


def _look(
    trainer: Trainer, history: History, step: int, batches: Batch, report: Report, due: bool = False
) -> float | None:
    """Note a step and, where it is due, the loss of what is held out, which is returned.

    Stops where the step's loss or its gradient is no number.
    """
    loss, gradient = float(report.loss), float(report.gradient)
    if not (math.isfinite(loss) and math.isfinite(gradient)):
        lines = trainer.batches.lines(step - 1)
        named = f"lines {', '.join(map(str, lines))}" if len(lines) > 1 else f"line {lines[0]}"
        raise InputError(
            f"step {step}: loss {loss}, gradient {gradient}; its batch is {named} of "
            f"{trainer.batches.chats.path}; look at these, or lower learning_rate; the last checkpoint is from before"
        )
    held_out = trainer.evaluate() if due and trainer.held_out is not None else None
    history.add(step, batches, report, held_out)
    return held_out
