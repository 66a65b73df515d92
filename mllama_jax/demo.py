"""`make demo`: the shipped checkpoint answers questions about the three bundled pictures."""

from __future__ import annotations

import json
import time
from pathlib import Path

from mllama_jax.cli import SHIPPED, use_compilation_cache

PICTURES = Path(__file__).parent / "assets" / "pictures"


def main() -> None:
    start = time.monotonic()
    from mllama_jax import load

    use_compilation_cache()
    model = load(SHIPPED, dtype="float32")
    asked = [
        (picture, each["question"], each["answer"])
        for picture, questions in json.loads((PICTURES / "questions.json").read_text()).items()
        for each in questions
    ]
    conversations = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": PICTURES / picture}, {"type": "text", "text": question}],
            }
        ]
        for picture, question, _ in asked
    ]
    width = max(len(question) for _, question, _ in asked)
    shown = None
    for (picture, question, right), completion in zip(asked, model.generate(conversations), strict=True):
        if picture != shown:
            print(f"\n{PICTURES / picture}")
            shown = picture
        note = "" if completion.text == right else f"   (right: {right})"
        print(f"  {question:<{width}}  {completion.text}{note}")
    print(f"\n{len(asked)} answers in {time.monotonic() - start:.1f} s, loading and compiling included")


if __name__ == "__main__":
    main()
