"""The compiled programs: encode pictures, prefill prompts, decode many tokens in one dispatch.

All take the model as a static argument and its parameters as the first dynamic one; caches are donated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from jax.experimental import multihost_utils

from mllama_jax.generate.sampling import Settings, sample
from mllama_jax.model import gpu_peers
from mllama_jax.model.attention import attention_weights, largest_divisor
from mllama_jax.model.cache import CrossCache, KVCache
from mllama_jax.model.mllama import MllamaModel, Params, call
from mllama_jax.model.vision import TILES
from mllama_jax.processing.image import MEAN, STD

CHUNK = 2048  # tokens of a prompt read at once
STEPS = 32  # decode steps in one dispatch at most
SCORED = 128  # positions whose logits are made at once

# XLA's own choice, and loops and conditions too: a GPU runs a dispatch as one CUDA graph and asks its host nothing
# meanwhile, so that dispatches return at once, as elsewhere, and can follow each other without a gap.
ONE_GRAPH = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
}


def one_graph(platform: str) -> dict[str, str] | None:
    """Options for the compiler of "cpu", "gpu" or "tpu" to make a dispatch that returns at once."""
    return ONE_GRAPH if platform == "gpu" else None


def chunk(platform: str) -> int:
    """CHUNK, or more on a GPU: cuDNN's causal attention only knows prompts that are read from their beginning."""
    return 4 * CHUNK if platform == "gpu" else CHUNK


@struct.dataclass
class State:
    """Where each row stands between two decode steps.

    Attributes:
        cache: the self-attention cache.
        token: int32 [B], made but not yet read by the model.
        position: int32 [B], where `token` goes.
        made: int32 [B], tokens made so far.
        done: bool [B], rows that met a stop token or their limit.
        counts: int32 [B, V], how often each token is in the answer; None where no row has a penalty.
    """

    cache: tuple[KVCache, ...]
    token: jax.Array
    position: jax.Array
    made: jax.Array
    done: jax.Array
    counts: jax.Array | None


@struct.dataclass
class Made:
    """Tokens as they are made: the column of one step [B], or a block of columns [B, steps].

    Attributes:
        token: int32.
        logprob: float32, its log-probability under the model, before bias, penalties and temperature.
        top_tokens: int32 [..., n], the n likeliest ones.
        top_logprobs: float32 [..., n].
    """

    token: jax.Array
    logprob: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array


def returns_at_once(model: MllamaModel, block: Made) -> bool:
    """Whether the dispatch of `decode` that gave this was back before the block had come.

    XLA's collectives are no part of its CUDA graphs: with them on several GPUs the host is asked before each step.
    """
    rows, devices = block.token.shape[0], block.token.sharding.device_set
    if len(devices) == 1 or model.constrain.platform != "gpu":
        return True
    return model.constrain.parts("batch") == 1 and peers_of(model, rows) is not None


def on_host(tree: Any) -> Any:
    """A tree of arrays that lie in one place, as NumPy: whole in every process, whoever's devices hold their parts."""
    if jax.tree.leaves(tree)[0].is_fully_addressable:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def normalise(pixels: jax.Array, ratio_ids: jax.Array) -> jax.Array:
    """`processing.image.normalise` on the device, for uint8 tiles [I, C, 3, P, P]; absent tiles become zeros."""
    real = jnp.arange(pixels.shape[1]) < jnp.asarray(TILES)[ratio_ids][:, None]  # I C
    return (pixels / 255 - MEAN) / STD * real[:, :, None, None, None]


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


@functools.partial(jax.jit, static_argnames="model")
def attention_to_tiles(model: MllamaModel, params: Params, tokens: jax.Array, cross: CrossCache) -> jax.Array:
    """Cross-attention of every position of tokens [B, T], the mean over layers and heads: float32 [B, T, M, N]."""
    whole = _whole(model, tokens)
    _, sown = model.apply({"params": params}, *whole, cross, mutable=["queries"])
    found: Any = sown["queries"]["text"]
    mask = cross.visible(whole[1])
    weights = []
    for i, layer in zip(model.config.text.cross_layers, cross.layers, strict=True):
        (q,) = found[f"layers_{i}"]["attention"]["normed"]
        weights.append(attention_weights(q, layer.k, mask).mean(axis=(1, 2)))  # B T S
    tiles = jnp.mean(jnp.stack(weights), axis=0).reshape(*tokens.shape, cross.spans.shape[1], -1)  # B T M N'
    return tiles[..., : cross.tokens]


