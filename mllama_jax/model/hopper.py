"""Attention on a Hopper GPU by one Pallas kernel that never writes scores to memory.

The schedule is FlashAttention-3's (Shah et al. 2024, section 3): of a block's three warpgroups one loads keys and
values, two compute, each ROWS queries, and take turns, so that one multiplies while the other is at its softmax.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from mllama_jax.model.gpu_attention import MARKS, seeing

KEYS, STAGES = 128, 2  # of a step; steps that are loaded ahead
ROWS, GROUPS = 64, 2  # queries of a warpgroup, computing warpgroups of a block


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for.

    Attributes:
        at: where queries, keys and values of a (batch, positions, head) are in their arrays.
        head_dim, length: H and S.
        scale: of the scores as exponents of two.
        share: query heads for each key/value head.
    """

    at: tuple[Callable, Callable, Callable]
    head_dim: int
    length: int
    scale: float
    share: int = 1

    @property
    def steps(self) -> int:
        return pl.cdiv(self.length, KEYS)


def slot(step: Any) -> jax.Array:
    return lax.rem(step, jnp.array(STAGES, step.dtype))


def flash(arrays: tuple[jax.Array, ...], *marks: jax.Array, scale: float) -> jax.Array:
    """Attend from q [B, T, N, H] to k, v [B, K, S, H], or within qkv [B, S, 3, N, H], in half precision: [B, T, N, H].

    T and S are multiples of 8. Where a gradient is asked for, cuDNN computes it.

    Args:
        arrays: q, k and v, or qkv alone.
        marks: [B, T, MARKS] and [B, S, MARKS], whose products are added to the scores before they are scaled: a mask
            of few features costs less so than a dense one.
    """
    y: Any = _flash(scale, arrays, marks)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)  # so that the kernel is lowered once for all layers
