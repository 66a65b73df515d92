"""A page to look through wrong answers with their pictures: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from mllama_jax.errors import InputError
from mllama_jax.evaluate.data import Row
from mllama_jax.evaluate.folder import Record
from mllama_jax.evaluate.recipe import Recipe
from mllama_jax.evaluate.report import RIGHT

SHOWN = 300  # wrong answers at most, such that a browser opens the page
SIDE = 560  # pixels of a picture at most


def write_page(
    file: Path,
    result: Mapping[str, Any],
    records: Sequence[Record],
    rows: Sequence[Row],
    recipe: Recipe,
    comparison: str | None,
) -> None:
    """Write the page, its wrong answers in the order of the data. Raises InputError where it cannot be written."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    wrong = [(record, row) for record, row in zip(records, rows, strict=True) if record["score"] < RIGHT]
    shown = [
        record | {"question": row.question, "pictures": [data_uri(picture) for picture in row.pictures(recipe)]}
        for record, row in wrong[:SHOWN]
    ]
    page = environment.get_template("page.html.jinja").render(
        result=result,
        configuration=result["configuration"],
        task=result["configuration"]["task"],
        wrong=len(wrong),
        shown=shown,
        comparison=comparison,
    )
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--html: {file}: cannot be written: {error.strerror}; choose another place") from None


def data_uri(picture: Image.Image) -> str:
    """A picture inside the page, made small where it is large."""
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    small.save(content, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
