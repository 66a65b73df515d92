"""Held-out questions as files for `mllama evaluate`: `python -m mllama_jax.train.pictures.export FOLDER [--n 1000]`.

For each family FAMILY.jsonl, the pictures beside it, and FAMILY-shuffled.jsonl, where each question has the next one's
pictures: what a model scores there it scores without looking.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mllama_jax.train.pictures.example import Example
from mllama_jax.train.pictures.stream import FAMILIES, held_out, shuffled


def export(folder: Path, n: int) -> None:
    """Write the first `n` held-out examples of each family."""
    for family in FAMILIES:
        (folder / family).mkdir(parents=True, exist_ok=True)
        examples = list(tqdm(held_out(family, n), total=n, desc=family, leave=False, disable=None))
        names: dict[int, str] = {}
        for i, example in enumerate(examples):
            for place, image in enumerate(example.images):
                names[id(image)] = f"{family}/{i}-{place}.png"
                image.save(folder / names[id(image)])
        for file, some in ((f"{family}.jsonl", examples), (f"{family}-shuffled.jsonl", shuffled(examples))):
            (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows(some, names)))


def rows(examples: Sequence[Example], names: Mapping[int, str]) -> Iterator[dict[str, Any]]:
    """The columns of each example, its pictures by their names."""
    for i, example in enumerate(examples):
        yield {
            "id": str(i),
            "kind": example.kind.partition("/")[2],
            "question": example.question,
            "answer": example.answer,
            "images": [names[id(image)] for image in example.images],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=1000, help="questions of each family")
    args = parser.parse_args()
    export(args.folder, args.n)


if __name__ == "__main__":
    main()