def _flash(scale: float, arrays: tuple[jax.Array, ...], marks: tuple[jax.Array, jax.Array]) -> jax.Array:
    scale *= math.log2(math.e)
    if len(arrays) == 1:
        q = k = v = arrays[0]
        B, T, _, N, H = q.shape
        at: Any = tuple(functools.partial(lambda i, b, s, n: (b, s, i, n), i) for i in range(3))
        plan = Plan(at, H, T, scale)
    else:
        q, k, v = arrays
        (B, T, N, H), K, S = q.shape, *k.shape[1:3]
        at = (lambda b, s, n: (b, s, n)), *2 * (lambda b, s, n: (b, n, s),)
        plan = Plan(at, H, S, scale, N // K)
    return gpu.kernel(
        functools.partial(_block, plan, q.dtype),
        out_type=jax.ShapeDtypeStruct((B, T, N, H), q.dtype),
        grid=(N, pl.cdiv(T, GROUPS * ROWS), B),
        grid_names=("head", "block", "batch"),
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=gpu.CompilerParams(approx_math=True, lowering_semantics=gpu.LoweringSemantics.Warpgroup),
    )(q, k, v, *marks)


def _by_cudnn(scale: float, arrays: tuple[jax.Array, ...], marks: tuple[jax.Array, jax.Array]) -> jax.Array:
    if len(arrays) == 3:
        q, k, v = arrays[0], jnp.swapaxes(arrays[1], 1, 2), jnp.swapaxes(arrays[2], 1, 2)
    else:
        q, k, v = (arrays[0][:, :, i] for i in range(3))
    mask = seeing(jnp.einsum("btm,bsm->bts", *marks) == 0)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")


def _forward(scale: float, arrays: tuple, marks: tuple) -> tuple[jax.Array, Any]:
    return jax.vjp(lambda arrays: _by_cudnn(scale, arrays, marks), arrays)


def _backward(scale: float, pull: Any, y: jax.Array) -> tuple[Any, None]:
    return *pull(y), None


_flash.defvjp(_forward, _backward)


def _block(plan: Plan, dtype: jnp.dtype, *refs: Any) -> None:
    """What a block of three warpgroups does: GROUPS * ROWS queries of a head."""
    *arrays, out = refs
    batch, head, block = (lax.axis_index(name) for name in ("batch", "head", "block"))
    kv_head = lax.div(head, jnp.int32(plan.share))

    def source(i: int, start: Any, length: int) -> list[Any]:
        """Of queries, keys or values the rows from `start` on, and the marks that go with them."""
        rows = pl.ds(start, length)
        found = [arrays[i].at[plan.at[i](batch, rows, head if i == 0 else kv_head)]]
        return [*found, arrays[3 + i].at[batch, rows]] if i < 2 else found

    def smem(count: int, rows: int) -> list[Any]:
        """Shared memory for `count` tiles of keys or queries, and for their marks."""
        return [_tile((count, rows, plan.head_dim), dtype), _tile((count, rows, MARKS), dtype)]

    def scoped(q: Any, k: Any, v: Any, ready: Any, free: Any, turn: Any) -> None:
        group = lax.axis_index("group")

        @pl.when(group < GROUPS)
        def _() -> None:
            gpu.set_max_registers(232, action="increase")
            base = (block * GROUPS + group) * ROWS
            queries = [tile.at[group] for tile in q]
            for there, here in zip(source(0, base, ROWS), queries, strict=True):
                gpu.copy_gmem_to_smem(there, here, ready[0].at[group])
            gpu.barrier_wait(ready[0].at[group])
            queries[0][...] = _attend(plan, dtype, group, queries, k, v, ready, free, turn)
            gpu.commit_smem()
            gpu.copy_smem_to_gmem(queries[0], out.at[batch, pl.ds(base, ROWS), head])
            gpu.wait_smem_to_gmem(0)

        @pl.when(group == GROUPS)
        def _() -> None:
            gpu.set_max_registers(40, action="decrease")
            _load(plan.steps, source, (k, v), ready[1:], free)

    barrier = functools.partial(gpu.Barrier, num_barriers=STAGES)
    pl.run_scoped(
        scoped,
        smem(GROUPS, ROWS),
        smem(STAGES, KEYS),
        [_tile((STAGES, KEYS, plan.head_dim), dtype)],
        (gpu.Barrier(num_arrivals=2, num_barriers=GROUPS), barrier(num_arrivals=2), barrier()),
        (barrier(num_arrivals=GROUPS), barrier(num_arrivals=GROUPS)),
        gpu.Barrier(num_arrivals=GROUPS),
        collective_axes="group",
    )


def _tile(shape: tuple[int, ...], dtype: jnp.dtype) -> Any:
    """Shared memory in the widest swizzle that divides the last axis."""
    swizzle = next(bytes for bytes in (128, 64, 32) if shape[-1] * 2 % bytes == 0)
    mosaic: Any = gpu  # JAX 0.12 declares a method that these two need not have
    transforms = mosaic.TilingTransform((8, swizzle // 2)), mosaic.SwizzleTransform(swizzle)
    return gpu.SMEM(shape, dtype, transforms=transforms)


def _load(steps: int, source: Callable, tiles: tuple[Any, Any], ready: tuple, free: tuple) -> None:
    """Keep the next STAGES steps' keys and values on their way."""

    def load(step: Any, at: Any) -> None:
        for i in range(2):
            for there, here in zip(source(1 + i, step * KEYS, KEYS), tiles[i], strict=True):
                gpu.copy_gmem_to_smem(there, here.at[at], ready[i].at[at])

    def wait(at: Any) -> None:
        for barrier in free:
            gpu.barrier_wait(barrier.at[at])

    for step in range(min(STAGES, steps)):
        load(jnp.int32(step), step)  # else a last block that is not whole would be refused

    @pl.loop(STAGES, max(steps, STAGES))
    def _(step: jax.Array) -> None:
        wait(slot(step))
        load(step, slot(step))

    for step in range(max(steps - STAGES, 0), steps):
        wait(step % STAGES)


def _attend(
    plan: Plan, dtype: jnp.dtype, group: jax.Array,
    q: list[Any], k: list[Any], v: list[Any], ready: tuple, free: tuple, turn: Any,
) -> jax.Array:  # fmt: skip
    """The attention of ROWS queries: [ROWS, H]."""
    row, whole = gpu.Layout.WGMMA.reduce(1), gpu.Layout.WGMMA

    def swap() -> None:
        gpu.barrier_arrive(turn)
        gpu.barrier_wait(turn)

    def step(masked: bool, i: jax.Array, carry: tuple) -> tuple:
        acc, most, total = carry
        here = slot(i)

        def scores(ref: Any) -> jax.Array:
            for queries, keys in zip(q, k, strict=True):
                gpu.wgmma(ref, queries, keys.at[here].transpose((1, 0)))
            swap()
            return ref[...]

        s = pl.run_scoped(scores, gpu.WGMMAAccumulatorRef((ROWS, KEYS), jnp.float32))
        gpu.barrier_arrive(free[0].at[here])
        if masked:  # behind the last key
            key = gpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=whole) + i * KEYS
            s = jnp.where(key < plan.length, s, -jnp.inf)
        high = jnp.maximum(most, s.max(axis=1) * plan.scale)
        fade = jnp.exp2(most - high)
        p = jnp.exp2(s * plan.scale - lax.broadcast_in_dim(high, s.shape, [0]))
        acc *= lax.broadcast_in_dim(fade, acc.shape, [0])
        total = total * fade + p.sum(axis=1)
        acc, high, total, p = lax.optimization_barrier((acc, high, total, p.astype(dtype)))
        gpu.barrier_arrive(turn)
        gpu.barrier_wait(ready[2].at[here])
        gpu.barrier_wait(turn)

        def meanwhile() -> None:
            @pl.when(i + 1 < plan.steps)
            def _() -> None:
                gpu.barrier_wait(ready[1].at[slot(i + 1)])

        acc = _add_product(acc, p, v[0].at[here], meanwhile)
        gpu.barrier_arrive(free[1].at[here])
        return acc, high, total

    nothing = jnp.zeros((ROWS, plan.head_dim), jnp.float32), jnp.full(ROWS, -jnp.inf), jnp.zeros(ROWS)
    carry = tuple(gpu.layout_cast(x, layout) for x, layout in zip(nothing, (whole, row, row), strict=True))
    gpu.barrier_wait(ready[1].at[0])
    pl.when(group == 1)(swap)
    seen = plan.length // KEYS
    carry = lax.fori_loop(0, seen, functools.partial(step, False), carry)
    acc, _, total = lax.fori_loop(seen, plan.steps, functools.partial(step, True), carry)
    pl.when(group == 0)(swap)
    return (acc / lax.broadcast_in_dim(total, acc.shape, [0])).astype(dtype)


def _add_product(acc: jax.Array, p: jax.Array, v: Any, meanwhile: Callable[[], None]) -> jax.Array:
    """acc + p v, and something to do until it is done."""

    def product(ref: Any) -> None:
        gpu.wgmma(ref, p, v)
        meanwhile()

    y: Any = pl.run_state(product)(gpu.WGMMAAccumulatorRef.init(acc))
    return y
