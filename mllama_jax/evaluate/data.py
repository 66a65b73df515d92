"""Rows of a local data set: a .jsonl file with pictures beside it, or .parquet files as on huggingface.co."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mllama_jax.errors import InputError
from mllama_jax.evaluate.recipe import Fields, Recipe
from mllama_jax.processing.image import open_image

NAMED = 8  # of the rows that cannot be used
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
GAP = 16  # pixels between pictures that are stitched


@dataclasses.dataclass(frozen=True)
class Row:
    """A question. `images` are paths or the bytes of files; `answers` are labels where there are options."""

    id: str
    where: str
    question: str
    images: tuple[Path | bytes, ...] = dataclasses.field(repr=False)
    answers: tuple[str, ...]
    options: tuple[str, ...]
    group: str

    def pictures(self, recipe: Recipe) -> list[Image.Image]:
        """The pictures as the recipe shows them; InputError where one cannot be opened."""
        try:
            opened = [open_image(image) for image in self.images]
        except InputError as error:
            raise InputError(f"{self.where}: {error}") from None
        return [stitched(opened)] if recipe.stitch and len(opened) > 1 else opened

    def text(self, recipe: Recipe) -> str:
        """What stands behind the pictures."""
        pairs = zip(recipe.labels, self.options, strict=False)
        prompt = recipe.prompt if self.options else recipe.open_prompt or recipe.prompt
        options = "\n".join(f"{label}. {option}" for label, option in pairs)
        return prompt.format(question=self.question, options=options)

    def conversation(self, recipe: Recipe, pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """Pictures first, for text before a picture cannot see it."""
        content: list[dict[str, Any]] = []
        for picture, ordinal in zip(pictures, ORDINALS[: len(pictures)], strict=True):
            content.append({"type": "image", "image": picture})
            if recipe.caption and len(pictures) > 1:
                content.append({"type": "text", "text": recipe.caption.format(ordinal=ordinal)})
        content.append({"type": "text", "text": self.text(recipe)})
        return [{"role": "user", "content": content}]


def stitched(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side on white."""
    width = sum(image.width for image in images) + GAP * (len(images) - 1)
    sheet, left = Image.new("RGB", (width, max(image.height for image in images)), "white"), 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + GAP
    return sheet


def read_rows(files: Sequence[Path], recipe: Recipe, limit: int | None = None) -> list[Row]:
    """All rows of the files, or the first `limit`.

    Raises:
        InputError: a file cannot be read, or there are rows that cannot be used, which are counted and named.
    """
    rows: list[Row] = []
    bad: list[str] = []
    seen: dict[str, str] = {}
    for number, (where, folder, content) in enumerate(_records(files)):
        if limit is not None and number >= limit:
            break
        try:
            row = _row(content, recipe, where, folder, number)
            if row.id in seen:
                raise InputError(f"id {row.id!r} is that of {seen[row.id]} too")
            seen[row.id] = where
            rows.append(row)
        except InputError as error:
            bad.append(f"{where}: {error}")
    if bad:
        more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise InputError(
            f"{len(bad)} of {len(rows) + len(bad)} rows cannot be used: {'; '.join(bad[:NAMED])}{more}; mend them"
        )
    if not rows:
        raise InputError(f"{', '.join(map(str, files))}: no rows; expected at least one")
    return rows


def digest(files: Sequence[Path]) -> str:
    """SHA-256 of the files one behind the other."""
    found = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()


# ---- Files --------------------------------------------------------------------------------------------------------


def _records(files: Sequence[Path]) -> Iterator[tuple[str, Path, Any]]:
    """Each row's name, the folder that its paths start from, and its columns, or the text of a line that is no JSON."""
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: no such file; expected .jsonl or .parquet")
        if file.suffix == ".parquet":
            yield from ((f"{file.name} row {i}", file.parent, row) for i, row in enumerate(_parquet(file)))
        elif file.suffix == ".jsonl":
            for i, line in enumerate(io.BytesIO(file.read_bytes()), start=1):
                if line.strip():
                    yield f"{file.name} line {i}", file.parent, line
        else:
            raise InputError(f"{file}: expected .jsonl or .parquet, got {file.suffix or 'no suffix'}")


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{file}: reading it needs pyarrow: pip install 'mllama-jax[eval]'") from None
    try:
        for batch in ParquetFile(file).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise InputError(f"{file}: is no whole parquet file ({' '.join(str(error).split())}); fetch it again") from None


