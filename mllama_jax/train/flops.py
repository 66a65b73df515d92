"""How many operations a step has to do, by arithmetic: what its time is measured against (MFU)."""

from __future__ import annotations

import functools
import math

from mllama_jax.config import MllamaConfig
from mllama_jax.train.batch import Batch
from mllama_jax.train.parts import Path, is_adapted, is_trained, kernels
from mllama_jax.train.recipe import Recipe


def step_flops(config: MllamaConfig, recipe: Recipe, batches: Batch) -> float:
    """Operations of a step's products with kernels and of attention; what remat does again does not count.

    A parameter of a kernel costs 2 a position forward, 2 for the gradient of its input where something at or below its
    depth is trained (keys and values of pictures have the projector below them), 2 for its own gradient where it is
    trained itself. Low-rank additions count nothing.
    """
    return _flops(config, recipe, batches.tokens.shape, batches.ratio_ids.size)


@functools.lru_cache  # a walk over all parameters, which a step's shapes decide
def _flops(config: MllamaConfig, recipe: Recipe, shape: tuple[int, ...], pictures: int) -> float:
    c, vision = config.text, config.vision
    text = math.prod(shape)
    seen = pictures * vision.max_tiles * vision.tokens if vision is not None else 0
    cross = {f"layers_{i}" for i in c.cross_layers}

    def depth(path: Path) -> int:
        """vision, projector, the decoder's layers, its head"""
        return -1 if path[0] != "text" else int(path[1].removeprefix("layers_")) if path[1] != "head" else c.layers

    def learns(path: Path) -> bool:
        return is_adapted(recipe.lora, path) if recipe.part == "lora" else is_trained(config, recipe.part, path)

    maps = kernels(config)
    lowest = min(depth(path) for path in maps if learns(path))
    total = 0.0
    for path, kernel in maps.items():
        of_pictures = path[0] != "text" or (path[1] in cross and path[-1] == "kv")
        positions = seen if of_pictures else text
        if path[1] not in cross or pictures:
            passes = 1 + ((-1 if of_pictures else depth(path)) >= lowest) + is_trained(config, recipe.part, path)
            total += 2 * math.prod(kernel.value.shape) * positions * passes
    rows = math.prod(shape[:-1])
    for i in range(c.layers):
        keys = seen / rows if i in c.cross_layers else text / rows / 2
        total += 4 * text * keys * c.heads * c.head_dim * (3 if i >= lowest else 1)
    if vision is not None:
        span = vision.max_tiles * vision.padded_tokens
        blocks = vision.layers + vision.global_layers
        total += 4 * pictures * span**2 * vision.width * blocks * (3 if lowest < 0 else 1)
    return total
