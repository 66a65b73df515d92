"""JSON that an answer is held to: which tokens may come next, by llguidance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from mllama_jax.errors import InputError
from mllama_jax.processing.tokenizer import Tokenizer


class Vocabulary:
    """A tokenizer as grammars need it; made once, for it looks at every token.

    Args:
        stops: token ids that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, stops: Sequence[int]):
        self.vocab, self.stops = vocab, list(stops)
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Tokens(tokenizer, vocab, self.stops)), eos_token=self.stops)

    def guide(self, schema: dict[str, Any]) -> Guide:
        """For one answer; InputError where the schema is none, or asks for what cannot be held to.

        White space is what JSON needs: a model that is free to write more may never end.
        """
        try:
            text = json.dumps(schema)
            grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
            if wrong := LLMatcher.validate_grammar(grammar, self._tokenizer):
                raise ValueError(wrong)
        except ValueError as error:
            raise InputError(f"response_format: {' '.join(str(error).split())[:200]}") from None
        return Guide(LLMatcher(self._tokenizer, grammar), self, schema)


class Guide:
    """What an answer may go on with, as its tokens come."""

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, schema: dict[str, Any]):
        self._matcher, self._vocabulary, self.schema = matcher, vocabulary, schema

    def mask(self) -> np.ndarray:
        """bool [V], the tokens that may come next."""
        if self._matcher.is_stopped():
            allowed = np.zeros(self._vocabulary.vocab, bool)
            allowed[self._vocabulary.stops] = True
            return allowed
        bits = allocate_token_bitmask(1, self._vocabulary.vocab)
        fill_next_token_bitmask(self._matcher, bits)
        return np.unpackbits(bits.view(np.uint8), bitorder="little")[: self._vocabulary.vocab].astype(bool)

    def take(self, token: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class _Tokens:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, stops: Sequence[int]):
        specials = set(tokenizer.specials.values())
        self.tokens = [tokenizer.token_bytes(i, skip_specials=False) for i in range(min(vocab, tokenizer.vocab_size))]
        self.special_token_ids = [i for i in specials if i < len(self.tokens)]
        self.bos_token_id, self.eos_token_id = tokenizer.bos, stops[0]
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode(errors="replace"), specials=False)
