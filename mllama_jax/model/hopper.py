"""Attention on a Hopper GPU by one Pallas kernel that never writes scores to memory.

The schedule is FlashAttention-3's (Shah et al. 2024, section 3): of a block's warpgroups one loads keys and values, the
others compute, each ROWS queries. A step is one of scores Q K and one of P V for the keys before; both are issued
together, and the softmax runs beside P V (section 3.2). Turns, which that paper has warpgroups take (section 3.1), gain
nothing here.

The last queries, where they would hold an almost idle GPU for a round of their own, have their keys split in parts, as
in Flash-Decoding (Dao et al. 2023).
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

from mllama_jax.model.attention import largest_divisor
from mllama_jax.model.gpu_attention import MARKS, seeing

ROWS = 64  # queries of a warpgroup
PROCESSORS = 132  # of an H100 SXM or H200, each at one block


@dataclasses.dataclass(frozen=True)
class Form:
    """Of a block.

    Attributes:
        groups: warpgroups that compute.
        keys: of a step.
        stages: steps that are loaded ahead.
        registers: of a thread that computes, and of one that loads.
    """

    groups: int
    keys: int
    stages: int
    registers: tuple[int, int]


NARROW = Form(groups=3, keys=96, stages=4, registers=(160, 32))
WIDE = Form(groups=2, keys=128, stages=2, registers=(232, 40))  # a third group's accumulators would find no registers


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for.

    Attributes:
        form: of its blocks.
        at: where queries, keys and values of a (batch, positions, head) are in their arrays.
        head_dim: H.
        length: of the keys of a part.
        scale: of the scores as exponents of two.
        share: query heads for each key/value head.
        parts: of the keys.
        first: query.
    """

    form: Form
    at: tuple[Callable, Callable, Callable]
    head_dim: int
    length: int
    scale: float
    share: int = 1
    parts: int = 1
    first: int = 0

    @property
    def steps(self) -> int:
        return pl.cdiv(self.length, self.form.keys)

    def slot(self, step: Any) -> jax.Array:
        return lax.rem(step, jnp.array(self.form.stages, step.dtype))


