"""`make demo`: the shipped checkpoint answers questions about the three bundled pictures."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from mllama_jax.cli import SHIPPED, use_compilation_cache

PICTURES = Path(__file__).parent / "assets" / "pictures"


def questions() -> list[tuple[Path, str, str]]:
    """Picture, question and right answer, for each question about the bundled pictures."""
    return [
        (PICTURES / picture, each["question"], each["answer"])
        for picture, about in json.loads((PICTURES / "questions.json").read_text()).items()
        for each in about
    ]


def ask(picture: Path, question: str) -> list[dict[str, Any]]:
    """A conversation that shows a picture and asks about it."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def main() -> None:
    start = time.monotonic()
    from mllama_jax import load

    use_compilation_cache()
    model, asked = load(SHIPPED, dtype="float32"), questions()
    width = max(len(question) for _, question, _ in asked)
    answers = model.generate([ask(picture, question) for picture, question, _ in asked])
    shown = None
    for (picture, question, right), completion in zip(asked, answers, strict=True):
        if picture != shown:
            print(f"\n{picture}")
            shown = picture
        note = "" if completion.text == right else f"   (right: {right})"
        print(f"  {question:<{width}}  {completion.text}{note}")
    print(f"\n{len(asked)} answers in {time.monotonic() - start:.1f} s, loading and compiling included")


if __name__ == "__main__":
    main()
