"""The vision encoder: tiles to patches, local and gated global transformers, six concatenated features a token.

Follows ``VisionEncoder`` in llama-models. All tiles of an image attend jointly, padding included: a mask blocks padding
from padding only, so dropping padding before the last layer would change the result.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from mllama_jax.config import ASPECT_RATIOS, VisionConfig
from mllama_jax.model.attention import attention
from mllama_jax.model.gpu_attention import within
from mllama_jax.model.layers import (
    Constrain,
    LayerNorm,
    Linear,
    Remat,
    keep_all,
    on_hopper,
    parameter,
    run,
    unconstrained,
)

# Tiles behind each aspect ratio id; an absent image (id 0) counts one, as in Meta's code.
TILES = (1, *(h * w for h, w in ASPECT_RATIOS))


class SelfAttention(nn.Module):
    """Multi-head attention without biases; q, k and v are one kernel `[3, heads, H, D]`."""

    config: VisionConfig
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(self, x: jax.Array, padding: jax.Array) -> jax.Array:  # [I, S, D], bool [I, S]
        c = self.config
        shape, axes = (c.heads, c.head_dim, c.width), ("vision_heads", "head_dim", "embed")
        qkv = Linear("btd,ckhd->btckh", (3, *shape), (None, *axes), name="qkv")(x)
        if on_hopper(self.constrain, x.dtype):
            y = within(qkv, padding, self.constrain)
        else:
            q, k, v = (jnp.swapaxes(each, 1, 2) for each in unseen_by_padding(qkv, padding))
            q, axes = jnp.swapaxes(q, 1, 2)[:, :, :, None], ("images", "vision_heads", None, "seq")
            y = attention(q, k, v, None, None, c.head_dim**-0.5, self.constrain, axes)[..., 0, : c.head_dim]
        y = rearrange(y, "b t k h -> b t (k h)")
        y = Linear("btf,df->btd", (c.width, c.width), ("embed", "vision_heads"), name="out")(y)
        return self.constrain(y, "images", "seq", "residual")


def unseen_by_padding(qkv: jax.Array, padding: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k, v [I, S, heads, H + 8] of qkv [I, S, 3, heads, H], such that padding gives padding no weight.

    The mask is an outer product, padding times padding, so it is one more feature of queries and keys: theirs meet at
    -2^16, which no other score comes near, and add 0 everywhere else. A dense mask would double attention's time. A
    head's width stays a multiple of 8, as fused kernels want it.
    """
    mark = jnp.where(padding, 2.0**8, 0).astype(qkv.dtype)[:, :, None, None]  # I S 1 1
    q, k, v = (jnp.pad(qkv[:, :, i], ((0, 0),) * 3 + ((0, 8),)) for i in range(3))
    feature = jnp.arange(q.shape[-1]) == qkv.shape[-1]
    return jnp.where(feature, -mark, q), jnp.where(feature, mark, k), v


