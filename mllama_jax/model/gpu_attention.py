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

from mllama_jax.model.attention import MARKS

KEYS, STAGES = 128, 2
ROWS, GROUPS = 64, 2  # queries of a warpgroup, computing warpgroups of a block


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for.

    Attributes:
        at: where queries, keys and values of a (batch, positions, head) are in their arrays.
        head_dim, length, scale, causal: H, S and what `flash` is told; the scale is for powers of two.
        share: query heads for each key/value head.
        keys: of a step.
        stages: steps that are loaded ahead.
    """

    at: tuple[Callable, Callable, Callable]
    head_dim: int
    length: int
    scale: float
    causal: bool = False
    share: int = 1
    keys: int = KEYS
    stages: int = STAGES

    def steps(self, block: jax.Array) -> tuple[Any, Any]:
        """For a block of queries the number of steps in which all keys are seen, and of all steps."""
        if not self.causal:
            return self.length // self.keys, pl.cdiv(self.length, self.keys)
        rows = GROUPS * ROWS
        last = jnp.minimum((block + 1) * rows, self.length)
        return lax.div(block * rows, jnp.int32(self.keys)), lax.div(last + self.keys - 1, jnp.int32(self.keys))

    def slot(self, step: Any) -> jax.Array:
        return lax.rem(step, jnp.array(self.stages, step.dtype))


def flash(arrays: tuple[jax.Array, ...], *marks: jax.Array, scale: float, causal: bool = False) -> jax.Array:
    """Attend from q [B, T, N, H] to k, v [B, K, S, H], or within qkv [B, S, 3, N, H], in half precision: [B, T, N, H].

    Where a gradient is asked for, cuDNN computes it.

    Args:
        arrays: q, k and v, or qkv alone.
        marks: none, or [B, T, MARKS] and [B, S, MARKS] whose products are added to the scores before they are scaled: a
            mask that has few features costs less so than a dense one.
        causal: query t sees keys 0 to t; T = S.
    """
    y: Any = _flash(scale, causal, arrays, marks)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(scale: float, causal: bool, arrays: tuple[jax.Array, ...], marks: tuple[jax.Array, ...]) -> jax.Array:
    q, k, v = arrays if len(arrays) == 3 else 3 * arrays
    if q is v:
        B, T, _, N, H = q.shape
        at: Any = tuple(functools.partial(lambda i, b, s, n: (b, s, i, n), i) for i in range(3))
        plan = Plan(at, H, T, scale * math.log2(math.e), causal)
    else:
        (B, T, N, H), K, S = q.shape, *k.shape[1:3]
        at = (lambda b, s, n: (b, s, n)), *2 * (lambda b, s, n: (b, n, s),)
        plan = Plan(at, H, S, scale * math.log2(math.e), causal, N // K)
    return gpu.kernel(
        functools.partial(_block, plan, q.dtype),
        out_type=jax.ShapeDtypeStruct((B, T, N, H), q.dtype),
        grid=(N, pl.cdiv(T, GROUPS * ROWS), B),
        grid_names=("head", "block", "batch"),
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=gpu.CompilerParams(approx_math=True, lowering_semantics=gpu.LoweringSemantics.Warpgroup),
    )(q, k, v, *marks)


def _by_cudnn(scale: float, causal: bool, arrays: tuple[jax.Array, ...], marks: tuple[jax.Array, ...]) -> jax.Array:
    if len(arrays) == 3:
        q, k, v = arrays[0], jnp.swapaxes(arrays[1], 1, 2), jnp.swapaxes(arrays[2], 1, 2)
    else:
        q, k, v = (arrays[0][:, :, i] for i in range(3))
    mask = (jnp.einsum("btm,bsm->bts", *marks) == 0)[:, None] if marks else None
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=causal, implementation="cudnn")


def _forward(scale: float, causal: bool, arrays: tuple, marks: tuple) -> tuple[jax.Array, Any]:
    return jax.vjp(lambda arrays: _by_cudnn(scale, causal, arrays, marks), arrays)


def _backward(scale: float, causal: bool, pull: Any, y: jax.Array) -> tuple[Any, None]:
    return *pull(y), None


_flash.defvjp(_forward, _backward)


def _block(plan: Plan, dtype: jnp.dtype, *refs: Any) -> None:
    """What a block of three warpgroups does: GROUPS * ROWS queries of a head."""
    *arrays, out = refs
    marked = len(arrays) > 3
    batch, head, block = (lax.axis_index(name) for name in ("batch", "head", "block"))
    if plan.causal:  # those with the most keys first
        block = lax.axis_size("block") - 1 - block
    kv_head = lax.div(head, jnp.int32(plan.share))

    def source(i: int, start: Any, length: int) -> list[Any]:
        """Of queries, keys or values the rows from `start` on, and the marks that go with them."""
        rows = pl.ds(start, length)
        found = [arrays[i].at[plan.at[i](batch, rows, head if i == 0 else kv_head)]]
        return [*found, arrays[3 + i].at[batch, rows]] if marked and i < 2 else found

    def smem(count: int, rows: int) -> list[Any]:
        """Shared memory for `count` tiles of keys or queries, and for their marks."""
        tiles = [_tile((count, rows, plan.head_dim), dtype)]
        return [*tiles, _tile((count, rows, MARKS), dtype)] if marked else tiles

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
            queries[0][...] = _attend(plan, dtype, group, base, plan.steps(block), queries, k, v, ready, free, turn)
            gpu.commit_smem()
            gpu.copy_smem_to_gmem(queries[0], out.at[batch, pl.ds(base, ROWS), head])
            gpu.wait_smem_to_gmem(0)

        @pl.when(group == GROUPS)
        def _() -> None:
            gpu.set_max_registers(40, action="decrease")
            _load(plan, plan.steps(block)[1], source, (k, v), ready[1:], free)

    barrier = functools.partial(gpu.Barrier, num_barriers=plan.stages)
    loads = 2 if marked else 1
    pl.run_scoped(
        scoped,
        smem(GROUPS, ROWS),
        smem(plan.stages, plan.keys),
        [_tile((plan.stages, plan.keys, plan.head_dim), dtype)],
        (gpu.Barrier(num_arrivals=loads, num_barriers=GROUPS), barrier(num_arrivals=loads), barrier()),
        (barrier(num_arrivals=GROUPS), barrier(num_arrivals=GROUPS)),
        gpu.Barrier(num_arrivals=GROUPS),
        collective_axes="group",
    )


def _tile(shape: tuple[int, ...], dtype: jnp.dtype) -> Any:
    """Shared memory in the widest swizzle that divides the last axis."""
    swizzle = next(bytes for bytes in (128, 64, 32) if shape[-1] * 2 % bytes == 0)
    tiling = gpu.TilingTransform((8, swizzle // 2))
    return gpu.SMEM(shape, dtype, transforms=(tiling, gpu.SwizzleTransform(swizzle)))


def _load(plan: Plan, steps: Any, source: Callable, tiles: tuple[Any, Any], ready: tuple, free: tuple) -> None:
    """Keep the next `stages` steps' keys and values on their way."""

    def load(step: Any, slot: Any) -> None:
        for i in range(2):
            for there, here in zip(source(1 + i, step * plan.keys, plan.keys), tiles[i], strict=True):
                gpu.copy_gmem_to_smem(there, here.at[slot], ready[i].at[slot])

    def wait(step: Any) -> jax.Array:
        slot = plan.slot(step)
        for barrier in free:
            gpu.barrier_wait(barrier.at[slot])
        return slot

    for i in range(plan.stages):
        pl.when(i < jnp.int32(steps))(functools.partial(load, jnp.int32(i), i))

    @pl.loop(plan.stages, jnp.int32(steps))
    def _(step: jax.Array) -> None:
        load(step, wait(step))

    @pl.loop(jnp.int32(0), jnp.minimum(jnp.int32(steps), plan.stages))
    def _(step: jax.Array) -> None:
        wait(step + steps - jnp.minimum(steps, plan.stages))


