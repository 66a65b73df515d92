"""The text decoder: Llama 3.1's self-attention layers with cross-attention layers between them."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from mllama_jax.config import TextConfig
from mllama_jax.model.adapter import CrossAttentionLayer
from mllama_jax.model.attention import UpTo, attention
from mllama_jax.model.cache import CrossCache, KVCache
from mllama_jax.model.einsum import einsum
from mllama_jax.model.layers import (
    Constrain,
    Linear,
    Remat,
    RMSNorm,
    SwiGLU,
    keep_all,
    parameter,
    rotary_frequencies,
    rotate,
    run,
    unconstrained,
)


class SelfAttention(nn.Module):
    """Causal grouped-query attention with rotary positions over a cache."""

    config: TextConfig
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(self, x: jax.Array, cache: KVCache, positions: jax.Array) -> tuple[jax.Array, KVCache]:
        c = self.config
        K, G, H, D = c.kv_heads, c.heads // c.kv_heads, c.head_dim, c.width
        linear = functools.partial(Linear, constrain=self.constrain)
        q = linear("btd,kghd->btkgh", (K, G, H, D), ("kv_heads", "q_heads", "head_dim", "embed"), name="q")(x)
        kv = linear("btd,ckhd->btckh", (2, K, H, D), (None, "kv_heads", "head_dim", "embed"), name="kv")(x)
        frequencies = rotary_frequencies(H, c.rope_theta, c.rope_scaling)
        q, k = rotate(q, positions, frequencies), rotate(kv[:, :, 0], positions, frequencies)
        own, fresh = cache.like(k, kv[:, :, 1]), cache.fresh
        cache = cache.write(own, positions).placed(self.constrain)
        q = self.constrain(q, "batch", "seq", "kv_heads", "queries", "head_dim")
        if fresh:
            y = attention(q, own.k, own.v, positions, UpTo(x.shape[1], first=True), constrain=self.constrain)
        else:
            axes = ("batch", "kv_heads", "queries", "cache")
            y = attention(q, cache.k, cache.v, positions, UpTo(cache.length), constrain=self.constrain, axes=axes)
        y = self.constrain(rearrange(y, "b t k g h -> b t (k g h)"), "batch", "seq", "heads")
        y = linear("btf,df->btd", (D, K * G * H), ("embed", "heads"), name="out")(y)
        return self.constrain(y, "batch", "seq", "residual"), cache


class SelfAttentionLayer(nn.Module):
    """A pre-norm Llama layer."""

    config: TextConfig
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(self, x: jax.Array, cache: KVCache, positions: jax.Array) -> tuple[jax.Array, KVCache]:
        c = self.config
        y = RMSNorm(c.norm_eps, name="attention_norm")(x)
        y, cache = SelfAttention(c, self.constrain, name="attention")(y, cache, positions)
        x = x + y
        return x + SwiGLU(c.hidden, self.constrain, name="mlp")(RMSNorm(c.norm_eps, name="mlp_norm")(x)), cache


class Decoder(nn.Module):
    """Tokens to hidden states to logits. Without a CrossCache the cross-attention layers are skipped, exactly."""

    config: TextConfig
    dtype: jnp.dtype
    constrain: Constrain = unconstrained
    remat: Remat = keep_all

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(0.02)
        self.embedding = parameter(
            self, "embedding", init, (c.vocab + c.extra_embeddings, c.width), (None, "embedding")
        )
        if not c.tied:
            self.head = Linear("...d,vd->...v", (c.vocab, c.width), ("vocab", "embed"), constrain=self.constrain)
        self.layers = [
            (CrossAttentionLayer if i in c.cross_layers else SelfAttentionLayer)(c, self.constrain)
            for i in range(c.layers)
        ]
        self.final_norm = RMSNorm(c.norm_eps)

    def keys_values(self, features: jax.Array) -> tuple[KVCache, ...]:
        """Projected features [B, M, N', D] -> keys and values for each cross-attention layer."""
        return tuple(self.layers[i].keys_values(features) for i in self.config.cross_layers)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, cache: tuple[KVCache, ...], cross: CrossCache | None
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """Run tokens int [B, T] at positions int [B, T]; returns normed states [B, T, D] and the cache they extend."""
        x = self._gathered(self.embedding.astype(self.dtype)[tokens], "embedding")
        x = self.constrain(x, "batch", "seq", "residual")
        self.sow("intermediates", "embedded", x)
        selves = iter(cache)
        crosses = iter(cross.layers if cross is not None else ())
        written = []
        for i, layer in enumerate(self.layers):
            if isinstance(layer, SelfAttentionLayer):
                x, layer_cache = self.remat(run)(layer, x, next(selves), positions)
                written.append(layer_cache)
            elif cross is not None:
                x = self.remat(run)(layer, x, next(crosses), cross, positions)
            self.sow("intermediates", f"layer_{i}", x)
        x = self.final_norm(x)
        self.sow("intermediates", "norm", x)
        return x, tuple(written)

    def logits(self, x: jax.Array) -> jax.Array:
        """Hidden states [..., D] -> float32 logits [..., V]."""
        if self.config.tied:
            y = einsum("...d,vd->...v", x, self.embedding[: self.config.vocab].astype(x.dtype))
        else:
            y = self.head(x)
        y = self.constrain(y, "batch", *("seq",) * (y.ndim - 2), "vocab")  # else the head's kernel would be gathered
        if y.ndim == 2:  # one position a row: sampling looks at all of its logits again and again
            y = self.constrain(self._gathered(y, "vocab"), "batch", None)
        return y.astype(jnp.float32)

    def _gathered(self, x: jax.Array, axis: str) -> jax.Array:
        """x, of which a mesh may split the last axis, whole where devices send it to their peers."""
        if self.constrain.peers is None:
            return x
        from mllama_jax.model.gpu_peers import gathered

        return gathered(x, axis, self.constrain)
