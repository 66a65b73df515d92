"""The adapter: the projector from vision features to the decoder's width, and the gated cross-attention layers."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from mllama_jax.config import TextConfig
from mllama_jax.model.attention import attention
from mllama_jax.model.cache import CrossCache, KVCache
from mllama_jax.model.layers import Constrain, Linear, RMSNorm, SwiGLU, parameter, unconstrained


class Projector(nn.Module):
    """Vision features [..., C, N, E] -> the decoder's width [..., C, N, D]."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, axes = (self.width, x.shape[-1]), ("embed", "features")
        return Linear("...e,de->...d", shape, axes, bias=True, name="linear")(x)


class CrossAttention(nn.Module):
    """Attention from text to tiles: no rotary positions, RMS norms on queries and keys over the head width."""

    config: TextConfig
    constrain: Constrain = unconstrained

    def setup(self) -> None:
        c = self.config
        K, G, H, D = c.kv_heads, c.heads // c.kv_heads, c.head_dim, c.width
        linear = functools.partial(Linear, constrain=self.constrain)
        self.q = linear("btd,kghd->btkgh", (K, G, H, D), ("kv_heads", "q_heads", "head_dim", "embed"))
        self.kv = linear("bsd,ckhd->bsckh", (2, K, H, D), (None, "kv_heads", "head_dim", "embed"))
        self.out = linear("btf,df->btd", (D, K * G * H), ("embed", "heads"))
        self.q_norm, self.k_norm = RMSNorm(c.norm_eps), RMSNorm(c.norm_eps)

    def keys_values(self, features: jax.Array) -> KVCache:
        """Projected features [B, M, N', D] -> keys and values [B, K, M*N', H], computed once for all text."""
        kv = self.kv(rearrange(features, "b m n d -> b (m n) d"))
        k, v = (jnp.swapaxes(x, 1, 2) for x in (self.k_norm(kv[:, :, 0]), kv[:, :, 1]))
        return KVCache(k, v).placed(self.constrain, "image_seq")

    def __call__(self, x: jax.Array, cache: KVCache, cross: CrossCache, positions: jax.Array) -> jax.Array:
        """Attend from x [B, T, D] at positions int [B, T] to the tiles these see; zero where they see none."""
        q = self.constrain(self.q_norm(self.q(x)), "batch", "seq", "kv_heads", "queries", "head_dim")
        self.sow("queries", "normed", q)
        axes = ("batch", "kv_heads", "queries", "image_seq")
        y = attention(q, cache.k, cache.v, positions, cross.visible, constrain=self.constrain, axes=axes)
        y = y * cross.sees(positions)[:, :, None, None, None].astype(y.dtype)
        y = self.constrain(rearrange(y, "b t k g h -> b t (k g h)"), "batch", "seq", "heads")
        return self.constrain(self.out(y), "batch", "seq", "residual")


class CrossAttentionLayer(nn.Module):
    """`x + tanh(g) * attention`, then `x + tanh(g') * MLP`; both vanish at a position that sees no picture."""

    config: TextConfig
    constrain: Constrain = unconstrained

    def setup(self) -> None:
        c = self.config
        self.attention_norm, self.mlp_norm = RMSNorm(c.norm_eps), RMSNorm(c.norm_eps)
        self.attention = CrossAttention(c, self.constrain)
        self.mlp = SwiGLU(c.hidden, self.constrain)
        self.attention_gate = parameter(self, "attention_gate", nn.initializers.zeros, (1,), (None,))
        self.mlp_gate = parameter(self, "mlp_gate", nn.initializers.zeros, (1,), (None,))

    def keys_values(self, features: jax.Array) -> KVCache:
        return self.attention.keys_values(features)

    def __call__(self, x: jax.Array, cache: KVCache, cross: CrossCache, positions: jax.Array) -> jax.Array:
        y = self.attention(self.attention_norm(x), cache, cross, positions)
        x = x + jnp.tanh(self.attention_gate.astype(x.dtype)) * y
        sees = cross.sees(positions)[:, :, None].astype(x.dtype)
        return x + jnp.tanh(self.mlp_gate.astype(x.dtype)) * sees * self.mlp(self.mlp_norm(x))
