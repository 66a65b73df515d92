"""What a training step reads."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mllama_jax.model.vision import TILES
from mllama_jax.processing.image import MEAN, STD
from mllama_jax.processing.tokenizer import Tokenizer

IGNORED = -1


@struct.dataclass
class Batch:
    """Rows to learn from.

    Attributes:
        tokens: int32 [B, T].
        labels: int32 [B, T], the token that follows, or IGNORED; never the image token, which the head cannot make.
        pixels: uint8 [I, C, 3, P, P], tiles before normalisation; the pictures of row 0, of row 1 ..., each I / B.
        ratio_ids: int32 [I]; 0 for a picture that is not there.
        spans: int32 [B, M, 2], from which text positions a row sees each of its tiles, M = I / B * C; (0, 0) for a tile
            that is not there.
    """

    tokens: jax.Array | np.ndarray
    labels: jax.Array | np.ndarray
    pixels: jax.Array | np.ndarray
    ratio_ids: jax.Array | np.ndarray
    spans: jax.Array | np.ndarray


def normalise(pixels: jax.Array, ratio_ids: jax.Array) -> jax.Array:
    """`processing.image.normalise` on the device, for tiles [I, C, 3, P, P]; padding tiles become zeros."""
    real = jnp.arange(pixels.shape[1]) < jnp.asarray(TILES)[ratio_ids][:, None]  # I C
    return (pixels / 255 - MEAN) / STD * real[:, :, None, None, None]


def answer_labels(tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """For each token of a conversation the next one where the assistant makes it (its answers and their ends)."""
    header = tokenizer.encode("<|start_header_id|>assistant<|end_header_id|>\n\n", specials=True)
    ends = {tokenizer.special(name) for name in ("<|eot_id|>", "<|eom_id|>")}
    labels, answering = [IGNORED] * len(tokens), False
    for i, token in enumerate(tokens):
        answering = (answering and token not in ends) or list(tokens[i + 1 - len(header) : i + 1]) == header
        if answering and i + 1 < len(tokens):
            labels[i] = tokens[i + 1]
    return labels
