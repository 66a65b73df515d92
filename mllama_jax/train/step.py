"""One training step: next-token cross-entropy on the assistant's tokens."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from mllama_jax.config import ASPECT_RATIOS
from mllama_jax.model.cache import empty_cache
from mllama_jax.model.mllama import MllamaModel, Params, call
from mllama_jax.model.vision import TILES
from mllama_jax.processing.image import MEAN, STD

IGNORED = -1


@struct.dataclass
class Batch:
    """Rows to learn from.

    Attributes:
        tokens: int32 [B, T].
        labels: int32 [B, T], the token that follows, or IGNORED; never the image token, which the head cannot make.
        pixels: uint8 [I, C, 3, P, P], tiles before normalisation.
        ratio_ids: int32 [I].
        tiles: int32 [B, M], which of the I * C tiles a row sees.
        spans: int32 [B, M, 2], from which text positions.
    """

    tokens: jax.Array | np.ndarray
    labels: jax.Array | np.ndarray
    pixels: jax.Array | np.ndarray
    ratio_ids: jax.Array | np.ndarray
    tiles: jax.Array | np.ndarray
    spans: jax.Array | np.ndarray


def normalise(pixels: jax.Array, ratio_ids: jax.Array) -> jax.Array:
    """`processing.image.normalise` on the device, for tiles [I, C, 3, P, P]; padding tiles become zeros."""
    real = jnp.arange(pixels.shape[1]) < jnp.asarray(TILES)[ratio_ids][:, None]  # I C
    return (pixels / 255 - MEAN) / STD * real[:, :, None, None, None]


def encode(model: MllamaModel, params: Params, batch: Batch) -> jax.Array:
    """The projected features [I, C, N, D] of the batch's pictures."""
    pixels = normalise(jnp.asarray(batch.pixels), jnp.asarray(batch.ratio_ids))
    return call(model, params, "encode", pixels, batch.ratio_ids)


def answer_loss(model: MllamaModel, params: Params, batch: Batch, features: jax.Array) -> jax.Array:
    """Mean cross-entropy of the labels, given the pictures' features [I, C, N, D]."""
    cross = call(model, params, "keys_values", features.reshape(-1, *features.shape[2:])[batch.tiles], batch.spans)
    rows, length = batch.tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), batch.tokens.shape)
    cache = empty_cache(model.config.text, rows, length, model.dtype)
    x, _ = call(model, params, "__call__", batch.tokens, positions, cache, cross)
    return cross_entropy(call(model, params, "logits", x), batch.labels)


def cross_entropy(logits: jax.Array, labels: jax.Array | np.ndarray) -> jax.Array:
    """Mean cross-entropy of labels int [...] under logits [..., V], over those that are not IGNORED."""
    counts = labels != IGNORED
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return jnp.sum(losses * counts) / jnp.maximum(counts.sum(), 1)


def train_step(
    loss: Callable[[Params, Batch], jax.Array], optimizer: optax.GradientTransformation
) -> Callable[[Params, optax.OptState, Batch], tuple[Params, optax.OptState, jax.Array]]:
    """A jitted step (parameters, optimiser state, batch) -> (parameters, state, loss); the first two are donated."""

    def step(params: Params, state: optax.OptState, batch: Batch) -> tuple[Params, optax.OptState, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value  # pyright: ignore[reportReturnType]

    return jax.jit(step, donate_argnums=(0, 1))


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
