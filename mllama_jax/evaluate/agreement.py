"""How far two models agree: what each foretells, token by token, along the answers that data have."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from mllama_jax.errors import InputError
from mllama_jax.evaluate.data import Row
from mllama_jax.evaluate.recipe import Recipe

if TYPE_CHECKING:
    from mllama_jax import Mllama


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The first place of a row's answer where the two take another token for the likeliest."""

    id: str
    place: int
    answer: str
    first: str
    second: str


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Two models over the tokens of all answers.

    Attributes:
        top1: share of tokens where the likeliest is the same.
        kl, kl_max: Kullback-Leibler divergence of the second from the first in nats, the mean and the largest.
        perplexity: of the answers, by the first and by the second.
        diverging: a Divergence for each row that has one.
    """

    rows: int
    tokens: int
    top1: float
    kl: float
    kl_max: float
    perplexity: tuple[float, float]
    diverging: list[Divergence]


class Reference:
    """Logits that other code made for the same rows.

    A .npz file with `tokens` int [B, T], -1 behind each row's end, and `logits` [B, T, V]; row i is row i of the data,
    its prompt and its first answer.
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            with np.load(file) as content:
                self.tokens, self._logits = content["tokens"], content["logits"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{file}: expected a .npz with tokens and logits ({' '.join(str(error).split())})"
            ) from None
        if self.tokens.ndim != 2 or self._logits.shape[:2] != self.tokens.shape:
            raise InputError(
                f"{file}: expected tokens [B, T] and logits [B, T, V], got {self.tokens.shape} and {self._logits.shape}"
            )

    def logits(self, row: int, tokens: Sequence[int]) -> np.ndarray:
        """Logits [T, V] of a row, once it is known to be of these tokens."""
        if row >= len(self.tokens):
            raise InputError(f"{self.file}: has {len(self.tokens)} rows, fewer than the data; give --limit")
        there = self.tokens[row][self.tokens[row] >= 0].tolist()
        if there != list(tokens):
            place = next((i for i, (a, b) in enumerate(zip(there, tokens, strict=False)) if a != b), len(there))
            raise InputError(
                f"{self.file}: row {row} has {len(there)} tokens, ours {len(tokens)}, other ones from {place} on; "
                "make it from the same prompts"
            )
        return self._logits[row, : len(there)]


def agreement(first: Mllama, second: Mllama | Reference, recipe: Recipe, rows: Sequence[Row]) -> Agreement:
    """Read each row's prompt and first answer with both models."""
    vocabulary = first.config.text.vocab
    kl, same, surprise, diverging = [], [], ([], []), []
    for i, row in enumerate(tqdm(rows, unit="row", leave=False, disable=None)):
        prompt = first.prompt(row.conversation(recipe, row.pictures(recipe)))
        assert first.tokenizer is not None  # `prompt` has refused what has none
        answer = first.tokenizer.encode(row.answers[0], specials=False)
        tokens, start = prompt.tokens + answer, len(prompt.tokens) - 1
        ours = first.logits([tokens], [prompt.images])[0]
        theirs = (
            second.logits(i, tokens) if isinstance(second, Reference) else second.logits([tokens], [prompt.images])[0]
        )
        if theirs.shape[-1] != vocabulary:
            raise InputError(
                f"the two have vocabularies of {vocabulary} and {theirs.shape[-1]} ids; compare alike ones"
            )
        p, q = (_logprobs(logits[start:-1]) for logits in (ours, theirs))
        kl += (np.exp(p) * (p - q)).sum(axis=-1).tolist()
        for sums, logprobs in zip(surprise, (p, q), strict=True):
            sums += (-logprobs[np.arange(len(answer)), answer]).tolist()
        likeliest = p.argmax(axis=-1), q.argmax(axis=-1)
        equal = likeliest[0] == likeliest[1]
        same += equal.tolist()
        if not equal.all():
            place = int(equal.argmin())
            words = [first.tokenizer.decode([int(ids[place])], skip_specials=False) for ids in (answer, *likeliest)]
            diverging.append(Divergence(row.id, place, *words))
    by_first, by_second = (float(np.exp(np.mean(each))) for each in surprise)
    return Agreement(
        rows=len(rows),
        tokens=len(kl),
        top1=float(np.mean(same)),
        kl=float(np.mean(kl)),
        kl_max=float(np.max(kl)),
        perplexity=(by_first, by_second),
        diverging=diverging,
    )


def _logprobs(logits: np.ndarray) -> np.ndarray:
    """Float64 log-probabilities."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def text(found: Agreement) -> str:
    """The agreement as lines for a terminal."""
    lines = [
        f"{found.rows} rows, {found.tokens} tokens of answers",
        f"top-1 agreement  {100 * found.top1:.2f}%",
        f"KL               {found.kl:.3g} nats a token, at most {found.kl_max:.3g}",
        f"perplexity       {found.perplexity[0]:.4f} and {found.perplexity[1]:.4f}",
        f"diverging        {len(found.diverging)} rows",
    ]
    for each in found.diverging[:10]:
        lines.append(
            f"  {each.id}: token {each.place} of the answer, {each.answer!r}: {each.first!r} and {each.second!r}"
        )
    return "\n".join(lines)
