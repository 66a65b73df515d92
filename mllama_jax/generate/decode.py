"""The compiled programs: encode pictures, prefill prompts, decode many tokens in one dispatch.

All take the model as a static argument and its parameters as the first dynamic one; caches are donated.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mllama_jax.generate.sampling import Settings, sample
from mllama_jax.model.cache import CrossCache, KVCache, empty_cache
from mllama_jax.model.mllama import MllamaModel, Params, call


@struct.dataclass
class State:
    """Where each row stands between two decode steps.

    Attributes:
        cache: the self-attention cache.
        token: int32 [B], made but not yet read by the model.
        position: int32 [B], where `token` goes.
        made: int32 [B], tokens made so far.
        done: bool [B], rows that met a stop token or their limit.
    """

    cache: tuple[KVCache, ...]
    token: jax.Array
    position: jax.Array
    made: jax.Array
    done: jax.Array


@functools.partial(jax.jit, static_argnames="model")
def encode(model: MllamaModel, params: Params, pixels: jax.Array, ratio_ids: jax.Array) -> jax.Array:
    """Pixels [I, C, 3, P, P] -> projected features [I, C, N, D]."""
    return call(model, params, "encode", pixels, ratio_ids)


@functools.partial(jax.jit, static_argnames="model")
def keys_values(
    model: MllamaModel, params: Params, features: jax.Array, tiles: jax.Array, spans: jax.Array
) -> CrossCache:
    """Features [I, C, N, D] and each row's tiles int [B, M] among the I * C -> the rows' CrossCache."""
    tile_features = features.reshape(-1, *features.shape[2:])[tiles]  # B M N D
    return call(model, params, "keys_values", tile_features, spans)


@functools.partial(jax.jit, static_argnames="model")
def vision_intermediates(
    model: MllamaModel, params: Params, pixels: jax.Array, ratio_ids: jax.Array
) -> dict[str, jax.Array]:
    """What the vision tower sows on the way from pixels to projected features."""
    projected, sown = model.apply({"params": params}, pixels, ratio_ids, method="encode", mutable=["intermediates"])
    found: Any = sown["intermediates"]["vision"]
    return {f"vision/{name}": value for name, (value,) in found.items()} | {"vision/projected": projected}


@functools.partial(jax.jit, static_argnames="model")
def text_intermediates(
    model: MllamaModel, params: Params, tokens: jax.Array, cross: CrossCache | None
) -> dict[str, jax.Array]:
    """What the decoder sows on the way from tokens [B, T] to logits."""
    (x, _), sown = model.apply({"params": params}, *_whole(model, tokens), cross, mutable=["intermediates"])
    found: Any = sown["intermediates"]["text"]
    return {f"text/{name}": value for name, (value,) in found.items()} | {
        "text/logits": call(model, params, "logits", x)
    }


def _whole(model: MllamaModel, tokens: jax.Array) -> tuple[jax.Array, jax.Array, tuple[KVCache, ...]]:
    """Tokens [B, T] with their positions and an empty cache for all of them."""
    rows, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    return tokens, positions, empty_cache(model.config.text, rows, length, model.dtype)


@functools.partial(jax.jit, static_argnames="model")
def all_logits(model: MllamaModel, params: Params, tokens: jax.Array, cross: CrossCache | None) -> jax.Array:
    """Logits float32 [B, T, V] of every position of tokens [B, T]."""
    x, _ = call(model, params, "__call__", *_whole(model, tokens), cross)
    return call(model, params, "logits", x)


@functools.partial(jax.jit, static_argnames=("model", "length"))
def prefill(
    model: MllamaModel,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    cross: CrossCache | None,
    settings: Settings,
    stops: jax.Array,
    *,
    length: int,
) -> tuple[State, jax.Array]:
    """Read prompts [B, T] of the given lengths [B] into a new cache of `length` positions; make the first tokens.

    Returns the state and the log-probability float32 [B] of each row's token. The padding behind a row's prompt is read
    too: decode overwrites what it left in the cache before anything can see it.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    cache = empty_cache(model.config.text, tokens.shape[0], length, model.dtype)
    x, cache = call(model, params, "__call__", tokens, positions, cache, cross)
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]
    made = jnp.zeros(len(tokens), jnp.int32)
    return _choose(model, params, last, cache, lengths, made, jnp.zeros(len(tokens), bool), settings, stops)


@functools.partial(jax.jit, static_argnames=("model", "steps"), donate_argnames="state")
def decode(
    model: MllamaModel,
    params: Params,
    state: State,
    cross: CrossCache | None,
    settings: Settings,
    stops: jax.Array,
    *,
    steps: int,
) -> tuple[State, jax.Array, jax.Array, jax.Array]:
    """Make up to `steps` more tokens a row, fewer once all rows are done.

    Args:
        stops: int32 [B, n], each row's stop tokens, padded with -1.

    Returns:
        the state; tokens int32 [B, steps]; their log-probabilities float32 [B, steps]; and how many columns were made.
        A row's entries after its end mean nothing.
    """
    rows = state.token.shape[0]

    def more(carry: tuple) -> jax.Array:
        i, state, _, _ = carry
        return (i < steps) & ~state.done.all()

    def step(carry: tuple) -> tuple:
        i, state, tokens, logprobs = carry
        x, cache = call(model, params, "__call__", state.token[:, None], state.position[:, None], state.cache, cross)
        position = jnp.minimum(state.position + 1, cache[0].k.shape[1] - 1)  # a row that is done stays where it is
        state, logprob = _choose(model, params, x[:, 0], cache, position, state.made, state.done, settings, stops)
        return i + 1, state, tokens.at[:, i].set(state.token), logprobs.at[:, i].set(logprob)

    empty = jnp.zeros((rows, steps), jnp.int32)
    made, state, tokens, logprobs = jax.lax.while_loop(
        more, step, (jnp.int32(0), state, empty, empty.astype(jnp.float32))
    )
    return state, tokens, logprobs, made


def _choose(
    model: MllamaModel,
    params: Params,
    x: jax.Array,
    cache: tuple[KVCache, ...],
    position: jax.Array,
    made: jax.Array,
    done: jax.Array,
    settings: Settings,
    stops: jax.Array,
) -> tuple[State, jax.Array]:
    """Hidden states [B, D] -> the state with the next token chosen, and its log-probability."""
    logits = call(model, params, "logits", x)
    token = sample(logits, settings, made)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
    made = made + 1
    done = done | (token[:, None] == stops).any(axis=-1) | (made >= settings.limit)
    return State(cache, token, position, made, done), logprob