class MLP(nn.Module):
    """Two biased linear maps around the exact GELU, `y (1 + erf(y / sqrt 2)) / 2` in float32."""

    config: VisionConfig
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        y = Linear("btd,fd->btf", (c.hidden, c.width), ("vision_mlp", "embed"), bias=True, name="up")(x)
        wide = y.astype(jnp.float32)
        y = (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(y.dtype)
        y = Linear("btf,df->btd", (c.width, c.hidden), ("embed", "vision_mlp"), bias=True, name="down")(y)
        return self.constrain(y, "images", "seq", "residual")


class Block(nn.Module):
    """A pre-norm transformer block; a global one has tanh gates on both branches."""

    config: VisionConfig
    gated: bool
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(self, x: jax.Array, padding: jax.Array) -> jax.Array:
        c = self.config

        def gate(name: str) -> jax.Array | float:
            return (
                jnp.tanh(parameter(self, name, nn.initializers.zeros, (1,), (None,)).astype(x.dtype))
                if self.gated
                else 1.0
            )

        y = LayerNorm(c.norm_eps, name="attention_norm")(x)
        x = x + gate("attention_gate") * SelfAttention(c, self.constrain, name="attention")(y, padding)
        y = LayerNorm(c.norm_eps, name="mlp_norm")(x)
        return x + gate("mlp_gate") * MLP(c, self.constrain, name="mlp")(y)


class TileEmbedding(nn.Module):
    """`x + tanh(gate) * table[ratio id, tile]` for x [I, C, N, D]."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: jax.Array, ratio_ids: jax.Array) -> jax.Array:
        c = self.config
        shape = (len(TILES), c.max_tiles, c.width)
        table = parameter(self, "table", nn.initializers.normal(c.width**-0.5), shape, (None, None, "embed"))
        gate = parameter(self, "gate", nn.initializers.zeros, (1,), (None,))
        return x + (jnp.tanh(gate) * table)[ratio_ids][:, :, None].astype(x.dtype)


class PositionEmbedding(nn.Module):
    """`x + (1 - tanh g) * position + tanh(g) * tile position` for x [I, C, N, D], the class token included."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: jax.Array, ratio_ids: jax.Array) -> jax.Array:
        c = self.config
        init, tail = nn.initializers.normal(c.width**-0.5), (None, "embed")
        position = parameter(self, "position", init, (c.tokens, c.width), tail)
        tiles = parameter(self, "tiles", init, (len(TILES), c.max_tiles, c.tokens, c.width), (None, None, *tail))
        gate = jnp.tanh(parameter(self, "gate", nn.initializers.zeros, (1,), (None,)))
        return x + ((1 - gate) * position + gate * tiles[ratio_ids]).astype(x.dtype)


class VisionEncoder(nn.Module):
    """pixels [I, C, 3, P, P], ratio ids int [I] -> features [I, C, N, 6 D]: the last state, then the tapped ones.

    Taps are the *inputs* of the blocks they name, interleaved channel by channel, without the final norm.
    """

    config: VisionConfig
    constrain: Constrain = unconstrained
    remat: Remat = keep_all

    @nn.compact
    def __call__(self, pixels: jax.Array, ratio_ids: jax.Array) -> jax.Array:
        c = self.config
        patches = rearrange(pixels, "i c ch (y p) (x q) -> i c (y x) (ch p q)", p=c.patch, q=c.patch)
        x = Linear("icnp,dp->icnd", (c.width, 3 * c.patch**2), ("embed", None), name="patch_embedding")(patches)
        self.sow("intermediates", "patch", x)
        x = TileEmbedding(c, name="pre_tile_embedding")(x, ratio_ids)
        class_token = parameter(self, "class_token", nn.initializers.normal(c.width**-0.5), (c.width,), ("embed",))
        class_token = jnp.broadcast_to(class_token.astype(x.dtype), (*x.shape[:2], 1, c.width))
        x = jnp.concatenate([class_token, x], axis=2)
        x = PositionEmbedding(c, name="position_embedding")(x, ratio_ids)
        self.sow("intermediates", "embedded", x)
        x = LayerNorm(c.norm_eps, name="norm_pre")(x)
        self.sow("intermediates", "ln_pre", x)

        x = jnp.pad(x, ((0, 0), (0, 0), (0, c.padded_tokens - c.tokens), (0, 0)))
        padding = jnp.arange(c.padded_tokens) >= c.tokens
        padding = padding | (jnp.arange(c.max_tiles)[:, None] >= jnp.asarray(TILES)[ratio_ids][:, None, None])
        padding = padding.reshape(x.shape[0], -1)  # I C*N

        def flat(x: jax.Array) -> jax.Array:
            return rearrange(x, "i c n d -> i (c n) d")

        def real(x: jax.Array) -> jax.Array:
            return rearrange(x, "i (c n) d -> i c n d", c=c.max_tiles)[:, :, : c.tokens]

        x, tapped, block = flat(x), [], self.remat(run)
        for i in range(c.layers):
            if i in c.taps:
                tapped.append(real(x))
            x = block(Block(c, gated=False, constrain=self.constrain, name=f"locals_{i}"), x, padding)
            self.sow("intermediates", f"local_{i}", real(x))
        x = LayerNorm(c.norm_eps, name="norm_post")(x)
        self.sow("intermediates", "ln_post", real(x))
        x = TileEmbedding(c, name="post_tile_embedding")(rearrange(x, "i (c n) d -> i c n d", c=c.max_tiles), ratio_ids)
        x = flat(x)
        self.sow("intermediates", "post_tile", real(x))
        for i in range(c.global_layers):
            x = block(Block(c, gated=True, constrain=self.constrain, name=f"globals_{i}"), x, padding)
            self.sow("intermediates", f"global_{i}", real(x))
        x = real(x)
        if tapped:
            x = jnp.concatenate([x, rearrange(jnp.stack(tapped, axis=-1), "i c n d l -> i c n (d l)")], axis=-1)
        self.sow("intermediates", "features", x)
        return x
