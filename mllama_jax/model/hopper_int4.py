"""Products of up to 32 rows of activations with kernels in int4, on a Hopper GPU by one Pallas kernel: `y = x W^T`.

A warpgroup computes 64 outputs, which are the rows of the tensor cores' product W x^T, so that few activations are few
columns. One more warpgroup loads. Packed numbers are widened in registers and multiplied from there; a group's sums
are float32 when its scale is applied.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from mllama_jax.model.layers import Axes, Constrain
from mllama_jax.model.quantize import GROUP

MOST = 32  # rows of activations
OUTPUTS = 64  # of a warpgroup
BLOCKS = 132  # that run at once: multiprocessors of an H100
STAGES, ROOM = 4, 220 * 1024  # steps that are loaded ahead, and bytes that they may take


def for_rows(x: jax.Array, scale: jax.Array, axes: Axes, constrain: Constrain) -> Callable | None:
    """`product` for activations like x; on a mesh each device has its part of a kernel with these logical axes.

    None for more rows, other dtypes, kernels of which a part is not of whole groups and whole warpgroups, and where a
    mesh does not divide the rows, or splits them by an axis that splits the kernel too.
    """
    *of_outputs, inside = axes
    batch: Axes = ("batch", *(None,) * (x.ndim - 2))
    parts = constrain.parts("batch")
    outputs = math.prod(scale.shape[:-1]) / math.prod(map(constrain.parts, of_outputs))
    groups = scale.shape[-1] / constrain.parts(inside)
    if x.dtype != jnp.bfloat16 or x.shape[-1] != scale.shape[-1] * GROUP or outputs % OUTPUTS or groups % 1:
        return None
    if math.prod(x.shape[:-1]) > MOST * parts or x.shape[0] % parts:
        return None
    if any(axis in constrain.axes("batch") for name in axes for axis in constrain.axes(name)):
        return None

    def part(*arrays: jax.Array) -> jax.Array:
        return product(*arrays)[None]

    local = constrain.local(part, ((*batch, inside), axes, axes), (inside, *batch, *of_outputs))
    return lambda *arrays: local(*arrays).sum(axis=0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a product is shared out.

    Attributes:
        warpgroups: that compute in a block, OUTPUTS each.
        groups: of inputs, in a step.
        splits: blocks that share the inputs.
        steps: of a block.
    """

    warpgroups: int
    groups: int
    splits: int
    steps: int

    @classmethod
    def of(cls, outputs: int, groups: int) -> Plan:
        """For a kernel with so many outputs and groups of inputs.

        The widest blocks of which every multiprocessor can have 16 groups, for these read the activations less often;
        and as many splits as run at once.
        """
        wide = (n for n in (4, 2) if outputs % (n * OUTPUTS) == 0 and outputs // (n * OUTPUTS) * groups >= 16 * BLOCKS)
        warpgroups, at_once = next(wide, 1), math.gcd(groups, 4)
        most, steps = max(BLOCKS * warpgroups * OUTPUTS // outputs, 1), groups // at_once
        splits = max(n for n in range(1, most + 1) if steps % n == 0)
        return cls(warpgroups, at_once, splits, steps // splits)

    @property
    def outputs(self) -> int:
        """Of a block."""
        return self.warpgroups * OUTPUTS

    @property
    def inputs(self) -> int:
        """Of a step."""
        return self.groups * GROUP


@jax.jit  # so that the kernel is lowered once for all layers
def product(x: jax.Array, packed: jax.Array, scale: jax.Array) -> jax.Array:
    """Activations bfloat16 [..., in] of up to MOST rows by a kernel as `to_int4` makes it: [..., out...].

    Args:
        packed: uint8 [out..., in / 2].
        scale: bfloat16 [out..., in / GROUP].
    """
    shape = *x.shape[:-1], *packed.shape[:-1]
    x, packed, scale = (array.reshape(-1, array.shape[-1]) for array in (x, packed, scale))
    rows, (outputs, groups) = x.shape[0], scale.shape
    columns = pl.cdiv(rows, 8) * 8
    plan = Plan.of(outputs, groups)
    sums = gpu.kernel(
        functools.partial(_block, plan),
        out_type=jax.ShapeDtypeStruct((plan.splits, outputs, columns), jnp.float32),
        grid=(outputs // plan.outputs, plan.splits),
        grid_names=("block", "split"),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
    )(jnp.pad(in_order(x), ((0, columns - rows), (0, 0))), packed, scale)
    return sums.sum(axis=0)[:, :rows].T.astype(x.dtype).reshape(shape)


def in_order(x: jax.Array) -> jax.Array:
    """x [B, in] in the order in which `_widened` has a group's numbers.

    A thread reads 16 bytes of a row, of which byte 4 v + 2 e + b holds two numbers, p = 0 and 1: with those of its
    neighbour e they are a pair. The four threads q of a row then have columns 2 q + e of the product with v, b and p.
    """
    return rearrange(x, "B (z p q v e b) -> B (z v b p q e)", z=x.shape[1] // GROUP, p=2, q=4, v=4, e=2, b=2)


def _block(plan: Plan, x: Any, packed: Any, scale: Any, y: Any) -> None:
    """What a block does: its outputs' sums over the inputs of its split, [plan.outputs, columns]."""
    columns, split = x.shape[0], lax.axis_index("split")
    start = lax.axis_index("block") * plan.outputs
    stages = min(STAGES, plan.steps, ROOM // (plan.inputs * (plan.outputs // 2 + columns * 2)))

    def slot(step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.array(stages, step.dtype))

    def scoped(numbers: Any, inputs: Any, ready: Any, free: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < plan.warpgroups)
        def _() -> None:
            own = pl.ds(start + warpgroup * OUTPUTS, OUTPUTS)

            def step(i: jax.Array, acc: jax.Array) -> jax.Array:
                here, first = slot(i), (split * plan.steps + i) * plan.groups
                scales = [_column(scale.at[own, first + g]) for g in range(plan.groups)]
                gpu.barrier_wait(ready.at[here])
                rows = numbers.at[here, pl.ds(warpgroup * OUTPUTS, OUTPUTS)]
                for g, by in enumerate(scales):
                    w = _widened(rows.at[:, pl.ds(g * GROUP // 2, GROUP // 2)])
                    sums = _sums(w, inputs.at[here, :, pl.ds(g * GROUP, GROUP)])
                    acc += sums * lax.broadcast_in_dim(by.astype(jnp.float32), sums.shape, [0])
                gpu.barrier_arrive(free.at[here])
                return acc

            nothing = gpu.layout_cast(jnp.zeros((OUTPUTS, columns), jnp.float32), gpu.Layout.WGMMA)
            y[split, own] = lax.fori_loop(0, plan.steps, step, nothing)

        @pl.when(warpgroup == plan.warpgroups)
        def _() -> None:
            def load(step: Any, at: Any) -> None:
                rows, across = pl.ds(start, plan.outputs), split * plan.steps + step
                there = packed.at[rows, pl.ds(across * (plan.inputs // 2), plan.inputs // 2)]
                gpu.copy_gmem_to_smem(there, numbers.at[at], ready.at[at])
                gpu.copy_gmem_to_smem(x.at[:, pl.ds(across * plan.inputs, plan.inputs)], inputs.at[at], ready.at[at])

            for step in range(stages):
                load(jnp.int32(step), step)

            @pl.loop(stages, plan.steps)
            def _(step: jax.Array) -> None:
                gpu.barrier_wait(free.at[slot(step)])
                load(step, slot(step))

            for step in range(plan.steps - stages, plan.steps):
                gpu.barrier_wait(free.at[step % stages])

    mosaic: Any = gpu  # JAX 0.12 declares a method that these two need not have
    transforms = mosaic.TilingTransform((8, 64)), mosaic.SwizzleTransform(128)
    pl.run_scoped(
        scoped,
        gpu.SMEM((stages, plan.outputs, plan.inputs // 2), jnp.uint8),
        gpu.SMEM((stages, columns, plan.inputs), x.dtype, transforms=transforms),
        gpu.Barrier(num_arrivals=2, num_barriers=stages),
        gpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=stages),
        collective_axes="warpgroup",
    )


def _column(scales: Any) -> jax.Array:
    """Scales [OUTPUTS] from memory, each where the sums that it multiplies are."""
    index = (...,) if jax.__version_info__ < (0, 11) else ()  # which JAX 0.10 asks for and later ones warn of
    return gpu.load(scales, *index, layout=gpu.Layout.WGMMA.reduce(1), optimized=False)


def _sums(w: jax.Array, x: Any) -> jax.Array:
    """w [OUTPUTS, GROUP] by x [columns, GROUP]."""

    def sums(ref: Any) -> jax.Array:
        gpu.wgmma(ref, w, x.transpose((1, 0)))
        return ref[...]

    return pl.run_scoped(sums, gpu.WGMMAAccumulatorRef((OUTPUTS, x.shape[0]), jnp.float32))


def _widened(packed: Any) -> jax.Array:
    """Bytes [OUTPUTS, GROUP / 2] in shared memory as bfloat16 [OUTPUTS, GROUP], in the order of `in_order`."""
    shape = gpu.ShapeDtypeStruct((OUTPUTS, GROUP), jnp.dtype("bfloat16"), layout=gpu.Layout.WGMMA)
    widen: Any = gpu.inline_mgpu(arg_types=(gpu.RefType(),), return_type=shape)(_unpacked)
    return widen(packed)


def _unpacked(_: Any, ref: Any) -> Any:
    """What a thread has of `_widened`: two numbers at a time, as bits 0 to 3 and 16 to 19 of a shifted word.

    Below the bits 0x4300 a number u is the bfloat16 128 + u, from which 136 is taken.
    """
    i32, bf16 = ir.IntegerType.get_signless(32), ir.BF16Type.get()

    def constant(x: int) -> Any:
        return arith.constant(i32, ir.IntegerAttr.get(i32, x))

    def word(row: Any, v: int) -> Any:
        return vector.extract(words[row], dynamic_position=[], static_position=[v])

    (pitch, _), _ = ir.MemRefType(ref.type).get_strides_and_offset()
    thread, base = utils.thread_idx(), utils.memref_ptr(ref)
    lane, warp = arith.andi(thread, constant(31)), arith.andi(arith.shrui(thread, constant(5)), constant(3))
    row = arith.addi(arith.muli(warp, constant(16)), arith.shrui(lane, constant(2)))
    at = arith.addi(arith.muli(row, constant(pitch)), arith.muli(arith.andi(lane, constant(3)), constant(16)))
    words = []
    for half in range(2):
        offset = arith.addi(at, constant(8 * pitch * half))
        i8, free = ir.IntegerType.get_signless(8), llvm.GEPNoWrapFlags.none
        there = llvm.getelementptr(base.type, base, [offset], [-(2**31)], i8, free)
        words.append(llvm.load(ir.VectorType.get((4,), i32), there, alignment=16))
    found = np.empty((GROUP // 8, 2), dtype=object)
    for v, b, p, half in np.ndindex(4, 2, 2, 2):
        asm = (
            f"{{ .reg .b32 t; shr.b32 t, $1, {8 * b + 4 * p}; "
            "lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; sub.rn.bf16x2 $0, t, $2; }"
        )
        two: Any = llvm.inline_asm(i32, [word(half, v), constant(0x43084308)], asm, "=r,r,r", asm_dialect=0)
        two = vector.broadcast(ir.VectorType.get((1,), i32), two)
        found[4 * v + 2 * b + p, half] = vector.bitcast(ir.VectorType.get((2,), bf16), two)
    layout = fragmented_array.WGMMA_LAYOUT
    registers = found.reshape(layout.registers_shape((OUTPUTS, GROUP)))
    return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