def flash(arrays: tuple[jax.Array, ...], *marks: jax.Array, scale: float) -> jax.Array:
    """Attend from q [B, T, N, H] to k, v [B, K, S, H], or within qkv [B, S, 3, N, H], in half precision: [B, T, N, H].

    T and S are multiples of 8. Where a gradient is asked for, cuDNN computes it.

    Args:
        arrays: q, k and v, or qkv alone.
        marks: [B, T, MARKS] and [B, S, MARKS], whose products are added to the scores before they are scaled: a mask
            of few features costs less so than a dense one, and nothing where a block's queries have none.
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
        plan = Plan(_form(H), at, H, T, scale)
    else:
        q, k, v = arrays
        (B, T, N, H), K, S = q.shape, *k.shape[1:3]
        at = (lambda b, s, n: (b, s, n)), *2 * (lambda b, s, n: (b, n, s),)
        plan = Plan(_form(H), at, H, S, scale, N // K)
    rows = plan.form.groups * ROWS
    whole, blocks = T // rows, pl.cdiv(T, rows)
    rounds = [pl.cdiv(n * B * N, PROCESSORS) for n in (whole, blocks)]
    parts = largest_divisor(plan.length // 8, PROCESSORS // (B * N)) if rounds[0] < rounds[1] else 1
    if parts == 1:
        return _run(plan, blocks, (q, k, v), marks)[0][:, 0]
    rest = dataclasses.replace(plan, length=plan.length // parts, parts=parts, first=whole * rows)
    last, lse = _run(rest, 1, (q, k, v), marks)
    last = _joined(last, lse[..., : last.shape[2]])
    if not whole:
        return last
    y = _run(plan, whole, (q, k, v), marks)[0][:, 0]
    # without the barrier XLA (of JAX 0.11.2) tries to fuse the kernel with the update of its result, and fails
    return lax.dynamic_update_slice_in_dim(lax.optimization_barrier(y), last, rest.first, 1)


def _joined(y: jax.Array, lse: jax.Array) -> jax.Array:
    """From the attention to each part of the keys [B, P, T, N, H], with weights that sum to exp(lse), that to all."""
    weights = jax.nn.softmax(lse, axis=1)  # B P N T
    return (jnp.swapaxes(weights, 2, 3)[..., None] * y).sum(axis=1).astype(y.dtype)


def _run(plan: Plan, blocks: int, arrays: tuple[jax.Array, ...], marks: tuple) -> list[jax.Array]:
    """For `blocks` of queries from `plan.first` on the attention to each part of the keys [B, P, T, N, H], and, where
    there are several, the logarithm of the sum of weights, float32 [B, P, N, T]."""
    q, groups, (B, T, _) = arrays[0], plan.form.groups, marks[0].shape
    T, N, H = T - plan.first, *q.shape[-2:]
    marked = jnp.any(marks[0][:, plan.first :] != 0, axis=-1)
    marked = jnp.pad(marked, ((0, 0), (0, -T % (groups * ROWS)))).reshape(B, -1, groups * ROWS).any(axis=-1)
    return gpu.kernel(
        functools.partial(_block, plan, q.dtype),
        out_type=[
            jax.ShapeDtypeStruct((B, plan.parts, T, N, H), q.dtype),
            # whole blocks: a copy of one axis is clipped at the array's end, not at that axis's
            jax.ShapeDtypeStruct((B, plan.parts, N, blocks * groups * ROWS), jnp.float32),
        ][: min(plan.parts, 2)],
        grid=(N, plan.parts, blocks, B),
        grid_names=("head", "part", "block", "batch"),
        num_threads=groups + 1,
        thread_name="group",
        compiler_params=gpu.CompilerParams(approx_math=True, lowering_semantics=gpu.LoweringSemantics.Warpgroup),
    )(*arrays, *marks, marked.astype(jnp.int32))


def _form(head_dim: int) -> Form:
    return NARROW if head_dim < 128 else WIDE


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
    """What a block does: ROWS queries of a head for each computing warpgroup."""
    groups, (many, few) = plan.form.groups, plan.form.registers
    arrays, marked, out, out_lse = refs[:5], refs[5], refs[6], refs[7:]
    head, part, block, batch = (lax.axis_index(name) for name in ("head", "part", "block", "batch"))
    first = plan.first, part * plan.length, part * plan.length
    kv_head = lax.div(head, jnp.int32(plan.share))

    def source(i: int, start: Any, length: int, count: int) -> list[Any]:
        """Of queries, keys or values the rows from `start` on, and the marks that go with them if `count` is 2."""
        rows = pl.ds(first[i] + start, length)
        found = [arrays[i].at[plan.at[i](batch, rows, head if i == 0 else kv_head)]]
        return [*found, *(arrays[3 + i].at[batch, rows] for _ in range(count - 1) if i < 2)]

    def scoped(q: Any, k: Any, v: Any, lse: Any, ready: Any, free: Any) -> None:
        group = lax.axis_index("group")

        def compute(count: int) -> None:
            base = (block * groups + group) * ROWS
            queries, arrived = [tile.at[group] for tile in q[:count]], [barrier.at[group] for barrier in ready[0]]
            for there, here, barrier in zip(source(0, base, ROWS, count), queries, arrived, strict=False):
                gpu.copy_gmem_to_smem(there, here, barrier)
            for barrier in arrived[:count]:
                gpu.barrier_wait(barrier)
            queries[0][...], found = _attend(plan, dtype, queries, k, v, ready[1:], free)
            for tile in lse:
                tile.at[group][...] = found
            gpu.commit_smem()
            gpu.copy_smem_to_gmem(queries[0], out.at[batch, part, pl.ds(base, ROWS), head])
            for here, there in zip(lse, out_lse, strict=True):
                gpu.copy_smem_to_gmem(here.at[group], there.at[batch, part, head, pl.ds(base, ROWS)])
            gpu.wait_smem_to_gmem(0)

        def either(do: Callable[[int], None]) -> None:
            some = marked[batch, block]
            pl.when(some != 0)(functools.partial(do, 2))
            pl.when(some == 0)(functools.partial(do, 1))

        @pl.when(group < groups)
        def _() -> None:
            gpu.set_max_registers(many, action="increase")
            either(compute)

        @pl.when(group == groups)
        def _() -> None:
            gpu.set_max_registers(few, action="decrease")
            either(lambda count: _load(plan, functools.partial(source, count=count), (k, v), ready[1:], free))

    barrier = functools.partial(gpu.Barrier, num_barriers=plan.form.stages)
    loaded = [gpu.Barrier(num_barriers=groups)] * 2
    steps = _smem(plan, dtype, plan.form.stages, plan.form.keys)
    pl.run_scoped(
        scoped,
        _smem(plan, dtype, groups, ROWS),
        steps,
        steps[:1],
        [gpu.SMEM((groups, ROWS), jnp.float32) for _ in out_lse],
        (loaded, [barrier(), barrier()], [barrier()]),
        (barrier(num_arrivals=groups), barrier(num_arrivals=groups)),
        collective_axes="group",
    )


def _smem(plan: Plan, dtype: jnp.dtype, count: int, rows: int) -> list[Any]:
    """Shared memory for `count` tiles of queries, keys or values, and for their marks, in the widest swizzles."""

    def tile(width: int) -> Any:
        swizzle = next(bytes for bytes in (128, 64, 32) if width * 2 % bytes == 0)
        mosaic: Any = gpu  # JAX 0.12 declares a method that these two need not have
        transforms = mosaic.TilingTransform((8, swizzle // 2)), mosaic.SwizzleTransform(swizzle)
        return gpu.SMEM((count, rows, width), dtype, transforms=transforms)

    return [tile(plan.head_dim), tile(MARKS)]


def _load(plan: Plan, source: Callable, tiles: tuple[Any, Any], ready: tuple, free: tuple) -> None:
    """Keep the next steps' keys and values on their way."""
    steps, stages, keys = plan.steps, plan.form.stages, plan.form.keys

    def load(step: Any, at: Any, i: int) -> None:
        for there, here, barrier in zip(source(1 + i, step * keys, keys), tiles[i], ready[i], strict=False):
            gpu.copy_gmem_to_smem(there, here.at[at], barrier.at[at])

    for step in range(min(stages, steps)):
        for i in range(2):
            load(jnp.int32(step), step, i)  # else a last block that is not whole would be refused

    @pl.loop(stages, max(steps, stages))
    def _(step: jax.Array) -> None:
        for i in range(2):
            gpu.barrier_wait(free[i].at[plan.slot(step)])
            load(step, plan.slot(step), i)

    for step in range(max(steps - stages, 0), steps):
        for i in range(2):
            gpu.barrier_wait(free[i].at[step % stages])


