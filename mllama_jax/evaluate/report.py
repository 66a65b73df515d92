"""What a run says: its score beside published ones, and beside another run's, answer by answer."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mllama_jax.errors import InputError
from mllama_jax.evaluate.folder import Record

RIGHT = 0.5  # the score from which an answer counts as right


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two runs over the same questions.

    Attributes:
        n: questions.
        difference: the second's mean score less the first's.
        stderr: of the difference, from the differences of the pairs.
        first_only, second_only: questions that only one of them has right.
        p: of McNemar's test, exact: how likely so uneven a split of those is if both are equally good.
    """

    n: int
    difference: float
    stderr: float | None
    first_only: int
    second_only: int
    p: float


def compare(first: Sequence[Record], second: Sequence[Record]) -> Comparison:
    """Compare two runs pair by pair (McNemar, 1947). Raises InputError where they were not asked the same."""
    one, other = ({record["id"]: record for record in records} for records in (first, second))
    same_questions(one, other)
    pairs = [(record, other[id]) for id, record in one.items()]
    if odd := [a["id"] for a, b in pairs if (a["answers"], a["images"]) != (b["answers"], b["images"])]:
        raise InputError(f"question {odd[0]!r} has other pictures or answers in the other run; compare equal data")
    differences = [b["score"] - a["score"] for a, b in pairs]
    right = [(a["score"] >= RIGHT, b["score"] >= RIGHT) for a, b in pairs]
    first_only, second_only = right.count((True, False)), right.count((False, True))
    return Comparison(
        n=len(pairs),
        difference=statistics.fmean(differences),
        stderr=statistics.stdev(differences) / len(pairs) ** 0.5 if len(pairs) > 1 else None,
        first_only=first_only,
        second_only=second_only,
        p=mcnemar(first_only, second_only),
    )


def same_questions(first: Iterable[str], second: Iterable[str]) -> None:
    """Refuse runs over different ids."""
    if alone := sorted(set(first) ^ set(second)):
        raise InputError(f"the runs differ in {len(alone)} questions, such as {alone[0]!r}; compare runs of equal data")


def mcnemar(b: int, c: int) -> float:
    """Two-sided exact p of McNemar's test: b and c of b + c fair coins."""
    if b == c:
        return 1.0
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2 ** (b + c))


def table(result: Mapping[str, Any]) -> str:
    """Scores in per cent with standard errors, and those that were published, as lines for a terminal."""
    configuration = result["configuration"]
    task = configuration["task"]
    rows = [(task["name"], result), *((f"  {name}", some) for name, some in result["by"].items())]
    published = "".join(f"{name:>16}" for name in task["published"])
    lines = [f"{'score in %':<28}{'n':>7}{'score':>8}{'± SE':>7}{published}"]
    for name, some in rows:
        error = f"{100 * some['stderr']:7.2f}" if some["stderr"] is not None else " " * 7
        line = f"{name:<28}{some['n']:>7}{100 * some['score']:8.2f}{error}"
        if some is result:
            line += "".join(f"{score:>16.1f}" for score in task["published"].values())
        lines.append(line)
    lines.append(f"{configuration['model']}, {configuration['dtype']}, weights {configuration['weights'][:12]}")
    if result["cut_off"]:
        lines.append(f"{result['cut_off']} answers were cut off at {task['max_new_tokens']} tokens")
    return "\n".join(lines)


def versus(name: str, comparison: Comparison) -> str:
    """A comparison with an earlier run as a line."""
    error = f" ± {100 * comparison.stderr:.2f}" if comparison.stderr is not None else ""
    return (
        f"against {name}: {100 * comparison.difference:+.2f}{error} points over {comparison.n} questions; right here "
        f"only {comparison.second_only}, there only {comparison.first_only}; McNemar p = {comparison.p:.3g}"
    )
