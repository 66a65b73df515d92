"""Speculative decoding: guess several tokens, check them in one forward.

What is checked is what plain decoding would choose at each place, by the same settings and the same random numbers, so
answers are the same token for token, sampled ones too, whoever guesses; a guess only saves the forward that it was
right about. Leviathan et al., arXiv 2211.17192, whose rule of acceptance this is for a guess without probabilities.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct

from mllama_jax.errors import InputError
from mllama_jax.generate import lookup
from mllama_jax.generate.decode import Made, State, choose, columns_of
from mllama_jax.generate.draft import Draft
from mllama_jax.generate.sampling import Settings
from mllama_jax.model.cache import CrossCache, KVCache
from mllama_jax.model.mllama import MllamaModel, Params, call

AT_MOST = 32  # tokens guessed at once


def checked(lookup: int, draft: object = None) -> int:
    """How many tokens to guess at once. Raises InputError where it is no number from 0 to AT_MOST, or 0 for a draft."""
    if isinstance(lookup, bool) or not isinstance(lookup, int) or not 0 <= lookup <= AT_MOST:
        raise InputError(f"lookup must be an integer from 0 to {AT_MOST}, got {lookup!r}")
    if draft is not None and not lookup:
        raise InputError(f"draft: lookup says how many tokens it guesses at once, got 0; give one from 1 to {AT_MOST}")
    return lookup


@struct.dataclass
class Text:
    """What guesses are made from: prompts and answers without image tokens, which text-only drafts do not know.

    Attributes:
        tokens: int32 [B, S].
        last: int32 [B], where each row's last token stands.
        cache: what a draft has read of it, all but the last two tokens for certain; () without a draft.
    """

    tokens: jax.Array
    last: jax.Array
    cache: tuple[KVCache, ...]


@functools.partial(jax.jit, static_argnames=("image_token", "length", "k"))
def begin(
    draft: Draft | None,
    tokens: jax.Array,
    lengths: jax.Array,
    first: jax.Array,
    settings: Settings,
    *,
    image_token: int,
    length: int,
    k: int,
) -> Text:
    """What is written once tokens int [B, T], of which lengths [B] are real, are read and `first` [B] is made.

    A draft reads it too, into a cache of `length` positions.
    """
    places = jnp.arange(tokens.shape[1])
    kept = (places < lengths[:, None]) & (tokens != image_token)
    count = kept.sum(axis=1, dtype=jnp.int32)
    tokens = jnp.take_along_axis(tokens, jnp.argsort(~kept, axis=1, stable=True), axis=1)
    tokens = jnp.where(places < count[:, None], tokens, 0)
    last = jnp.maximum(count, 1)  # a prompt of pictures alone is read as token 0
    cache = draft.read(tokens, last, settings, length) if draft is not None else ()
    tokens = jnp.pad(tokens, ((0, 0), (0, length + k + 1 - tokens.shape[1])))
    return Text(tokens.at[jnp.arange(len(tokens)), last].set(first), last, cache)


def guess(draft: Draft | None, text: Text, state: State, settings: Settings, k: int) -> tuple[jax.Array, Text]:
    """What may follow, int32 [B, k]: what the draft would say or, without one, what followed before."""
    if draft is None:
        return lookup.guess(text.tokens, text.last, k), text
    before = jnp.take_along_axis(text.tokens, text.last[:, None] - 1, axis=1)[:, 0]
    state = dataclasses.replace(state, cache=text.cache, position=text.last)
    guessed, after = draft.guess(before, state, settings, k)
    return guessed, dataclasses.replace(text, cache=after.cache)


@functools.partial(jax.jit, static_argnames=("model", "steps", "top", "k"), donate_argnames=("state", "text"))
def decode(
    model: MllamaModel,
    params: Params,
    draft: Draft | None,
    state: State,
    text: Text,
    cross: CrossCache | None,
    settings: Settings,
    *,
    steps: int,
    top: int,
    k: int,
) -> tuple[State, Text, Made, jax.Array, jax.Array]:
    """Make tokens until a row has `steps` more of them or all are done, up to `k` + 1 of each row in a forward.

    The cache has room for `k` positions behind a row's last token. Returns the state, the text, the block
    [B, steps + k], how many of its columns each row made, int32 [B], and how many forwards that took.
    """
    rows = len(state.token)
    put = jax.vmap(lambda line, new, start: jax.lax.dynamic_update_slice_in_dim(line, new, start, 0))

    def more(carry: tuple) -> jax.Array:
        state, _, _, columns, _ = carry
        return (columns.max() < steps) & ~state.done.all()

    def step(carry: tuple) -> tuple:
        state, text, block, columns, forwards = carry
        guessed, text = guess(draft, text, state, settings, k)
        own = jnp.concatenate([state.token[:, None], guessed], axis=1)
        positions = state.position[:, None] + jnp.arange(k + 1)
        x, cache = call(model, params, "__call__", own, positions, state.cache, cross)
        logits = model.constrain(call(model, params, "logits", x), "batch", "seq", None)

        def check(carry: tuple, place: tuple) -> tuple:
            state, going = carry
            logits, guessed = place
            after, made = choose(logits, state, settings, top)
            after = dataclasses.replace(after, position=state.position + 1)
            state: State = jax.tree.map(functools.partial(_chosen, going), after, state)
            return (state, going & ~state.done & (made.token == guessed)), (made, going)

        nothing = jnp.full((rows, 1), -1, jnp.int32)
        places = jnp.swapaxes(logits, 0, 1), jnp.concatenate([guessed, nothing], axis=1).T
        start = state.replace(cache=()), ~state.done
        (after, _), (made, taken) = jax.lax.scan(check, start, places)
        made = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), made)  # [B, k + 1]
        count = taken.sum(axis=0, dtype=jnp.int32)
        tokens = put(text.tokens, made.token, text.last + 1)
        text = dataclasses.replace(text, tokens=tokens, last=text.last + count)
        block = jax.tree.map(lambda all_columns, new: put(all_columns, new, columns), block, made)
        return after.replace(cache=cache), text, block, columns + count, forwards + 1

    nothing = columns_of(rows, steps + k, top), jnp.zeros(rows, jnp.int32), jnp.int32(0)
    return jax.lax.while_loop(more, step, (state, text, *nothing))


def _chosen(which: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """The rows of `new` [B, ...] where `which` [B], of `old` elsewhere."""
    return jnp.where(which.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