def _whole(model: MllamaModel, tokens: jax.Array) -> tuple[jax.Array, jax.Array, tuple[KVCache, ...]]:
    """Tokens [B, T] with their positions and an empty cache for all of them."""
    rows, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    cache = model.empty_cache(rows, length)
    return tokens, positions, tuple(dataclasses.replace(layer, fresh=True) for layer in cache)


@functools.partial(jax.jit, static_argnames="model")
def all_logits(model: MllamaModel, params: Params, tokens: jax.Array, cross: CrossCache | None) -> jax.Array:
    """Logits float32 [B, T, V] of every position of tokens [B, T]."""
    x, _ = call(model, params, "__call__", *_whole(model, tokens), cross)
    return call(model, params, "logits", x)


@functools.partial(jax.jit, static_argnames="model")
def following(
    model: MllamaModel, params: Params, tokens: jax.Array, cross: CrossCache | None
) -> tuple[jax.Array, jax.Array]:
    """For tokens [B, T] what the model says of each one's successor: log-probability, whether it is the likeliest.

    Both are [B, T - 1]. Logits are made for a few positions at a time, for they are what needs memory.
    """
    x, _ = call(model, params, "__call__", *_whole(model, tokens), cross)
    size = largest_divisor(tokens.shape[1], SCORED)
    successors = jnp.roll(tokens, -1, axis=1)

    def score(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, successor = chunk
        logits = call(model, params, "logits", x)
        logprobs = jax.nn.log_softmax(logits)
        found = jnp.take_along_axis(logprobs, successor[..., None], axis=-1, mode="clip")[..., 0]
        return found, logits.argmax(axis=-1) == successor

    chunks = rearrange(x, "b (n t) d -> n b t d", t=size), rearrange(successors, "b (n t) -> n b t", t=size)
    logprob, likeliest = (rearrange(each, "n b t -> b (n t)")[:, :-1] for each in jax.lax.map(score, chunks))
    return logprob, likeliest


@functools.partial(jax.jit, static_argnames=("model", "rows", "length"))
def new_cache(model: MllamaModel, rows: int, length: int) -> tuple[KVCache, ...]:
    """An empty cache of so many rows and positions, in its place on the mesh."""
    return tuple(layer.placed(model.constrain) for layer in model.empty_cache(rows, length))


@functools.partial(jax.jit, static_argnames=("model", "top"), donate_argnames="cache")
def prefill(
    model: MllamaModel,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: tuple[KVCache, ...],
    cross: CrossCache | None,
    settings: Settings,
    *,
    top: int,
) -> tuple[State, Made]:
    """Read tokens [B, T], of which lengths [B] are real, and make the first new tokens.

    The cache is empty and has room for T. Padding behind a row's tokens is read too: decode overwrites what it left in
    the cache before anything can see it. `top` is how many of the likeliest tokens to report. Long prompts are read in
    chunks of at most `chunk` tokens, which bounds the memory they need.
    """
    rows, length = tokens.shape
    size = largest_divisor(length, chunk(model.constrain.platform))
    whole = size == length

    def read(carry: tuple, chunk: tuple) -> tuple[tuple, None]:
        (cache, last), (first, own) = carry, chunk
        positions = jnp.broadcast_to(first + jnp.arange(size), own.shape)
        cache = tuple(dataclasses.replace(layer, fresh=whole) for layer in cache)
        x, cache = call(model, params, "__call__", own, positions, cache, cross)
        end = lengths - 1 - first  # where a row's last token is, if in this chunk
        ends = jnp.take_along_axis(x, jnp.clip(end, 0, size - 1)[:, None, None], axis=1)[:, 0]
        return (cache, jnp.where(((end >= 0) & (end < size))[:, None], ends, last)), None

    chunks = jnp.arange(0, length, size), rearrange(tokens, "b (n t) -> n b t", t=size)
    last = jnp.zeros((rows, model.config.text.width), model.dtype)
    (cache, last), _ = jax.lax.scan(read, (cache, last), chunks)
    nothing = jnp.zeros_like(lengths)
    counts = None if settings.in_prompt is None else jnp.zeros(settings.in_prompt.shape, jnp.int32)
    state = State(cache, nothing, lengths, nothing, jnp.zeros(len(lengths), bool), counts)
    return choose(call(model, params, "logits", last), state, settings, top)


def decode(
    model: MllamaModel,
    params: Params,
    state: State,
    cross: CrossCache | None,
    settings: Settings,
    *,
    steps: int | jax.Array,
    top: int,
) -> tuple[State, Made, jax.Array]:
    """Make up to `steps` more tokens a row, of at most STEPS, fewer once all rows are done.

    Returns the state, the block [B, STEPS] and how many of its columns were made. A row's entries after its end mean
    nothing. The state is donated.
    """
    run, among = decoder(model.constrain.platform), peers_of(model, state.token.shape[0])
    with contextlib.nullcontext() if among is None else gpu_peers.IN_TURN:
        return run(model, params, state, cross, settings, among, steps=steps, top=top)


def peers_of(model: MllamaModel, rows: int) -> jax.Array | None:
    """What `decoder` is to be given for so many rows, see `gpu_peers`."""
    return gpu_peers.peers(model.constrain, model.config.text, model.dtype, rows)


def decoder(platform: str, *, at_once: bool = True) -> jax.stages.Wrapped:
    """`decode`, jitted for "cpu", "gpu" or "tpu"; without `at_once` a GPU runs it as XLA does by itself."""
    return _decoder(platform, at_once and platform == "gpu")


@functools.cache
def _decoder(platform: str, at_once: bool) -> jax.stages.Wrapped:
    options = one_graph(platform) if at_once else None
    return jax.jit(_decode, static_argnames=("model", "top"), donate_argnames="state", compiler_options=options)


def _decode(
    model: MllamaModel,
    params: Params,
    state: State,
    cross: CrossCache | None,
    settings: Settings,
    among: jax.Array | None = None,
    *,
    steps: jax.Array,
    top: int,
) -> tuple[State, Made, jax.Array]:
    if among is not None:
        model = model.clone(constrain=model.constrain.among(among))
    rows = state.token.shape[0]

    def more(carry: tuple) -> jax.Array:
        i, state, _ = carry
        return (i < steps) & ~state.done.all()

    def make(carry: tuple) -> tuple:
        i, state, block = carry
        state, made = step(model, params, state, cross, settings, top)
        return i + 1, state, jax.tree.map(lambda columns, column: columns.at[:, i].set(column), block, made)

    block = columns_of(rows, STEPS, top)
    columns, state, block = jax.lax.while_loop(more, make, (jnp.int32(0), state, block))
    return state, block, columns


def step(
    model: MllamaModel, params: Params, state: State, cross: CrossCache | None, settings: Settings, top: int
) -> tuple[State, Made]:
    """Read each row's token and choose the next."""
    x, cache = call(model, params, "__call__", state.token[:, None], state.position[:, None], state.cache, cross)
    position = jnp.minimum(state.position + 1, cache[0].length - 1)  # a row that is done stays inside
    logits = call(model, params, "logits", x[:, 0])
    return choose(logits, dataclasses.replace(state, cache=cache, position=position), settings, top)


def columns_of(rows: int, columns: int, top: int) -> Made:
    """A block [rows, columns] in which nothing is made yet."""
    return Made(
        token=jnp.zeros((rows, columns), jnp.int32),
        logprob=jnp.zeros((rows, columns)),
        top_tokens=jnp.zeros((rows, columns, top), jnp.int32),
        top_logprobs=jnp.zeros((rows, columns, top)),
    )


def choose(logits: jax.Array, state: State, settings: Settings, top: int) -> tuple[State, Made]:
    """Choose the next token of each row from its logits float32 [B, V]."""
    token = sample(logits, settings, state.made, state.counts)
    logprobs = jax.nn.log_softmax(logits)
    top_logprobs, top_tokens = jax.lax.top_k(logprobs, top)
    logprob = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    counts = None if state.counts is None else state.counts.at[jnp.arange(len(token)), token].add(1)
    made = state.made + 1
    done = state.done | (token[:, None] == settings.stops).any(axis=-1) | (made >= settings.limit)
    state = State(state.cache, token, state.position, made, done, counts)
    return state, Made(token, logprob, top_tokens.astype(jnp.int32), top_logprobs)
