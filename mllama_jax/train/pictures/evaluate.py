"""Held-out scores of a checkpoint: `python -m mllama_jax.train.pictures.evaluate [DIRECTORY] [--quantize int8]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from mllama_jax import Mllama, load
from mllama_jax.cli import SHIPPED
from mllama_jax.train.pictures import FAMILIES, Example, conversation, held_out, shuffled
from mllama_jax.train.pictures.score import SCORES

ROWS = 50  # questions asked at once


def scores(model: Mllama, examples: Sequence[Example]) -> dict[str, list[float]]:
    """The score of each example, by its kind of question."""
    by_kind: dict[str, list[float]] = {}
    for start in tqdm(range(0, len(examples), ROWS), unit_scale=ROWS, unit="question", leave=False, disable=None):
        some = examples[start : start + ROWS]
        answers = model.generate([conversation(example)[:1] for example in some], max_new_tokens=32)
        for example, answer in zip(some, answers, strict=True):
            by_kind.setdefault(example.kind, []).append(SCORES[example.family](answer.text, example.answer))
    return by_kind


def mean(by_kind: dict[str, list[float]]) -> float:
    values = [value for each in by_kind.values() for value in each]
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=SHIPPED)
    parser.add_argument("--n", type=int, default=1000, help="questions of each family")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantize", choices=["int8"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = load(args.model, dtype=args.dtype, quantize=args.quantize)
    report: dict[str, dict[str, float]] = {}
    for family in FAMILIES:
        examples = list(held_out(family, args.n))
        by_kind = scores(model, examples)
        report[family] = {"all": mean(by_kind), "shuffled": mean(scores(model, shuffled(examples)))}
        report[family] |= {kind.split("/")[1]: mean({kind: by_kind[kind]}) for kind in sorted(by_kind)}
    if args.json:
        print(json.dumps(report))
        return
    for family, each in report.items():
        print(f"{family:<8}" + "".join(f"  {kind} {score:.3f}" for kind, score in each.items()))


if __name__ == "__main__":
    main()
