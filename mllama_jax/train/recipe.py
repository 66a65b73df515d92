"""What is trained on what, and how: a recipe, read from a TOML file."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import optax

from mllama_jax.config import QUANTIZATIONS
from mllama_jax.convert.store import is_bucket
from mllama_jax.errors import InputError
from mllama_jax.model.layers import REMAT
from mllama_jax.sharding.rules import PRESETS
from mllama_jax.train.chats import TooLong
from mllama_jax.train.parts import Lora, Part

ONE_OF = {
    "part": typing.get_args(Part),
    "loss": ("supervised", "preference"),
    "too_long": typing.get_args(TooLong),
    "dtype": ("bfloat16", "float32"),
    "quantize": (None, *QUANTIZATIONS),
    "remat": tuple(REMAT),
    "preset": (None, *PRESETS),
}
POSITIVE = ("steps", "samples", "accumulate", "length", "save_every", "keep", "learning_rate", "clip", "beta")
ONLY_BESIDE = {"lora": ("part", "lora"), "beta": ("loss", "preference")}  # else without effect
FAMILIES = ("scenes", "charts", "text", "pairs")


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures to learn from that are drawn as training goes, with dialogues about them (`mllama_jax.train.pictures`).

    Attributes:
        scenes, charts, text, pairs: how often each family occurs, beside the others.
        patches: how much the vision encoder's learning what lies at each patch weighs, beside the answers.
    """

    scenes: int = 0
    charts: int = 0
    text: int = 0
    pairs: int = 0
    patches: float = 0.5

    def __post_init__(self) -> None:
        for name in (*FAMILIES, "patches"):
            if (value := getattr(self, name)) < 0:
                raise InputError(f"pictures.{name}: expected at least 0, got {value}")
        if not self.families():
            raise InputError(f"pictures: expected some of {', '.join(FAMILIES)}, got none")

    def families(self) -> list[str]:
        """Every family as often as it occurs."""
        return [name for name in FAMILIES for _ in range(getattr(self, name))]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training run. Paths are relative to the recipe's file.

    Attributes:
        model: checkpoint directory that training begins from.
        data, held_out: chats in JSON Lines, see `chats`; those held out are scored before each checkpoint.
        pictures: what is drawn and learned from in place of `data`.
        part: what is trained: `adapter` (vision encoder, projector, cross-attention), `lora`, or `full`.
        loss: `supervised` (the assistant's tokens) or `preference` (DPO with `beta`, on chosen and rejected answers).
        steps: how many updates, each of `samples` chats, `accumulate` times.
        length: the most tokens of a chat; a longer one is left out (`drop`) or cut behind (`cut`).
        learning_rate: its peak, after a linear `warmup` (a part of the steps), before a cosine down to nothing.
        weight_decay, b2, clip: AdamW's decay, of matrices only, how much of its mean of squares a step keeps, and the
            most that the gradient's norm may be.
        dtype: of the computation and of frozen parameters; what is trained is float32.
        quantize: what the decoder's frozen kernels are kept in, as `load` takes it; for `lora`.
        remat: what the backward pass does again of each `layer`: all, all but its products (`dots`), or `nothing`.
        preset: how a mesh of all devices is used: `fsdp`, `fsdp+tensor` ...; one device by default.
        save_every, keep: checkpoints; the last and the best `keep` stay.
        workers: processes that make batches; threads of the one that trains do where there are none.
    """

    model: str
    part: Part
    steps: int
    data: str | None = None
    pictures: Pictures | None = None
    held_out: str | None = None
    loss: str = "supervised"
    samples: int = 8
    accumulate: int = 1
    length: int = 2048
    too_long: TooLong = "drop"
    learning_rate: float = 1e-4
    warmup: float = 0.03
    weight_decay: float = 0.0
    b2: float = 0.999
    clip: float = 1.0
    beta: float = 0.1
    dtype: str = "bfloat16"
    quantize: str | None = None
    remat: str = "layer"
    preset: str | None = None
    save_every: int = 100
    keep: int = 2
    workers: int = 0
    seed: int = 0
    lora: Lora = dataclasses.field(default_factory=Lora)

    def __post_init__(self) -> None:
        for name, known in ONE_OF.items():
            if (value := getattr(self, name)) not in known:
                raise InputError(f"{name}: expected {', '.join(map(str, filter(None, known)))}, got {value!r}")
        for name in POSITIVE:
            if (value := getattr(self, name)) <= 0:
                raise InputError(f"{name}: expected more than 0, got {value}")
        if (self.data is None) == (self.pictures is None):
            raise InputError(
                "data: missing; a recipe has to say it, or have a table [pictures]"
                if self.data is None
                else "pictures: drawn in place of data; expected one of the two, got both"
            )
        if self.pictures is not None and self.loss != "supervised":
            raise InputError(f"pictures: dialogues with one answer; expected loss 'supervised', got {self.loss!r}")
        for name in ("workers", "weight_decay", "seed"):
            if (value := getattr(self, name)) < 0:
                raise InputError(f"{name}: expected at least 0, got {value}")
        if not 0 < self.b2 < 1:
            raise InputError(f"b2: expected a part between 0 and 1, got {self.b2}")
        if not 0 <= self.warmup < 1:
            raise InputError(f"warmup: expected a part of the steps, from 0 to below 1, got {self.warmup}")
        if self.quantize and self.part != "lora":
            raise InputError(
                f"quantize: {self.quantize} kernels cannot be trained; expected part 'lora', got {self.part!r}"
            )

    @property
    def rows(self) -> int:
        """Of a chat: its one answer, or the chosen and the rejected one."""
        return 2 if self.loss == "preference" else 1

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with float32 moments; what clips comes first."""
        schedule = optax.warmup_cosine_decay_schedule(0, self.learning_rate, int(self.warmup * self.steps), self.steps)

        def matrices(params: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

        adam = optax.adamw(schedule, b2=self.b2, weight_decay=self.weight_decay, mask=matrices)
        return optax.chain(optax.clip_by_global_norm(self.clip), adam)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file. Raises InputError."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; expected a recipe in TOML") from None
    except ValueError as error:
        raise InputError(f"{path}: expected TOML, got an error at '{error}'") from None
    try:
        recipe = _fill(Recipe, content, "")
        _check_effects(recipe, content.keys())
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    places = {
        name: value if is_bucket(value) else str(path.parent / value)
        for name in ("model", "data", "held_out")
        if (value := getattr(recipe, name))
    }
    return dataclasses.replace(recipe, **places)


def _check_effects(recipe: Recipe, given: Collection[str]) -> None:
    """Refuse a setting that is given and does nothing."""
    for name, (other, value) in ONLY_BESIDE.items():
        if name in given and (got := getattr(recipe, other)) != value:
            raise InputError(f"{name}: does nothing beside {other} {got!r}; leave it out, or choose {other} {value!r}")
    if "too_long" in given and recipe.data is recipe.held_out is None:
        raise InputError("too_long: does nothing where all chats are drawn, which are never too long; leave it out")


def _fill(kind: type, content: Any, prefix: str) -> Any:
    """A dataclass from a table of the same fields."""
    if not isinstance(content, dict):
        raise InputError(f"{prefix.rstrip('.')}: expected a table, got {type(content).__name__}")
    fields, hints = {field.name: field for field in dataclasses.fields(kind)}, typing.get_type_hints(kind)
    if unknown := sorted(content.keys() - fields.keys()):
        raise InputError(f"{prefix}{unknown[0]}: not known; known are {', '.join(fields)}")
    needed = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in needed if name not in content]:
        raise InputError(f"{prefix}{missing[0]}: missing; a recipe has to say it")
    values = {}
    for name, value in content.items():
        hint = hints[name]
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if dataclasses.is_dataclass(kinds[0]):
            values[name] = _fill(kinds[0], value, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]
            continue
        wanted = str if str in kinds or typing.get_origin(hint) is typing.Literal else kinds[0]
        if isinstance(value, bool) or not isinstance(value, (int, float) if wanted is float else wanted):
            raise InputError(f"{prefix}{name}: expected {wanted.__name__}, got {value!r}")
        values[name] = wanted(value)
    return kind(**values)
