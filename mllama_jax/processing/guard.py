"""Llama Guard 3 11B Vision: how it is asked about a conversation, and what its answer says."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

from mllama_jax.errors import InputError
from mllama_jax.processing.chat import ChatTemplate, Prompt, read_conversation
from mllama_jax.processing.tokenizer import Tokenizer

T = TypeVar("T")
CATEGORIES = {  # in the words of its prompt; its model card says what falls under each
    "S1": "Violent Crimes",
    "S2": "Non-Violent Crimes",
    "S3": "Sex Crimes",
    "S4": "Child Exploitation",
    "S5": "Defamation",
    "S6": "Specialized Advice",
    "S7": "Privacy",
    "S8": "Intellectual Property",
    "S9": "Indiscriminate Weapons",
    "S10": "Hate",
    "S11": "Self-Harm",
    "S12": "Sexual Content",
    "S13": "Elections",
}
ANSWER = 128  # tokens: more than the longest verdict has
_UNSAFE = re.compile(r"unsafe(?:\n(S\d+(?:, ?S\d+)*))?")


class NoVerdict(InputError):
    """The model said neither safe nor unsafe."""


@dataclass(frozen=True)
class Verdict:
    """What a guard says of the last turn of a conversation.

    Attributes:
        categories: the codes of what makes it unsafe, keys of `CATEGORIES`.
    """

    safe: bool
    categories: tuple[str, ...] = ()

    def report(self) -> dict[str, Any]:
        """The verdict for JSON, with the categories' names."""
        named = [{"code": code, "name": CATEGORIES[code]} for code in self.categories]
        return {"safe": self.safe, "categories": named}

    def __str__(self) -> str:
        told = ", ".join(f"{code} {CATEGORIES[code]}" for code in self.categories)
        return "safe" if self.safe else f"unsafe: {told}" if told else "unsafe"


SAFE = Verdict(True)


def guard_prompts(
    conversation: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, opener: Callable[[Any], T]
) -> list[Prompt[T]]:
    """The questions whether the last turn of a conversation is safe; one for each picture, since a guard sees but one.
    `opener` makes images of their sources.

    Raises InputError for what is not a conversation.
    """
    whole = read_conversation(conversation, tokenizer, _template()).opened(opener)
    if len(whole.images) < 2:
        return [whole]
    first = whole.tokens.index(tokenizer.image_token)
    behind = whole.tokens[first + len(whole.images) :]
    return [Prompt([*whole.tokens[: first + 1], *behind], [image]) for image in whole.images]


@functools.cache
def _template() -> ChatTemplate:
    source = resources.files("mllama_jax.processing").joinpath("guard.jinja").read_text(encoding="utf-8")
    return ChatTemplate(source, {"categories": "\n".join(f"{code}: {name}." for code, name in CATEGORIES.items())})


def read_verdict(answer: str, *, whole: bool) -> Verdict:
    """The verdict in a guard's answer, which is `whole` where the guard itself ended it. Raises NoVerdict."""
    text = answer.strip()
    if whole and text == "safe":
        return SAFE
    found = _UNSAFE.fullmatch(text) if whole else None
    codes = re.findall(r"S\d+", found[1] or "") if found else []
    if found is None or not set(codes) <= set(CATEGORIES):
        raise NoVerdict(f"expected 'safe' or 'unsafe' and categories, got {text[:60]!r}; is the model Llama Guard 3?")
    return Verdict(False, tuple(dict.fromkeys(codes)))


def joined(verdicts: Iterable[Verdict]) -> Verdict:
    """Safe where all are; the categories of all, in their order."""
    verdicts = list(verdicts)
    found = {code for verdict in verdicts for code in verdict.categories}
    return Verdict(all(verdict.safe for verdict in verdicts), tuple(code for code in CATEGORIES if code in found))
