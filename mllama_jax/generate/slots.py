"""The compiled programs of the engine: one row of caches that many requests share, read into, copied, moved.

Caches are donated wherever they change.
"""

from __future__ import annotations

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
from flax import struct

from mllama_jax.generate.decode import Made, State, choose, normalise, one_graph
from mllama_jax.generate.sampling import Settings
from mllama_jax.model.cache import CrossCache, KVCache
from mllama_jax.model.mllama import MllamaModel, Params, call

Layers = tuple[KVCache, ...]


@struct.dataclass
class Caches:
    """What all slots hold.

    Attributes:
        text: the self-attention cache, [slots, K, S, H] a layer.
        tiles: keys and values of pictures' tiles, [slots, K, M * N', H] a cross-attention layer; M may be 0. Like the
            former's they are int8 with scales [slots, K, ...] where the model's `cache` says so.
    """

    text: Layers
    tiles: Layers

    def cross(self, spans: jax.Array, tokens: int) -> CrossCache | None:
        """As the decoder takes it, of rows whose tiles are seen from `spans` int32 [B, M, 2]; None without any."""
        return CrossCache(self.tiles, spans, tokens) if spans.shape[1] else None


@functools.partial(jax.jit, static_argnames=("model", "slots", "length", "tiles"))
def empty(model: MllamaModel, *, slots: int, length: int, tiles: int) -> Caches:
    """Caches with room for `length` positions a slot and so many tiles."""
    text = tuple(layer.placed(model.constrain) for layer in model.empty_cache(slots, length))
    one = model.empty_layer(slots, tiles * tile_length(model))
    return Caches(text, tuple(one.placed(model.constrain, "image_seq") for _ in model.config.text.cross_layers))


@functools.partial(jax.jit, static_argnames="model")
def encode(model: MllamaModel, params: Params, pixels: list[jax.Array], ratio_ids: jax.Array) -> list[Layers]:
    """Keys and values of pictures, uint8 [1, C, 3, P, P] each, in the form of `take_tiles`."""
    scaled = normalise(jnp.concatenate(pixels), ratio_ids)
    features = call(model, params, "encode", scaled, ratio_ids)  # I C N D
    nobody = jnp.zeros((*features.shape[:2], 2), jnp.int32)
    layers = call(model, params, "keys_values", features, nobody).layers
    return [jax.tree.map(operator.itemgetter(slice(i, i + 1)), layers) for i in range(len(pixels))]


@functools.partial(jax.jit, static_argnames="model", donate_argnames="caches")
def read(
    model: MllamaModel,
    params: Params,
    caches: Caches,
    spans: jax.Array,
    rows: jax.Array,
    tokens: jax.Array,
    starts: jax.Array,
    ends: jax.Array,
) -> tuple[Caches, jax.Array]:
    """Read tokens int [R, T] into the slots `rows` int [R] at positions from `starts` [R] on: logits float32 [R, V] of
    what follows the ones at `ends` [R] of them. A slot may be named again with the same tokens.

    `spans` int32 [R, M, 2] say who sees the slots' tiles.
    """
    R, T = tokens.shape

    def take(x: jax.Array) -> jax.Array:
        return jnp.concatenate([jax.lax.dynamic_slice_in_dim(x, row, 1) for row in rows])

    def put(x: jax.Array, own: jax.Array) -> jax.Array:
        for i in range(R):
            x = jax.lax.dynamic_update_slice_in_dim(x, own[i : i + 1], rows[i], 0)
        return x

    own = jax.tree.map(take, caches)
    positions = starts[:, None] + jnp.arange(T)
    cross = own.cross(spans, tile_tokens(model))
    x, text = call(model, params, "__call__", tokens, positions, own.text, cross)
    caches = dataclasses.replace(caches, text=jax.tree.map(put, caches.text, text))
    return caches, call(model, params, "logits", x[jnp.arange(R), ends])


