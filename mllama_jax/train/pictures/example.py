"""What a picture family yields: pictures, a question about them, and the one right answer."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from PIL import Image


class Box(NamedTuple):
    """A rectangle of picture number `image`, in pixels; right and bottom lie just outside."""

    left: int
    top: int
    right: int
    bottom: int
    image: int = 0


@dataclasses.dataclass(frozen=True)
class Example:
    """A question about one or more pictures.

    `kind` is "family/kind of question", `boxes` are where the things that the question names are to be seen, and
    `contents` describes each picture as it was drawn (`Scene`, `Chart` or `Sign`).
    """

    images: tuple[Image.Image, ...]
    question: str
    answer: str
    kind: str
    boxes: tuple[Box, ...] = ()
    contents: tuple[Any, ...] = ()

    @property
    def family(self) -> str:
        return self.kind.split("/")[0]


class Asked(NamedTuple):
    """A question, its answer, and where the things that it names are."""

    question: str
    answer: str
    boxes: tuple[Box, ...] = ()


ORDINALS = ("first", "second", "third", "fourth")


def conversation(example: Example) -> list[dict[str, Any]]:
    """The user's message, pictures before the question, and the assistant's answer.

    Several pictures are each followed by a caption: cross-attention carries no order, so text that saw two pictures at
    once could not tell the first from the second, while a caption between them sees only the picture before it.
    """
    content: list[dict[str, Any]] = []
    for image, ordinal in zip(example.images, ORDINALS[: len(example.images)], strict=True):
        content.append({"type": "image", "image": image})
        if len(example.images) > 1:
            content.append({"type": "text", "text": f"This is the {ordinal} picture. "})
    content.append({"type": "text", "text": example.question})
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": example.answer}]},
    ]
