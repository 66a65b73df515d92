"""What both harnesses need: requests in batches alike in length, and their settings as ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from mllama_jax.generate.sampling import SamplingParams

MAX_NEW_TOKENS = 256  # where a task gives none, as lm-eval's own models have it
Job = TypeVar("Job")
Done = TypeVar("Done")


def in_batches(
    jobs: Sequence[Job],
    size: int,
    length: Callable[[Job], int],
    work: Callable[[Sequence[Job]], Sequence[Done]],
    keep: Callable[[int, Done], None],
    *,
    quiet: bool,
) -> list[Done]:
    """`work` on batches of jobs that are alike in length, the longest first; what it gives in the jobs' order.

    `keep` gets each job's number and what was done with it as soon as it is.
    """
    order = sorted(range(len(jobs)), key=lambda i: -length(jobs[i]))
    done: dict[int, Done] = {}
    with tqdm(total=len(jobs), unit="request", leave=False, disable=quiet or None) as bar:
        for start in range(0, len(order), size):
            some = order[start : start + size]
            for i, each in zip(some, work([jobs[i] for i in some]), strict=True):
                done[i] = each
                keep(i, each)
            bar.update(len(some))
    return [done[i] for i in range(len(jobs))]


def sampling(settings: Mapping[str, Any]) -> SamplingParams:
    """A task's generation settings; greedy unless it samples."""
    until = settings.get("until") or []
    return SamplingParams(
        max_new_tokens=settings.get("max_gen_toks", settings.get("max_new_tokens", MAX_NEW_TOKENS)),
        temperature=settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0,
        top_p=settings.get("top_p", 1.0),
        top_k=settings.get("top_k", 0),
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
    )
