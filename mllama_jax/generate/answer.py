"""One row's answer as it grows: tokens, text without broken characters or half a stop text, and why it ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mllama_jax.generate.decode import Made
from mllama_jax.generate.sampling import SamplingParams
from mllama_jax.processing.tokenizer import TextStream, Tokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        text: the answer, without special tokens and without the stop text.
        tokens: its ids, with the stop token, and with those of the stop text.
        logprobs: the log-probability of each.
        top_logprobs: for each place the likeliest tokens asked for and their log-probabilities.
        finish_reason: "stop" (a stop token or text) or "length" (max_new_tokens).
        prompt_tokens: how many ids were read.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    finish_reason: str
    prompt_tokens: int


class Answer:
    """Takes the tokens of one row and gives the text that is certain."""

    def __init__(self, params: SamplingParams, stop_ids: Sequence[int], tokenizer: Tokenizer | None):
        self.params, self.stop_ids = params, frozenset(stop_ids)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[dict[int, float]] = []
        self.text = ""
        self.finish_reason: str | None = None
        self._stream = TextStream(tokenizer) if tokenizer is not None else None
        self._held = ""  # may turn out to begin a stop text

    def push(self, block: Made, row: int, columns: int) -> str:
        """Take `columns` new tokens of `row` (arrays on the host), up to the end; returns the new text."""
        before, n = len(self.text), self.params.logprobs
        made = (each[row, :columns].tolist() for each in (block.token, block.logprob))
        tops = (each[row, :columns, :n].tolist() for each in (block.top_tokens, block.top_logprobs))
        for token, logprob, top_tokens, top_logprobs in zip(*made, *tops, strict=True):
            if self.finish_reason is not None:
                break
            self.tokens.append(token)
            self.logprobs.append(logprob)
            self.top_logprobs.append(dict(zip(top_tokens, top_logprobs, strict=True)))
            self._take(token)
        return self.text[before:]

    def _take(self, token: int) -> None:
        if token in self.stop_ids:
            return self._end("stop")
        if self._stream is not None:
            self._held += self._stream.push(token)
            if self._meets_stop():
                return None
            certain = len(self._held) - self._doubtful()
            self.text, self._held = self.text + self._held[:certain], self._held[certain:]
        if len(self.tokens) >= self.params.max_new_tokens:
            self._end("length")
        return None

    def _end(self, reason: str) -> None:
        self.finish_reason = reason
        if self._stream is not None:
            if reason == "stop":  # a limit may cut a character in two, and half of one is left out
                self._held += self._stream.finish()
            if not self._meets_stop():
                self.text += self._held

    def _meets_stop(self) -> bool:
        """Whether a stop text is there: the earliest ends the answer."""
        found = [self._held.find(stop) for stop in self.params.stop if stop in self._held]
        if found:
            self.text += self._held[: min(found)]
            self.finish_reason = "stop"
        return bool(found)

    def _doubtful(self) -> int:
        """How many of the last characters held may begin a stop text."""
        return max(
            (n for stop in self.params.stop for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0
        )

    def completion(self, prompt_tokens: int) -> Completion:
        return Completion(
            self.text, self.tokens, self.logprobs, self.top_logprobs, self.finish_reason or "length", prompt_tokens
        )
