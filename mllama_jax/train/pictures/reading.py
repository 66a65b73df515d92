"""What the vision encoder learns beside the answers: a linear reading of its features tells what lies at each patch.

A small model that begins from nothing finds out where to look long before answers alone would teach it. The reading is
trained with the model and left behind.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mllama_jax.config import MllamaConfig
from mllama_jax.model.mllama import MllamaModel, Params
from mllama_jax.train.batch import IGNORED
from mllama_jax.train.loss import cross_entropy, encode, log_likelihoods, own_tiles
from mllama_jax.train.pictures.drawn import PictureBatch
from mllama_jax.train.pictures.labels import CLASSES


def init_reading(config: MllamaConfig) -> jax.Array:
    """A reading [D, classes of all aspects] that holds all classes equally likely."""
    return jnp.zeros((config.text.width, sum(CLASSES.values())))


def supervised_with_patches(
    model: MllamaModel, params: Params, reading: jax.Array, batch: PictureBatch, weight: float
) -> tuple[jax.Array, jax.Array]:
    """`supervised`, each label's loss with `weight` times the mean cross-entropy of every aspect of the patches."""
    features = encode(model, params, batch)
    answers = -log_likelihoods(model, params, batch, own_tiles(features, len(batch.tokens))).sum()
    logits = features[:, :, 1:].astype(jnp.float32) @ reading  # without the class token
    aspects = jnp.split(logits, np.cumsum([*CLASSES.values()])[:-1], axis=-1)
    seen = sum(cross_entropy(aspect, batch.patches[..., i]) for i, aspect in enumerate(aspects))
    count = jnp.sum(batch.labels != IGNORED).astype(jnp.float32)
    return answers + weight * seen * count, count