# ---- Rows ---------------------------------------------------------------------------------------------------------


def _row(content: Any, recipe: Recipe, where: str, folder: Path, number: int) -> Row:
    if isinstance(content, bytes):
        try:
            content = json.loads(content)
        except ValueError as error:
            raise InputError(f"is no JSON ({error})") from None
    if not isinstance(content, Mapping):
        raise InputError(f"expected an object, got {type(content).__name__}")
    fields: Fields = recipe.fields
    named = [fields.question, fields.answers, fields.id, fields.options, fields.group]
    images = [name for name in fields.images if name in content]
    missing = [name for name in named if name is not None and name not in content]
    if fields.images and not images:
        missing.append(fields.images[0])
    if missing:
        raise InputError(f"has no {', '.join(missing)}; its fields are {', '.join(content)}")
    options = _texts(content[fields.options], "options") if fields.options else ()
    if len(options) > len(recipe.labels):
        raise InputError(f"has {len(options)} options for {len(recipe.labels)} labels")
    question = content[fields.question]
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{fields.question}: expected a question, got {question!r}")
    pictures = tuple(picture for name in images for picture in _pictures(content[name], name, folder))
    if fields.images and not pictures:
        raise InputError(f"{', '.join(images)}: no picture")
    if len(pictures) > len(ORDINALS):
        raise InputError(f"{', '.join(images)}: {len(pictures)} pictures; expected at most {len(ORDINALS)}")
    return Row(
        id=str(number if fields.id is None else content[fields.id]),
        where=where,
        question=question,
        images=pictures,
        answers=_answers(content[fields.answers], recipe, options),
        options=options,
        group="" if fields.group is None else str(content[fields.group]),
    )


def _texts(value: Any, name: str) -> tuple[str, ...]:
    """Of a text, a number, a list, a list of {"answer": ...} as VQA v2 has, or a list that is written as text."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = [value]
    values = [] if value is None else value if isinstance(value, list | tuple) else [value]
    values = [each.get("answer") if isinstance(each, Mapping) else each for each in values]
    if not all(isinstance(each, str | int | float) for each in values):
        raise InputError(f"{name}: expected text or a list of texts, got {value!r}")
    return tuple(map(str, values))


def _answers(value: Any, recipe: Recipe, options: Sequence[str]) -> tuple[str, ...]:
    """The right answers; the label of one that is among options."""
    name = recipe.fields.answers
    answers = _texts(value, name)
    if not answers or not all(answer.strip() for answer in answers):
        raise InputError(f"{name}: empty answer")
    if not options:
        return answers
    labels = list(recipe.labels[: len(options)])
    by_name = {
        "label": dict(zip(labels, labels, strict=True)),
        "index": {str(i): label for i, label in enumerate(labels)},
        "text": dict(zip(options, labels, strict=True)),
    }[recipe.answer_is]
    if unknown := [answer for answer in answers if answer not in by_name]:
        raise InputError(f"{name}: expected one of {', '.join(by_name)}, got {unknown[0]!r}")
    return tuple(by_name[answer] for answer in answers)


def _pictures(value: Any, name: str, folder: Path) -> Iterator[Path | bytes]:
    if value is None:
        return
    if isinstance(value, list | tuple):
        for each in value:
            yield from _pictures(each, name, folder)
    elif isinstance(value, bytes):
        yield value
    elif isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        yield value["bytes"]
    elif isinstance(path := value.get("path") if isinstance(value, Mapping) else value, str):
        if not (folder / path).is_file():
            raise InputError(f"{name}: {folder / path}: no such picture")
        yield folder / path
    else:
        raise InputError(f"{name}: expected the path or bytes of a picture, got {type(value).__name__}")
