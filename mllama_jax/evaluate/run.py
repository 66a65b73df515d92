"""Ask a model every question of a data set: batch by batch, on all devices, going on where an earlier run stopped."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image
from tqdm import tqdm

from mllama_jax.errors import InputError
from mllama_jax.evaluate.data import Row
from mllama_jax.evaluate.folder import Folder, Record
from mllama_jax.evaluate.recipe import Recipe

if TYPE_CHECKING:
    from mllama_jax import Mllama


def evaluate(
    load: Callable[[], Mllama], recipe: Recipe, rows: Sequence[Row], folder: Folder | None, *, batch: int
) -> dict[str, Any]:
    """Answer the rows that the folder has no answer of, and finish it.

    Args:
        load: gives the model; called only where there is something to ask.
        folder: None in all processes but the first, which alone writes.
        batch: rows at once in each group of devices that shares a row. Batches are made of all rows, answered or not,
            so that a run that goes on asks in the same company; answers do not depend on it otherwise either, beyond
            the last digits of log-probabilities.

    Returns:
        `batches` and `rows` that were asked, `rows_at_once`, and `groups` of devices.
    """
    answered = folder.answered() if folder is not None else {}
    done = multihost_utils.broadcast_one_to_all(np.array([row.id in answered for row in rows]))
    told = {"batches": 0, "rows": 0, "rows_at_once": 0, "groups": 0}
    if not done.all():
        model = load()
        size = batch * model.groups
        left = [some for some in batches(rows, recipe, size) if not done[some].all()]
        told = {"batches": len(left), "rows": sum(map(len, left)), "rows_at_once": size, "groups": model.groups}
        again = {rows[i].id for some in left for i in some}
        answered = {id: record for id, record in answered.items() if id not in again}
        if folder is not None:
            folder.keep(answered.values())
        before = len(rows) - told["rows"]
        with tqdm(total=len(rows), initial=before, unit="question", leave=False, disable=_hidden()) as bar:
            for some in left:
                records = ask(model, recipe, [rows[i] for i in some])
                answered |= {record["id"]: record for record in records}
                if folder is not None:
                    folder.add(records)
                bar.update(len(some))
    if folder is not None:
        ordered = [answered[row.id] for row in rows]
        folder.finish(ordered, summary(ordered))
    return told


def batches(rows: Sequence[Row], recipe: Recipe, size: int) -> list[np.ndarray]:
    """Numbers of rows that are asked together: alike in pictures and length, the longest first."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].images), -len(rows[i].text(recipe)), i))
    return [np.array(order[start : start + size]) for start in range(0, len(order), size)]


def ask(model: Mllama, recipe: Recipe, rows: Sequence[Row]) -> list[Record]:
    """The answers to rows, greedily, with scores."""
    pictures = [row.pictures(recipe) for row in rows]
    conversations = [row.conversation(recipe, own) for row, own in zip(rows, pictures, strict=True)]
    try:
        completions = model.generate(conversations, max_new_tokens=recipe.max_new_tokens)
    except InputError as error:
        raise InputError(f"{rows[0].where} to {rows[-1].where}: {error}") from None
    records = []
    for row, own, completion in zip(rows, pictures, completions, strict=True):
        answer, score = recipe.score(completion.text, row.answers, row.options)
        records.append(
            {
                "id": row.id,
                "group": row.group,
                "prompt": row.text(recipe),
                "images": [digest_of(picture).hex() for picture in own],
                "answers": list(row.answers),
                "text": completion.text,
                "tokens": completion.tokens,
                "logprob": round(sum(completion.logprobs), 6),
                "finish_reason": completion.finish_reason,
                "answer": answer,
                "score": score,
            }
        )
    return records


def digest_of(image: Image.Image) -> bytes:
    """Equal for pictures of equal pixels and size."""
    digest = hashlib.sha256(repr((image.size, image.mode)).encode())
    digest.update(image.tobytes())
    return digest.digest()


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Score and standard error of answers, and of each group; how many answers the token limit cut off."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record)
    by = {name: _mean([record["score"] for record in some]) for name, some in sorted(groups.items()) if name}
    cut = sum(record["finish_reason"] == "length" for record in records)
    return {**_mean([record["score"] for record in records]), "by": by, "cut_off": cut}


def _mean(scores: Sequence[float]) -> Mapping[str, Any]:
    """The mean, and its standard error, which one score alone does not have."""
    error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
    return {"n": len(scores), "score": statistics.fmean(scores), "stderr": error}


def _hidden() -> bool | None:
    """Only the first process shows its progress, and only on a terminal."""
    return True if jax.process_index() else None