def _attend(
    plan: Plan, dtype: jnp.dtype, group: jax.Array, base: jax.Array, steps: tuple[Any, Any],
    q: list[Any], k: list[Any], v: list[Any], ready: tuple, free: tuple, turn: Any,
) -> jax.Array:  # fmt: skip
    """The attention of ROWS queries from `base` on: [ROWS, H]."""
    row, whole = gpu.Layout.WGMMA.reduce(1), gpu.Layout.WGMMA

    def swap() -> None:
        gpu.barrier_arrive(turn)
        gpu.barrier_wait(turn)

    def step(masked: bool, i: jax.Array, carry: tuple) -> tuple:
        acc, most, total = carry
        slot = plan.slot(i)

        def scores(ref: Any) -> jax.Array:
            for queries, keys in zip(q, k, strict=True):
                gpu.wgmma(ref, queries, keys.at[slot].transpose((1, 0)))
            swap()
            return ref[...]

        s = pl.run_scoped(scores, gpu.WGMMAAccumulatorRef((ROWS, plan.keys), jnp.float32))
        gpu.barrier_arrive(free[0].at[slot])
        if masked:
            key = gpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=whole) + i * plan.keys
            query = gpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=whole) + base
            s = jnp.where(key <= query if plan.causal else key < plan.length, s, -jnp.inf)
        high = jnp.maximum(most, s.max(axis=1) * plan.scale)
        fade = jnp.exp2(most - high)
        p = jnp.exp2(s * plan.scale - lax.broadcast_in_dim(high, s.shape, [0]))
        acc *= lax.broadcast_in_dim(fade, acc.shape, [0])
        total = total * fade + p.sum(axis=1)
        acc, high, total, p = lax.optimization_barrier((acc, high, total, p.astype(dtype)))
        gpu.barrier_arrive(turn)
        gpu.barrier_wait(ready[2].at[slot])
        gpu.barrier_wait(turn)

        def meanwhile() -> None:
            @pl.when(i + 1 < steps[1])
            def _() -> None:
                gpu.barrier_wait(ready[1].at[plan.slot(i + 1)])

        acc = _add_product(acc, p, v[0].at[slot], meanwhile)
        gpu.barrier_arrive(free[1].at[slot])
        return acc, high, total

    nothing = jnp.zeros((ROWS, plan.head_dim), jnp.float32), jnp.full(ROWS, -jnp.inf), jnp.zeros(ROWS)
    carry = tuple(gpu.layout_cast(x, layout) for x, layout in zip(nothing, (whole, row, row), strict=True))
    gpu.barrier_wait(ready[1].at[0])
    pl.when(group == 1)(swap)
    carry = lax.fori_loop(0, steps[0], functools.partial(step, False), carry)
    acc, _, total = lax.fori_loop(steps[0], steps[1], functools.partial(step, True), carry)
    pl.when(group == 0)(swap)
    return (acc / lax.broadcast_in_dim(total, acc.shape, [0])).astype(dtype)


def _add_product(acc: jax.Array, p: jax.Array, v: Any, meanwhile: Callable[[], None]) -> jax.Array:
    """acc + p v, and something to do until it is done."""

    def product(ref: Any) -> None:
        gpu.wgmma(ref, p, v)
        meanwhile()

    y: Any = pl.run_state(product)(gpu.WGMMAAccumulatorRef.init(acc))
    return y
