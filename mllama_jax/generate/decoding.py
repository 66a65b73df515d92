"""Rows in progress: prefilled once, then decoded a block at a time until every answer has ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from mllama_jax.generate import decode
from mllama_jax.generate.answer import Answer
from mllama_jax.generate.decode import Made
from mllama_jax.generate.sampling import Settings
from mllama_jax.model.cache import CrossCache, KVCache
from mllama_jax.model.mllama import MllamaModel, Params

STEPS = 32  # tokens made in one dispatch


class Decoding:
    """Answers that grow together, one a row. `state` is where they stand; it may be left at any block."""

    def __init__(
        self,
        model: MllamaModel,
        params: Params,
        answers: Sequence[Answer],
        prompts: Sequence[Sequence[int]],
        cross: CrossCache | None,
    ):
        """`prompts` are the rows' whole prompts."""
        self.model, self.params, self.answers, self.cross = model, params, answers, cross
        self.top = max(answer.params.logprobs for answer in answers)
        vocab, stops = model.config.text.vocab, model.config.stops
        self.settings = Settings.of([answer.params for answer in answers], prompts, stops, vocab)

    def blocks(self, tokens: np.ndarray, lengths: np.ndarray, cache: tuple[KVCache, ...]) -> Iterator[tuple[Made, int]]:
        """Prefill (see `decode.prefill`; it takes the cache), then decode; gives blocks on the host and their columns.

        Whoever takes a block pushes it to the answers before asking for the next.
        """
        self.state, first = decode.prefill(
            self.model, self.params, tokens, lengths, cache, self.cross, self.settings, top=self.top
        )
        yield jax.tree.map(lambda x: np.asarray(x)[:, None], first), 1
        while not all(answer.finish_reason for answer in self.answers):
            ended = np.array(
                [answer.finish_reason is not None for answer in self.answers]
            )  # by a stop text, which we see
            state = self.state.replace(done=self.state.done | ended)
            self.state, block, columns = decode.decode(
                self.model, self.params, state, self.cross, self.settings, steps=STEPS, top=self.top
            )
            yield jax.device_get(block), int(columns)