def _attend(
    plan: Plan, dtype: jnp.dtype, q: list[Any], k: list[Any], v: list[Any], ready: tuple, free: tuple
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The attention of ROWS queries [ROWS, H], and the logarithm of the sum of their weights."""
    form = plan.form
    row, whole = gpu.Layout.WGMMA.reduce(1), gpu.Layout.WGMMA

    def pairs(at: Any) -> list[tuple[Any, Any]]:
        return [(queries, keys.at[at].transpose((1, 0))) for queries, keys in zip(q, k, strict=False)]

    def await_keys(step: Any) -> None:
        for barrier in ready[0][: len(q)]:
            gpu.barrier_wait(barrier.at[plan.slot(step)])

    def await_next(step: jax.Array) -> None:
        gpu.barrier_wait(ready[1][0].at[plan.slot(step)])
        pl.when(step + 1 < plan.steps)(lambda: await_keys(step + 1))

    def step(masked: bool, i: jax.Array, carry: tuple) -> tuple:
        """P V of step i - 1, Q K and softmax of step i."""
        acc, most, total, p = carry

        def after(s: jax.Array) -> tuple:
            gpu.barrier_arrive(free[0].at[plan.slot(i)])
            found = lax.optimization_barrier(_softmax(plan, s, i * form.keys, most, masked))
            await_next(i)  # a branch: ptxas would else move what waits for P V, and nothing else, before the softmax
            return found

        acc, (p, most, here, fade) = _products(acc, p, v[0].at[plan.slot(i - 1)], pairs(plan.slot(i)), after)
        gpu.barrier_arrive(free[1].at[plan.slot(i - 1)])
        # p becomes half precision only here: P V has read the last one out of the registers that this one gets
        acc, p = lax.optimization_barrier((acc, p))
        return acc * lax.broadcast_in_dim(fade, acc.shape, [0]), most, total * fade + here, p.astype(dtype)

    nothing = jnp.zeros((ROWS, plan.head_dim), jnp.float32), jnp.full(ROWS, -jnp.inf)
    acc, most = (gpu.layout_cast(x, layout) for x, layout in zip(nothing, (whole, row), strict=True))
    await_keys(jnp.int32(0))
    s = _scores(pairs(0), form.keys)
    gpu.barrier_arrive(free[0].at[0])
    p, most, total, _ = _softmax(plan, s, 0, most, plan.length < form.keys)
    await_next(jnp.int32(0))
    seen, last = max(plan.length // form.keys, 1), (plan.steps - 1) % form.stages
    carry = lax.fori_loop(1, seen, functools.partial(step, False), (acc, most, total, p.astype(dtype)))
    acc, most, total, p = lax.fori_loop(seen, plan.steps, functools.partial(step, True), carry)
    acc = _add_product(acc, p, v[0].at[last])
    gpu.barrier_arrive(free[1].at[last])
    y = (acc / lax.broadcast_in_dim(total, acc.shape, [0])).astype(dtype)
    return y, most * math.log(2) + jnp.log(total)


def _softmax(plan: Plan, s: jax.Array, first: Any, most: jax.Array, masked: bool) -> tuple[jax.Array, ...]:
    """Weights of keys from `first` on; each row's largest score so far, their sum, and what older ones fade by."""
    if masked:  # behind the last key
        key = gpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=gpu.Layout.WGMMA) + first
        s = jnp.where(key < plan.length, s, -jnp.inf)
    high = jnp.maximum(most, s.max(axis=1) * plan.scale)
    p = jnp.exp2(s * plan.scale - lax.broadcast_in_dim(high, s.shape, [0]))
    return p, high, p.sum(axis=1), jnp.exp2(most - high)


