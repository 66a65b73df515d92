"""A recipe: how the questions of a data set are asked and scored. Those that are known are files in `recipes/`."""

from __future__ import annotations

import dataclasses
import re
import string
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllama_jax.errors import InputError
from mllama_jax.evaluate.metrics import METRICS, choose

RECIPES = Path(__file__).parent / "recipes"
ANSWER_IS = ("label", "index", "text")


@dataclasses.dataclass(frozen=True)
class Fields:
    """Which column of the data holds what; None where there is none.

    Attributes:
        images: columns of a picture or a list of pictures each, in the order in which they are shown.
        id: tells rows apart; their number otherwise.
        options: of multiple choice; a row without any is a free question.
        group: by which scores are broken down.
    """

    question: str = "question"
    answers: str = "answer"
    images: tuple[str, ...] = ("image",)
    id: str | None = None
    options: str | None = None
    group: str | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How questions are asked and scored.

    Attributes:
        source: where prompt, limit and data are from.
        prompt: the user's text behind the pictures, with {question} and {options}.
        open_prompt: the same for rows without options; `prompt` where empty.
        max_new_tokens: of an answer.
        extract: regular expressions for where in the text the answer stands: the last match of the first that matches.
        metric: for rows without options, one of METRICS.
        labels: of the options, a character each.
        answer_is: what the data give as the answer of a multiple choice: its label, its index from 0, or its text.
        stitch: join the pictures of a question into one.
        caption: text behind each picture where there are several, with {ordinal}.
        published: scores in per cent, by the model's name.
    """

    name: str
    source: str
    prompt: str
    max_new_tokens: int
    fields: Fields = dataclasses.field(default_factory=Fields)
    open_prompt: str = ""
    extract: tuple[str, ...] = ()
    metric: str = "exact_match"
    labels: str = string.ascii_uppercase
    answer_is: str = "label"
    stitch: bool = False
    caption: str = ""
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def score(self, text: str, answers: Sequence[str], options: Sequence[str]) -> tuple[str, float]:
        """What counts of an answer's text, and its score."""
        found: list[str] = []
        for pattern in self.extract:
            found = found or [match[1] for match in re.finditer(pattern, text)]
        answer = found[-1].strip() if found else text.strip()
        if not options:
            return answer, METRICS[self.metric](answer, answers)
        label = choose(answer, self.labels[: len(options)], options)
        return label or "", float(label in answers)


def known() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_recipe(name: str) -> Recipe:
    """The recipe of a task that is known, or of a TOML file.

    A file's `base` names a recipe whose keys it overrides.

    Raises:
        InputError: there is none, or it has a key that is not known, lacks one, or has a value of another kind.
    """
    content = _read(name)
    fields = content.pop("fields", {})
    for where, keys, kind in ((f"task {name}", content, Recipe), (f"task {name}: fields", fields, Fields)):
        names = [field.name for field in dataclasses.fields(kind) if field.name != "name"]
        if unknown := sorted(set(keys) - set(names)):
            raise InputError(f"{where}: {', '.join(unknown)} is not known; known are {', '.join(names)}")
        for field in dataclasses.fields(kind):
            if field.name in keys:
                _check_kind(f"{where}: {field.name}", keys[field.name], str(field.type))
    if missing := [key for key in ("source", "prompt", "max_new_tokens") if key not in content]:
        raise InputError(f"task {name}: {', '.join(missing)} is missing; give it, or a base that has it")
    for keys, key in ((content, "extract"), (fields, "images")):
        if key in keys:
            keys[key] = tuple(keys[key])
    recipe = Recipe(name=Path(name).stem, fields=Fields(**fields), **content)
    _check(recipe)
    return recipe


def _read(name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The keys of a file over those of its base; `above` are the files that are based on it."""
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"task {name}: is not there; known are {', '.join(known())}, or give a .toml file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"task {name}: cannot be read: {error}; expected a TOML file") from None
    for key, kind in (("base", "str"), ("fields", "Fields")):
        if key in content:
            _check_kind(f"task {name}: {key}", content[key], kind)
    if (base := content.pop("base", None)) is None:
        return content
    if base in (*above, name):
        raise InputError(f"task {name}: base {base} leads back to itself; name another")
    under = _read(base, (*above, name))
    return under | content | {"fields": under.get("fields", {}) | content.get("fields", {})}


_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "str": (str, "text"),
    "str | None": (str, "text"),
    "int": (int, "a number"),
    "bool": (bool, "true or false"),
    "tuple[str, ...]": (list, "a list of texts"),
    "Mapping[str, float]": (dict, "a table of numbers"),
    "Fields": (dict, "a table of columns"),
}


def _check_kind(where: str, value: Any, kind: str) -> None:
    if kind not in _KINDS:
        return
    expected, told = _KINDS[kind]
    if not isinstance(value, expected):
        raise InputError(f"{where}: expected {told}, got {value!r}")
    inner = value if kind == "tuple[str, ...]" else value.values() if kind == "Mapping[str, float]" else ()
    inside = str if kind == "tuple[str, ...]" else (int, float)
    if not all(isinstance(each, inside) for each in inner):
        raise InputError(f"{where}: expected {told}, got {value!r}")


def _check(recipe: Recipe) -> None:
    where = f"task {recipe.name}"
    for key, value, choices in (
        ("metric", recipe.metric, METRICS),
        ("answer_is", recipe.answer_is, ANSWER_IS),
    ):
        if value not in choices:
            raise InputError(f"{where}: {key}: expected {', '.join(choices)}, got {value!r}")
    if recipe.max_new_tokens < 1:
        raise InputError(f"{where}: max_new_tokens: expected at least 1, got {recipe.max_new_tokens}")
    for key, allowed in (("prompt", "question options"), ("open_prompt", "question"), ("caption", "ordinal")):
        try:
            found = {name for _, name, _, _ in string.Formatter().parse(getattr(recipe, key)) if name is not None}
        except ValueError as error:
            raise InputError(f"{where}: {key}: {error}; double a brace that is meant as text") from None
        if unknown := sorted(found - set(allowed.split())):
            expected = " or ".join(f"{{{name}}}" for name in allowed.split())
            raise InputError(f"{where}: {key}: expected {expected}, got {{{unknown[0]}}}")
    for pattern in recipe.extract:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise InputError(f"{where}: extract: {pattern!r}: {error}") from None
        if groups != 1:
            raise InputError(f"{where}: extract: {pattern!r}: expected one group in brackets, got {groups}")