def follow(
    model: MllamaModel,
    logits: jax.Array,
    settings: Settings,
    made: jax.typing.ArrayLike,
    counts: jax.Array | None,
    *,
    top: int,
) -> Made:
    """The next token of rows that have `made` int32 [R] so far, from logits [R, V]; apart from `read`, so that one
    that takes minutes to compile does for all settings.
    """
    return _follower(model.constrain.platform)(logits, settings, made, counts, top=top)


@functools.cache
def _follower(platform: str) -> jax.stages.Wrapped:
    """A GPU's host would wait for all that was read before, to learn whether a row samples, were it not one graph."""

    def follow(logits: jax.Array, settings: Settings, made: jax.Array, counts: jax.Array | None, top: int) -> Made:
        state = State((), made, made, made, jnp.zeros(len(made), bool), counts)
        return choose(logits, state, settings, top)[1]

    return jax.jit(follow, static_argnames="top", compiler_options=one_graph(platform))


@functools.partial(jax.jit, donate_argnames="caches")
def copy_row(caches: Caches, source: jax.Array, target: jax.Array) -> Caches:
    """Copy all that one slot holds to another."""

    def copy(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, jax.lax.dynamic_slice_in_dim(x, source, 1), target, 0)

    return jax.tree.map(copy, caches)


@functools.partial(jax.jit, static_argnames="model")
def take_tiles(model: MllamaModel, tiles: Layers, row: jax.Array, first: jax.Array) -> Layers:
    """Keys and values of as many tiles as a picture may have, from a slot's `first` on: [1, K, C * N', H] a layer.

    Where the picture has fewer, what comes behind it means nothing.
    """
    N = tile_length(model)

    def take(x: jax.Array) -> jax.Array:
        own = jax.lax.dynamic_slice_in_dim(x, row, 1)
        parts = [jax.lax.dynamic_slice_in_dim(own, (first + i) * N, N, 2) for i in range(picture_tiles(model))]
        return jnp.concatenate(parts, axis=2)

    return jax.tree.map(take, tiles)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="tiles")
def put_tiles(model: MllamaModel, tiles: Layers, picture: Layers, row: jax.Array, first: jax.Array) -> Layers:
    """Put a picture's keys and values, as `take_tiles` gives them, into a slot from its tile `first` on.

    Where the picture has fewer tiles, those behind it are overwritten.
    """
    N = tile_length(model)

    def put(x: jax.Array, new: jax.Array) -> jax.Array:
        for i in reversed(range(picture_tiles(model))):  # what is beyond the last tile lands on it, before its own does
            one = new[:, :, i * N : (i + 1) * N]
            x = jax.lax.dynamic_update_slice(x, one, (row, 0, (first + i) * N, 0)[: x.ndim])
        return x

    return jax.tree.map(put, tiles, picture)


@functools.partial(jax.jit, static_argnames=("model", "length", "axis"))
def moved(model: MllamaModel, layer: KVCache, rows: jax.Array, *, length: int, axis: str) -> KVCache:
    """A layer's keys and values of `rows` int [R] with room for `length` positions, the first of those that were
    there; `axis` is what these are called on a mesh."""

    def move(x: jax.Array) -> jax.Array:
        x = x[:, :, :length]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0))[: x.ndim])
        return x.at[rows].get(mode="clip")

    return jax.tree.map(move, layer).placed(model.constrain, axis)


def tile_tokens(model: MllamaModel) -> int:
    """How many positions of a tile in the image cache are real; see `CrossCache`."""
    return model.config.vision.tokens if model.config.vision is not None else 0


def tile_length(model: MllamaModel) -> int:
    """How many positions a tile has in the image cache."""
    return model.config.vision.padded_tokens if model.config.vision is not None else 0


def picture_tiles(model: MllamaModel) -> int:
    """How many tiles a picture has at most."""
    return model.config.vision.max_tiles if model.config.vision is not None else 0
