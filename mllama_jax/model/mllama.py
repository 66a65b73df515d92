"""Llama 3.2 Vision as one Linen module with three entry points: `encode`, `keys_values`, and the decoder step."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mllama_jax.config import MllamaConfig
from mllama_jax.model.adapter import Projector
from mllama_jax.model.cache import CrossCache, KVCache
from mllama_jax.model.decoder import Decoder
from mllama_jax.model.layers import Constrain, Remat, keep_all, unconstrained
from mllama_jax.model.quantize import QUANTIZERS, Int8, Quantizer, quantize_parameters
from mllama_jax.model.vision import VisionEncoder

Params = dict[str, Any]


class MllamaModel(nn.Module):
    """The whole model, computing in `dtype` whatever dtype the parameters have; caches too unless `cache` is "int8"."""

    config: MllamaConfig
    dtype: jnp.dtype = jnp.dtype("float32")
    constrain: Constrain = unconstrained
    remat: Remat = keep_all
    cache: str | None = None

    def setup(self) -> None:
        c = self.config
        if c.vision is not None:
            self.vision = VisionEncoder(c.vision, self.constrain, self.remat)
            self.projector = Projector(c.text.width)
        self.text = Decoder(c.text, self.dtype, self.constrain, self.remat)

    def encode(self, pixels: jax.Array, ratio_ids: jax.Array) -> jax.Array:
        """Normalised pixels [I, C, 3, P, P] and aspect ratio ids int [I] -> projected features [I, C, N, D]."""
        return self.projector(self.vision(pixels.astype(self.dtype), ratio_ids))

    def keys_values(self, features: jax.Array, spans: jax.Array) -> CrossCache:
        """Projected features of the rows' tiles [B, M, N, D] and their spans int [B, M, 2] -> a CrossCache."""
        tokens = features.shape[2]
        features = jnp.pad(features, ((0, 0), (0, 0), (0, -tokens % 8), (0, 0)))
        layers = self.text.keys_values(features)
        if self.cache:
            layers = tuple(layer.quantized().placed(self.constrain, "image_seq") for layer in layers)
        return CrossCache(layers, spans, tokens)

    @nn.nowrap
    def empty_layer(self, rows: int, length: int) -> KVCache:
        """No keys and values yet, [rows, K, length, H] of each."""
        shape = (rows, self.config.text.kv_heads, length, self.config.text.head_dim)

        def nothing() -> jax.Array | Int8:
            return (
                Int8(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1])) if self.cache else jnp.zeros(shape, self.dtype)
            )

        return KVCache(nothing(), nothing())

    @nn.nowrap
    def empty_cache(self, rows: int, length: int) -> tuple[KVCache, ...]:
        """An empty self-attention cache, an `empty_layer` for each self-attention layer."""
        return tuple(self.empty_layer(rows, length) for _ in self.config.text.self_layers)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, cache: tuple[KVCache, ...], cross: CrossCache | None
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """See `Decoder.__call__`."""
        return self.text(tokens, positions, cache, cross)

    def logits(self, x: jax.Array) -> jax.Array:
        """See `Decoder.logits`."""
        return self.text.logits(x)

    def touch(self) -> jax.Array:
        """Run every part once on the smallest input: what `init` traces to declare all parameters."""
        c, cross = self.config, None
        if c.vision is not None:
            pixels = jnp.zeros((1, c.vision.max_tiles, 3, c.vision.tile, c.vision.tile))
            features = self.encode(pixels, jnp.ones(1, jnp.int32))
            cross = self.keys_values(features, jnp.zeros((1, c.vision.max_tiles, 2), jnp.int32))
        tokens = jnp.zeros((1, 1), jnp.int32)
        x, _ = self(tokens, tokens, self.empty_cache(1, 1), cross)
        return self.logits(x)


def call(model: MllamaModel, params: Params, method: str, *args: Any) -> Any:
    """`model.method(*args)` with these parameters."""
    return model.apply({"params": params}, *args, method=method)


def init_parameters(config: MllamaConfig, key: jax.Array) -> Params:
    """Random float32 parameters."""
    return nn.unbox(MllamaModel(config).init(key, method="touch"))["params"]


def abstract_parameters(
    config: MllamaConfig, dtype: jax.typing.DTypeLike = "float32", quantize: str | None = None
) -> Params:
    """The tree of parameters as `jax.ShapeDtypeStruct` boxed with logical axis names; nothing is allocated."""
    tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), _traced(config))
    if quantize is None:
        return tree
    return quantize_parameters(tree, quantize, functools.partial(_abstract_pair, QUANTIZERS[quantize]))


@functools.lru_cache(maxsize=4)
def _traced(config: MllamaConfig) -> Params:
    return jax.eval_shape(lambda: MllamaModel(config).init(jax.random.key(0), method="touch"))["params"]


def _abstract_pair(
    quantizer: Quantizer, kernel: nn.LogicallyPartitioned
) -> tuple[nn.LogicallyPartitioned, nn.LogicallyPartitioned]:
    values, scale = jax.eval_shape(quantizer, kernel.value)
    return kernel.replace(value=values), kernel.replace(value=scale, names=kernel.names[: scale.ndim])
