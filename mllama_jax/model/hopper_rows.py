"""Products of up to 32 rows of activations with kernels in int4 or int8, on a Hopper GPU by one Pallas kernel: x W^T.

A warpgroup computes 64 outputs, which are the rows of the tensor cores' product W x^T, so that few activations are few
columns. One more warpgroup loads. Numbers are widened in registers and multiplied from there, by activations that are
not quantised; sums are float32 when a scale is applied.
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

OUTPUTS = 64  # of a warpgroup
BLOCKS = 132  # that run at once: multiprocessors of an H100
STAGES, ROOM = 4, 220 * 1024  # steps that are loaded ahead, and bytes that they may take
BITS = {jnp.dtype("uint8"): 4, jnp.dtype("int8"): 8}

# By bits of a number, for how many rows of activations at most this is faster than XLA's product, and for how many
# outputs and inputs of a device at least: in int8 for one row alone, by kernels as wide as the 90B's.
MOST, LEAST = {4: 32, 8: 1}, {4: OUTPUTS, 8: 8192}


def for_rows(x: jax.Array, kernel: jax.Array, scale: jax.Array, axes: Axes, constrain: Constrain) -> Callable | None:
    """`product` for activations like x; on a mesh each device has its part of a kernel with these logical axes.

    None for more rows and narrower kernels than it is made for, for other dtypes, kernels of which a part is not of
    whole groups and whole warpgroups, and where a mesh does not divide the rows, or splits them by an axis that splits
    the kernel too.
    """
    *of_outputs, inside = axes
    batch: Axes = ("batch", *(None,) * (x.ndim - 2))
    parts, inputs, bits = constrain.parts("batch"), x.shape[-1] / constrain.parts(inside), BITS[kernel.dtype]
    outputs = math.prod(kernel.shape[:-1]) / math.prod(map(constrain.parts, of_outputs))
    whole = scale.ndim < kernel.ndim or scale.shape[-1] * GROUP == x.shape[-1]
    if x.dtype != jnp.bfloat16 or not whole or outputs % OUTPUTS or inputs % GROUP:
        return None
    if math.prod(x.shape[:-1]) > MOST[bits] * parts or x.shape[0] % parts or min(outputs, inputs) < LEAST[bits]:
        return None
    if any(axis in constrain.axes("batch") for name in axes for axis in constrain.axes(name)):
        return None

    def part(*arrays: jax.Array) -> jax.Array:
        return product(*arrays)[None]

    local = constrain.local(part, ((*batch, inside), axes, axes[: scale.ndim]), (inside, *batch, *of_outputs))
    return lambda *arrays: local(*arrays).sum(axis=0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a product is shared out.

    Attributes:
        warpgroups: that compute in a block, OUTPUTS each.
        bits: of a number.
        groups: of inputs, in a step.
        splits: blocks that share the inputs.
        steps: of a block.
    """

    bits: int
    warpgroups: int
    groups: int
    splits: int
    steps: int

    @classmethod
    def of(cls, bits: int, outputs: int, groups: int) -> Plan:
        """For a kernel with so many outputs and groups of inputs.

        The widest blocks of which every multiprocessor can have rows of a kilobyte, for these read the activations
        less often; and as many splits as run at once.
        """
        row = groups * GROUP * bits // 8
        wide = (n for n in (4, 2) if outputs % (n * OUTPUTS) == 0 and outputs // (n * OUTPUTS) * row >= 1024 * BLOCKS)
        warpgroups, at_once = next(wide, 1), math.gcd(groups, 16 // bits)
        most, steps = max(BLOCKS * warpgroups * OUTPUTS // outputs, 1), groups // at_once
        splits = max(n for n in range(1, most + 1) if steps % n == 0)
        return cls(bits, warpgroups, at_once, splits, steps // splits)

    @property
    def outputs(self) -> int:
        """Of a block."""
        return self.warpgroups * OUTPUTS

    @property
    def inputs(self) -> int:
        """Of a step."""
        return self.groups * GROUP

    @property
    def width(self) -> int:
        """Of a group, in bytes."""
        return GROUP * self.bits // 8


@jax.jit  # so that the kernel is lowered once for all layers
def product(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """Activations bfloat16 [..., in] of up to 32 rows by a quantised kernel: [..., out...].

    Args:
        kernel: as `to_int4` makes it, uint8 [out..., in / 2], or `to_int8`, int8 [out..., in].
        scale: bfloat16 [out..., in / GROUP] or float32 [out...].
    """
    shape = *x.shape[:-1], *kernel.shape[:-1]
    x, kernel = (array.reshape(-1, array.shape[-1]) for array in (x, kernel))
    (rows, inputs), scale = x.shape, scale.reshape(len(kernel), -1)
    bits, columns = BITS[kernel.dtype], pl.cdiv(rows, 8) * 8
    plan, of_groups = Plan.of(bits, len(kernel), inputs // GROUP), [scale] if bits == 4 else []
    sums = gpu.kernel(
        functools.partial(_block, plan),
        out_type=jax.ShapeDtypeStruct((plan.splits, len(kernel), columns), jnp.float32),
        grid=(len(kernel) // plan.outputs, plan.splits),
        grid_names=("block", "split"),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
    )(jnp.pad(in_order(x, bits), ((0, columns - rows), (0, 0))), kernel, *of_groups)
    y = sums.sum(axis=0)[:, :rows].T
    return (y if of_groups else y * scale[:, 0]).astype(x.dtype).reshape(shape)


def in_order(x: jax.Array, bits: int) -> jax.Array:
    """x [B, in] in the order in which `_widened` has a group's numbers.

    A thread reads 16 bytes of a row at once, and has numbers of byte 4 v + 2 e + b beside those of its neighbour e.
    The four threads q of a row then have columns 2 q + e of the product with v and b; and with p, as a byte of int4
    holds two numbers, or h, as a row in int8 has twice the bytes.
    """
    orders = {4: "B (z p q v e b) -> B (z v b p q e)", 8: "B (z h q v e b) -> B (z h v b q e)"}
    z = x.shape[1] // GROUP
    return rearrange(x, orders[bits], z=z, q=4, v=4, e=2, b=2)


def _block(plan: Plan, x: Any, kernel: Any, *scale_and_y: Any) -> None:
    """What a block does: its outputs' sums over the inputs of its split, [plan.outputs, columns]."""
    *scale, y = scale_and_y
    columns, split = x.shape[0], lax.axis_index("split")
    start = lax.axis_index("block") * plan.outputs
    stages = min(STAGES, plan.steps, ROOM // (plan.groups * (plan.outputs * plan.width + columns * GROUP * 2)))

    def slot(step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.array(stages, step.dtype))

    def scoped(numbers: Any, inputs: Any, ready: Any, free: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < plan.warpgroups)
        def _() -> None:
            own = pl.ds(start + warpgroup * OUTPUTS, OUTPUTS)

            def step(i: jax.Array, acc: jax.Array) -> jax.Array:
                here, first = slot(i), (split * plan.steps + i) * plan.groups
                scales = [_column(each.at[own, first + g]) for each in scale for g in range(plan.groups)]
                gpu.barrier_wait(ready.at[here])
                rows = numbers.at[here, pl.ds(warpgroup * OUTPUTS, OUTPUTS)]
                for g in range(plan.groups):
                    w = _widened(rows.at[:, pl.ds(g * plan.width, plan.width)], plan.bits)
                    sums = _sums(w, inputs.at[here, :, pl.ds(g * GROUP, GROUP)])
                    if scales:
                        sums *= lax.broadcast_in_dim(scales[g].astype(jnp.float32), sums.shape, [0])
                    acc += sums
                gpu.barrier_arrive(free.at[here])
                return acc

            nothing = gpu.layout_cast(jnp.zeros((OUTPUTS, columns), jnp.float32), gpu.Layout.WGMMA)
            y[split, own] = lax.fori_loop(0, plan.steps, step, nothing)

        @pl.when(warpgroup == plan.warpgroups)
        def _() -> None:
            def load(step: Any, at: Any) -> None:
                across, size = split * plan.steps + step, plan.groups * plan.width
                there = kernel.at[pl.ds(start, plan.outputs), pl.ds(across * size, size)]
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
        gpu.SMEM((stages, plan.outputs, plan.groups * plan.width), kernel.dtype),
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


def _widened(numbers: Any, bits: int) -> jax.Array:
    """Bytes [OUTPUTS, GROUP bits / 8] in shared memory as bfloat16 [OUTPUTS, GROUP], in the order of `in_order`."""
    shape = gpu.ShapeDtypeStruct((OUTPUTS, GROUP), jnp.dtype("bfloat16"), layout=gpu.Layout.WGMMA)
    unpacked = functools.partial(_unpacked, bits)
    widen: Any = gpu.inline_mgpu(arg_types=(gpu.RefType(),), return_type=shape)(unpacked)
    return widen(numbers)


# Two numbers at once, from a word $1 that was shifted: below the bits 0x4300 seven bits u are the bfloat16 128 + u.
# In int4 eight was added to a number, and 136 is taken; in int8 u is taken less 128 for the sign, the eighth bit.
ASM = {
    4: "lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; sub.rn.bf16x2 $0, t, $2;",
    8: "lop3.b32 s, t, 0x00800080, $2, 0xea; lop3.b32 t, t, 0x007f007f, $2, 0xea; sub.rn.bf16x2 $0, t, s;",
}
TAKEN = {4: 0x43084308, 8: 0x43004300}


def _unpacked(bits: int, _: Any, ref: Any) -> Any:
    """What a thread has of `_widened`, in registers of two numbers."""
    i32, bf16 = ir.IntegerType.get_signless(32), ir.BF16Type.get()

    def constant(x: int) -> Any:
        return arith.constant(i32, ir.IntegerAttr.get(i32, x))

    def word(half: int, h: int, v: int) -> Any:
        return vector.extract(words[half, h], dynamic_position=[], static_position=[v])

    (pitch, _), _ = ir.MemRefType(ref.type).get_strides_and_offset()
    thread, base = utils.thread_idx(), utils.memref_ptr(ref)
    lane, warp = arith.andi(thread, constant(31)), arith.andi(arith.shrui(thread, constant(5)), constant(3))
    row = arith.addi(arith.muli(warp, constant(16)), arith.shrui(lane, constant(2)))
    at = arith.addi(arith.muli(row, constant(pitch)), arith.muli(arith.andi(lane, constant(3)), constant(16)))
    words = {}
    for half, h in np.ndindex(2, bits // 4):
        offset = arith.addi(at, constant(8 * pitch * half + 64 * h))
        i8, free = ir.IntegerType.get_signless(8), llvm.GEPNoWrapFlags.none
        there = llvm.getelementptr(base.type, base, [offset], [-(2**31)], i8, free)
        words[half, h] = llvm.load(ir.VectorType.get((4,), i32), there, alignment=16)
    found = []
    for h, v, b, p, half in np.ndindex(bits // 4, 4, 2, 8 // bits, 2):
        asm = f"{{ .reg .b32 s, t; shr.b32 t, $1, {8 * b + 4 * p}; {ASM[bits]} }}"
        operands = [word(half, h, v), constant(TAKEN[bits])]
        two: Any = llvm.inline_asm(i32, operands, asm, "=r,r,r", asm_dialect=0)
        two = vector.broadcast(ir.VectorType.get((1,), i32), two)
        found.append(vector.bitcast(ir.VectorType.get((2,), bf16), two))
    layout, registers = fragmented_array.WGMMA_LAYOUT, np.empty(len(found), dtype=object)
    registers[:] = found
    registers = registers.reshape(layout.registers_shape((OUTPUTS, GROUP)))
    return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
