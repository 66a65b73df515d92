"""Linear maps, norms, the gated MLP and rotary positions."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from mllama_jax.config import RopeScaling
from mllama_jax.model.einsum import einsum
from mllama_jax.model.quantize import product

Axes = tuple[str | None, ...]


class Constrain(Protocol):
    """`constrain(x, "batch", "seq", "residual")` places `x` on a mesh by the logical names of its axes."""

    def __call__(self, x: jax.Array, *axes: str | None) -> jax.Array: ...

    @property
    def platform(self) -> str:
        """What its devices are: "cpu", "gpu" or "tpu"."""
        ...

    @property
    def mesh(self) -> object:
        """The mesh, None without one."""
        ...

    @property
    def peers(self) -> jax.Array | None:
        """What `gpu_peers.peers` says, within a program in which devices send each other few rows that way."""
        ...

    def among(self, peers: jax.Array) -> Constrain:
        """The same with these `peers`."""
        ...

    def axes(self, name: str | None) -> tuple[str, ...]:
        """The mesh axes of a logical axis."""
        ...

    def parts(self, name: str | None) -> int:
        """In how many parts a logical axis is split."""
        ...

    def local(self, function: Callable, inputs: Sequence[Axes], output: Axes) -> Callable:
        """`function`, run by each device on its own parts of arrays whose axes have these logical names."""
        ...


class Unconstrained:
    """No mesh."""

    mesh = peers = None

    def __call__(self, x: jax.Array, *axes: str | None) -> jax.Array:
        return x

    @property
    def platform(self) -> str:
        return jax.default_backend()

    def among(self, peers: jax.Array) -> Constrain:
        return self

    def axes(self, name: str | None) -> tuple[str, ...]:
        return ()

    def parts(self, name: str | None) -> int:
        return 1

    def local(self, function: Callable, inputs: Sequence[Axes], output: Axes) -> Callable:
        return function


unconstrained = Unconstrained()


def on_hopper(constrain: Constrain, dtype: jnp.dtype) -> bool:
    """Whether these are Hopper GPUs, for which `hopper` and `hopper_int4` have kernels in half precision."""
    if constrain.platform != "gpu" or dtype == jnp.float32:
        return False
    return getattr(jax.local_devices()[0], "compute_capability", None) == "9.0"


Remat = Callable[[Callable], Callable]
"""`remat(run)(layer, ...)` runs a layer, and says what of it is kept for the backward pass."""


def run(layer: nn.Module, *args: Any) -> Any:
    return layer(*args)


def keep_all(run: Callable) -> Callable:
    return run


# What the backward pass computes again of each layer: all, all but the products with kernels, nothing.
REMAT: dict[str, Remat] = {
    "layer": nn.remat,
    "dots": functools.partial(nn.remat, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "nothing": keep_all,
}


def low_rank(equation: str, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`einsum(equation, x, b a)` for a [rank, in] and b [out..., rank], one such pair for each part of a fused kernel.

    The product b a is never made, nor is its gradient: both would be as large as the kernel.
    """
    inputs, kernel, outputs = re.split(",|->", equation)
    rows, parts = inputs[:-1], kernel[0] if a.ndim == 3 else ""
    y = einsum(f"{inputs},{parts}r{inputs[-1]}->{rows}{parts}r", x, a.astype(x.dtype))
    return einsum(f"{rows}{parts}r,{kernel[:-1]}r->{outputs}", y, b.astype(x.dtype))


def parameter(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...], axes: Axes) -> jax.Array:
    """Declare a float32 parameter with one logical name an axis; loaders may bring it in another dtype."""
    boxed: Any = nn.with_logical_partitioning(init, axes)
    return module.param(name, boxed, shape, jnp.float32)


class Linear(nn.Module):
    """`y = einsum(equation, x, kernel) (+ bias)`, the kernel `[out..., in]`.

    A quantised kernel has a `scale` beside it, see `quantize`; an adapted one has `lora_a` and `lora_b`, see
    `low_rank`.
    """

    equation: str
    shape: tuple[int, ...]
    axes: Axes
    bias: bool = False
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.has_variable("params", "scale"):
            weights = tuple(self.get_variable("params", name) for name in ("kernel", "scale"))
        else:
            init = nn.initializers.normal(self.shape[-1] ** -0.5)
            weights = (parameter(self, "kernel", init, self.shape, self.axes).astype(x.dtype),)
        y = self._summed(x, *weights)
        if self.has_variable("params", "lora_a"):
            y += low_rank(self.equation, x, *(self.get_variable("params", name) for name in ("lora_a", "lora_b")))
        if self.bias:
            y += parameter(self, "bias", nn.initializers.zeros, self.shape[:-1], self.axes[:-1]).astype(x.dtype)
        return y

    def _summed(self, x: jax.Array, *weights: jax.Array) -> jax.Array:
        """The product, of all devices' parts where a mesh splits the inputs."""
        if self.constrain.peers is None or not self.constrain.axes(self._axes[-1]):
            return self._product(self.constrain, x, *weights)
        from mllama_jax.model.gpu_peers import summed

        return summed(self._product, self._axes, self.constrain, x, *weights)

    @property
    def _axes(self) -> Axes:
        """The kernel's in a product: a mesh may split it by "embed", but never an activation's "embed"."""
        return tuple(None if axis == "embed" else axis for axis in self.axes)

    def _product(
        self, constrain: Constrain, x: jax.Array, kernel: jax.Array, scale: jax.Array | None = None
    ) -> jax.Array:
        """With a kernel, or a quantised one and its scale."""
        if scale is None:
            return einsum(self.equation, x, kernel)
        few_rows = None
        if kernel.dtype == jnp.uint8 and on_hopper(constrain, x.dtype):
            from mllama_jax.model.hopper_int4 import for_rows

            few_rows = for_rows(x, scale, self._axes, constrain)
        return product(self.equation, x, kernel, scale, constrain.parts(self._axes[-1]), few_rows)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 and scaled in the input's dtype, as Meta does."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, x.shape[-1:], (None,))
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm over the last axis, with bias, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, x.shape[-1:], (None,))
        bias = parameter(self, "bias", nn.initializers.zeros, x.shape[-1:], (None,))
        y = x.astype(jnp.float32)
        y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale + bias).astype(x.dtype)


class SwiGLU(nn.Module):
    """`down(silu(gate x) * up x)`; gate and up are one kernel `[2, F, D]`."""

    hidden: int
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, T, D]
        D = x.shape[-1]
        linear = functools.partial(Linear, constrain=self.constrain)
        gate_up = linear("btd,cfd->btcf", (2, self.hidden, D), (None, "mlp", "embed"), name="gate_up")(x)
        gate, up = gate_up[:, :, 0], gate_up[:, :, 1]
        y = linear("btf,df->btd", (D, self.hidden), ("embed", "mlp"), name="down")(nn.silu(gate) * up)
        return self.constrain(y, "batch", "seq", "residual")


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Angular frequencies, float32 [H/2]; Llama 3.1's scaling stretches the long wavelengths (``apply_scaling``)."""
    frequencies = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequencies
    turns = scaling.original_context * frequencies / (2 * math.pi)  # wavelengths that fit the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = jnp.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rotate(x: jax.Array, positions: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Rotary embedding of x [B, T, ..., H] at positions int [B, T]; the pairs are the two halves of H."""
    angles = positions[..., None] * frequencies  # B T H/2
    angles = angles.reshape(*positions.shape, *(1,) * (x.ndim - 3), -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
