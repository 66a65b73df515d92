"""The pictures that ship with the package: `python -m mllama_jax.train.pictures.demo` draws them anew."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from mllama_jax.train.pictures.example import Example
from mllama_jax.train.pictures.stream import sample

PICTURES = Path(__file__).parents[2] / "assets" / "pictures"

# By file name: the family, the number of the seed that drew a pretty one, and questions with their answers.
_CHOSEN = {
    "wide.png": (
        "scenes",
        51,
        {"Count the crosses.": "3", "Where is the blue triangle?": "top", "What shape is purple?": "cross"},
    ),
    "chart.png": (
        "charts",
        22,
        {"What is the value of car?": "30", "Which is the smallest?": "coal", "Is wind larger than apple?": "no"},
    ),
    "sign.png": (
        "text",
        32,
        {
            "What does the sign say?": "SOUTH GATE RIVER",
            "What is the second word?": "GATE",
            "Read the last word.": "RIVER",
        },
    ),
}
_DEMO = 2  # the first word of these seeds, which neither training nor the held-out split has


def examples() -> dict[str, list[Example]]:
    """The examples of each picture, by its file name."""
    found = {}
    for name, (family, number, questions) in _CHOSEN.items():
        drawn = sample(family, np.random.default_rng([_DEMO, number]))
        found[name] = [
            dataclasses.replace(drawn, question=question, answer=answer, boxes=())
            for question, answer in questions.items()
        ]
    return found


def write(directory: Path = PICTURES) -> None:
    """Draw the pictures into `directory`, and beside them questions.json: by file name, questions and answers."""
    directory.mkdir(parents=True, exist_ok=True)
    questions = {}
    for name, about in examples().items():
        about[0].images[0].save(directory / name, optimize=True)
        questions[name] = [{"question": example.question, "answer": example.answer} for example in about]
    (directory / "questions.json").write_text(json.dumps(questions, indent=2) + "\n")


if __name__ == "__main__":
    write()
