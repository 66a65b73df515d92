"""Prompt lookup: guess what follows from what followed before, and check several tokens in one forward.

What is checked is what plain decoding would choose at each place, by the same settings and the same random numbers, so
answers are the same token for token, sampled ones too; a guess only saves the forward that it was right about. Saxena,
"Prompt Lookup Decoding" (2023); Leviathan et al., arXiv 2211.17192, whose rule of acceptance this is for a guess
without probabilities.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mllama_jax.errors import InputError
from mllama_jax.generate.decode import Made, State, choose, columns_of
from mllama_jax.generate.sampling import Settings
from mllama_jax.model.cache import CrossCache
from mllama_jax.model.mllama import MllamaModel, Params, call

NGRAM = 3  # the most tokens by which a place is found
AT_MOST = 32  # tokens guessed at once


def checked(lookup: int) -> int:
    """How many tokens to guess at once. Raises InputError where it is no number from 0 to AT_MOST."""
    if isinstance(lookup, bool) or not isinstance(lookup, int) or not 0 <= lookup <= AT_MOST:
        raise InputError(f"lookup must be an integer from 0 to {AT_MOST}, got {lookup!r}")
    return lookup


def guess(tokens: jax.Array, last: jax.Array, k: int) -> jax.Array:
    """What may follow, int32 [B, k], the tokens int [B, S] of which each row's `last` [B] is the last known position.

    It is what followed where the last tokens stood before, as many of them as possible, at the latest such place; a
    text that runs out goes round. Some guess is made where there is none.
    """
    places = jnp.arange(tokens.shape[1])
    alike, length = places < last[:, None], jnp.zeros(tokens.shape, jnp.int32)
    for n in range(NGRAM):
        own = jnp.take_along_axis(tokens, jnp.maximum(last - n, 0)[:, None], axis=1)
        alike &= (jnp.roll(tokens, n, axis=1) == own) & (places >= n)
        length += alike
    place = jnp.argmax(length * len(places) + jnp.where(places < last[:, None], places, -1), axis=1)[:, None]
    period = jnp.maximum(last[:, None] - place, 1)
    return jnp.take_along_axis(tokens, place + 1 + jnp.arange(k) % period, axis=1)


@functools.partial(jax.jit, static_argnames=("model", "steps", "top", "k"), donate_argnames=("state", "written"))
def decode(
    model: MllamaModel,
    params: Params,
    state: State,
    written: jax.Array,
    cross: CrossCache | None,
    settings: Settings,
    *,
    steps: int,
    top: int,
    k: int,
) -> tuple[State, jax.Array, Made, jax.Array, jax.Array]:
    """Make tokens until a row has `steps` more of them or all are done, up to `k` + 1 of each row in a forward.

    `written` int32 [B, S] are the tokens by position, see `begin`; the cache has room for `k` positions behind a row's
    last token. Returns the state, what is written, the block [B, steps + k], how many of its columns each row made,
    int32 [B], and how many forwards that took.
    """
    rows = len(state.token)
    put = jax.vmap(lambda line, new, start: jax.lax.dynamic_update_slice_in_dim(line, new, start, 0))

    def more(carry: tuple) -> jax.Array:
        state, _, _, columns, _ = carry
        return (columns.max() < steps) & ~state.done.all()

    def step(carry: tuple) -> tuple:
        state, written, block, columns, forwards = carry
        guessed = guess(written, state.position, k)
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
        written = put(written, made.token, state.position + 1)
        block = jax.tree.map(lambda all_columns, new: put(all_columns, new, columns), block, made)
        return after.replace(cache=cache), written, block, columns + taken.sum(axis=0), forwards + 1

    nothing = columns_of(rows, steps + k, top), jnp.zeros(rows, jnp.int32), jnp.int32(0)
    return jax.lax.while_loop(more, step, (state, written, *nothing))


def _chosen(which: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """The rows of `new` [B, ...] where `which` [B], of `old` elsewhere."""
    return jnp.where(which.reshape(-1, *(1,) * (new.ndim - 1)), new, old)


@functools.partial(jax.jit, static_argnames=("length",))
def begin(tokens: jax.Array, state: State, *, length: int) -> jax.Array:
    """The tokens by position, int32 [B, length]: what prefill has read, int32 [B, T], and the one that it made."""
    written = jnp.pad(tokens, ((0, 0), (0, length - tokens.shape[1])))
    return written.at[jnp.arange(len(tokens)), state.position].set(state.token)
