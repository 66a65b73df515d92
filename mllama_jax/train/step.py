"""One training step, for whatever part of a model is trained and whatever loss it minimises."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from mllama_jax.config import ASPECT_RATIOS
from mllama_jax.model.mllama import Params
from mllama_jax.model.vision import TILES
from mllama_jax.train.batch import Batch

PartLoss = Callable[[Params, Any, Batch], tuple[jax.Array, jax.Array]]
"""The trained part, what is frozen and a batch -> the sum of the batch's losses and how many they are."""


@struct.dataclass
class TrainState:
    """Where training stands: all that a step changes.

    Attributes:
        step: int32, steps done.
        params: the trained part, float32.
        optimizer: optax's state for it.
    """

    step: jax.Array
    params: Params
    optimizer: optax.OptState

    @classmethod
    def of(cls, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params))


@struct.dataclass
class Report:
    """Of one step: the mean loss, the norm of its gradient before clipping, and over how many losses, all float32."""

    loss: jax.Array
    gradient: jax.Array
    count: jax.Array


Step = Callable[[TrainState, Any, Batch], tuple[TrainState, Report]]


def train_step(loss: PartLoss, optimizer: optax.GradientTransformation) -> Step:
    """A jitted step (state, frozen, batches) -> (state, report); the state is donated.

    The gradient is that of the mean over all batches, stacked along a first axis, of which one is in memory at once.
    What is frozen is an argument of its own: it has neither a gradient nor a state in the optimiser.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, frozen: Any, batches: Batch) -> tuple[TrainState, Report]:
        def add(sums: Any, batch: Batch) -> tuple[Any, None]:
            (value, count), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, frozen, batch)
            return jax.tree.map(jnp.add, sums, (gradient, value, count)), None

        zero = jnp.zeros(())
        (gradient, value, count), _ = jax.lax.scan(
            add, (jax.tree.map(jnp.zeros_like, state.params), zero, zero), batches
        )
        share = 1 / jnp.maximum(count, 1)
        gradient = jax.tree.map(lambda each: each * share, gradient)
        updates, moments = optimizer.update(gradient, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, moments), Report(value * share, optax.tree.norm(gradient), count)

    return step


# Which cell (y, x) of Meta's 4 x 4 grid each aspect ratio's tile is; 16 where there is no tile.
_CELLS = np.full((len(TILES), 4), 16)
for _i, (_h, _w) in enumerate(ASPECT_RATIOS, start=1):
    _CELLS[_i, : _h * _w] = [4 * y + x for y in range(_h) for x in range(_w)]


def tie_tiles(tree: Params, *, average: bool = False) -> Params:
    """Sum what belongs to one cell of Meta's tile grid over the aspect ratios that have it, and give it to all of them.

    Applied to every gradient (and `average` to a start), it keeps the tables such that Meta's layout can hold them.
    """
    count = np.maximum(np.bincount(_CELLS.ravel(), minlength=17), 1) if average else np.ones(17)

    def tie(table: jax.Array) -> jax.Array:
        cells = jnp.zeros((17, *table.shape[2:]), table.dtype).at[_CELLS].add(table).at[16].set(0)
        return (cells / count.reshape(-1, *(1,) * (table.ndim - 2)).astype(table.dtype))[_CELLS]

    def visit(path: tuple, leaf: jax.Array) -> jax.Array:
        return tie(leaf) if path[-1].key in ("table", "tiles") else leaf

    return jax.tree_util.tree_map_with_path(visit, tree)
