"""Rows in progress: prefilled once, then decoded a block at a time until every answer has ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from mllama_jax.generate import decode, speculate
from mllama_jax.generate.answer import Answer
from mllama_jax.generate.decode import STEPS, Made
from mllama_jax.generate.draft import Draft
from mllama_jax.generate.sampling import Settings
from mllama_jax.model.cache import CrossCache, KVCache
from mllama_jax.model.mllama import MllamaModel, Params


def blocks(
    model: MllamaModel,
    params: Params,
    answers: Sequence[Answer],
    prompts: Sequence[Sequence[int]],
    rows: tuple[np.ndarray, np.ndarray],
    cache: tuple[KVCache, ...],
    cross: CrossCache | None,
    lookup: int = 0,
    draft: Draft | None = None,
) -> Iterator[tuple[Made, Sequence[int]]]:
    """Let answers grow together: blocks of new tokens on the host, and how many of their columns each row made.

    `rows` are the prompts as padded tokens int [B, T] and their lengths int [B]; an empty cache is taken. `lookup` is
    how many tokens to guess at once (see `speculate`), for which the cache has as many positions more. Whoever takes a
    block pushes it to the answers before asking for the next. Plain decoding is a block ahead where a dispatch returns
    at once: what it makes of rows that have ended by a stop text is lost.
    """
    top = max(answer.params.logprobs for answer in answers)
    settings = Settings.of([each.params for each in answers], prompts, model.config.stops, model.config.text.vocab)
    state, first = decode.prefill(model, params, *rows, cache, cross, settings, top=top)
    yield jax.tree.map(lambda x: x[:, None], decode.on_host(first)), [1] * len(answers)
    if lookup:
        length, image_token = state.cache[0].length, model.config.image_token
        text = speculate.begin(draft, *rows, state.token, settings, image_token=image_token, length=length, k=lookup)
        while _go_on(answers):
            state, text, block, columns, _ = speculate.decode(
                model, params, draft, _ended(state, answers), text, cross, settings, steps=STEPS, top=top, k=lookup
            )
            yield decode.on_host(block), decode.on_host(columns).tolist()
        return

    def dispatch(state: decode.State) -> tuple[decode.State, Made, jax.Array]:
        return decode.decode(model, params, _ended(state, answers), cross, settings, steps=STEPS, top=top)

    following = None
    while _go_on(answers):
        state, block, columns = following or dispatch(state)
        # To gather a block from several processes is itself a program, behind the next block.
        ahead = _go_on(answers, STEPS) and decode.returns_at_once(model, block) and columns.is_fully_addressable
        following = dispatch(state) if ahead else None
        yield decode.on_host(block), [int(columns)] * len(answers)


def _go_on(answers: Sequence[Answer], tokens: int = 0) -> bool:
    """Whether there are answers that have not ended, and may take more than so many tokens yet."""
    return any(a.finish_reason is None and a.params.max_new_tokens > len(a.tokens) + tokens for a in answers)


def _ended(state: decode.State, answers: Sequence[Answer]) -> decode.State:
    """The state where answers have ended by a stop text, which only the host sees."""
    ended = np.array([answer.finish_reason is not None for answer in answers])
    return dataclasses.replace(state, done=state.done | ended)
