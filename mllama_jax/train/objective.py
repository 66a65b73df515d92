"""What a recipe minimises, and how."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax

from mllama_jax.model.mllama import MllamaModel, Params
from mllama_jax.train.batch import Batch
from mllama_jax.train.loss import preference, supervised
from mllama_jax.train.parts import merge
from mllama_jax.train.pictures.drawn import PictureBatch
from mllama_jax.train.pictures.reading import supervised_with_patches
from mllama_jax.train.recipe import Recipe
from mllama_jax.train.step import tie_tiles

READING = "reading"  # of patches, among what is trained: no part of the model


@dataclasses.dataclass(frozen=True)
class Frozen:
    """What a step reads and never changes: the parameters that are not trained, and what DPO compares with."""

    params: Params
    reference: Params | None = None


jax.tree_util.register_dataclass(Frozen)


def part_loss(recipe: Recipe, model: MllamaModel, trained: Params, frozen: Frozen, batch: Batch) -> Any:
    """The sum of a batch's losses and how many they are, by the recipe."""
    own = {name: leaf for name, leaf in trained.items() if name != READING}
    params = merge(own, frozen.params, recipe.lora)
    if recipe.pictures is not None and isinstance(batch, PictureBatch):
        return supervised_with_patches(model, params, trained[READING], batch, recipe.pictures.patches)
    if frozen.reference is None:
        return supervised(model, params, batch)
    return preference(model, params, batch, merge(frozen.reference, frozen.params, recipe.lora), recipe.beta)


def optimizer_of(recipe: Recipe) -> optax.GradientTransformation:
    """The recipe's optimiser; gradients of tile tables are first made such that Meta's layout can hold the tables."""
    tie: Any = optax.stateless(lambda gradients, _: tie_tiles(gradients))  # pyright: ignore[reportArgumentType]
    return recipe.optimizer() if recipe.part == "lora" else optax.chain(tie, recipe.optimizer())