def _scores(pairs: list[tuple[Any, Any]], keys: int) -> jax.Array:
    def scores(ref: Any) -> jax.Array:
        for queries, turned in pairs:
            gpu.wgmma(ref, queries, turned)
        return ref[...]

    return pl.run_scoped(scores, gpu.WGMMAAccumulatorRef((ROWS, keys), jnp.float32))


def _products(
    acc: jax.Array, p: jax.Array, v: Any, pairs: list[tuple[Any, Any]], after: Callable[[jax.Array], tuple]
) -> tuple[jax.Array, tuple]:
    """acc + p v, and what `after` makes of the scores of `pairs` meanwhile."""
    mosaic: Any = gpu
    keys = p.shape[1]

    def products(refs: tuple[Any, ...]) -> None:
        y, *found = refs

        def both(s: Any) -> None:
            for queries, turned in pairs:
                gpu.wgmma(s, queries, turned)
            gpu.wgmma(y, p, v)
            for ref, x in zip(found, after(mosaic.wgmma_accumulator_load(s, wait_n=1)), strict=True):
                ref[...] = x

        pl.run_scoped(both, gpu.WGMMAAccumulatorRef((ROWS, keys), jnp.float32))

    nothing = jnp.zeros((ROWS, keys), jnp.float32), *(jnp.zeros(ROWS) for _ in range(3))
    state: Any = pl.run_state(products)((gpu.WGMMAAccumulatorRef.init(acc), *nothing))
    return state[0], state[1:]


def _add_product(acc: jax.Array, p: jax.Array, v: Any) -> jax.Array:
    def product(y: Any) -> jax.Array:
        y[...] = acc
        gpu.wgmma(y, p, v)
        return y[...]

    return pl.run_scoped(product, gpu.WGMMAAccumulatorRef((ROWS, acc.shape[1]), jnp.float32))
