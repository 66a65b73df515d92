"""Sums of few rows over the GPUs of one process: a Pallas kernel that stores into its peers' memory.

Two bfloat16 numbers travel with a flag in one store of eight bytes, as in NCCL's LL protocol, so that no barrier is
needed: who finds the flag has the numbers. For a row over four H200 that takes 2 to 3 us, where XLA's kernel and
NCCL's take 22 to 30.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllama_jax.model.layers import Axes, Constrain, on_hopper, unconstrained

MOST = 1 << 17  # words of two numbers in a sum: 32 rows of 8,192
BLOCK, WARPS = 256, 8
PATIENCE = 1 << 27  # looks at a slot, 100 s or more: a device whose peer failed fails too, rather than hang
SUMS = ("heads", "mlp")  # what a layer adds up over, in turn; each has slots of its own


def peers(constrain: Constrain) -> jax.Array | None:
    """What each device of a mesh must know of its peers, or None where the sums are XLA's.

    int32 [parts of the batch, n, 2 (n + 1) + 1], of n devices that add up: the addresses of their slots, in two halves
    each, those of its own, and which of them it is.
    """
    mesh = constrain.mesh
    if not isinstance(mesh, Mesh) or not on_hopper(constrain, jnp.dtype("bfloat16")):
        return None
    batch, inside = constrain.axes("batch"), constrain.axes(SUMS[0])
    alike = all(constrain.axes(name) == inside for name in SUMS) and {*batch, *inside} == {*mesh.axis_names}
    if not alike or mesh.size == constrain.parts("batch") or not _reach_each_other(mesh.devices.flat):
        return None
    return _peers(mesh, batch, inside)[0]


def _reach_each_other(devices: Sequence[Any]) -> bool:
    """Whether these GPUs are this process's and write to each other's memory, which JAX has then allowed."""
    if any(device.process_index != jax.process_index() for device in devices):
        return False
    cuda, answer = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    pairs = itertools.permutations([device.local_hardware_id for device in devices], 2)
    return all(cuda.cuDeviceCanAccessPeer(ctypes.byref(answer), *pair) == 0 and answer.value for pair in pairs)


@functools.cache
def _peers(mesh: Mesh, batch: tuple[str, ...], inside: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """`peers`, and the slots, which live as long: int32 [parts, n, sums, n, MOST, number and flag]."""
    groups, n = (math.prod(mesh.shape[axis] for axis in axes) for axes in (batch, inside))
    sharding = NamedSharding(mesh, PartitionSpec(batch, inside))
    with jax.ensure_compile_time_eval():
        shape = (groups, n, len(SUMS), n, MOST, 2)
        slots = jax.jit(lambda: jnp.zeros(shape, jnp.int32), out_shardings=sharding)().block_until_ready()
        at = np.zeros((groups, n), np.uint64)
        for shard in slots.addressable_shards:
            at[shard.index[:2]] = shard.data.unsafe_buffer_pointer()
        table = np.zeros((groups, n, 2 * (n + 1) + 1), np.int32)
        table[..., : 2 * n] = at.view(np.int32)[:, None]
        table[..., 2 * n : -1] = at[..., None].view(np.int32)
        table[..., -1] = np.arange(n)
        return jax.device_put(table, sharding), slots


def summed(
    product: Callable[..., jax.Array], axes: Axes, constrain: Constrain, x: jax.Array, *weights: jax.Array
) -> jax.Array | None:
    """`product(constrain, x, *weights)`, of a row's next token each, with the devices' parts added by `all_reduce`.

    `axes` are the kernel's logical ones. None where the sum is XLA's, or there is none.
    """
    *outputs, inside = axes
    rows, left = divmod(x.shape[0], constrain.parts("batch"))
    words, odd = divmod(rows * math.prod(weights[0].shape[:-1]), 2)
    small = x.shape[1:-1] == (1,) and words <= MOST and not (left or odd or words % BLOCK)
    if inside not in SUMS or any(constrain.parts(out) > 1 for out in outputs) or not small:
        return None

    def own(peers: jax.Array, x: jax.Array, *weights: jax.Array) -> jax.Array:
        return all_reduce(product(unconstrained, x, *weights), peers[0, 0], SUMS.index(inside))

    batch = ("batch", None)
    inputs = (("batch", inside, None), (*batch, inside), *(axes[: each.ndim] for each in weights))
    return constrain.local(own, inputs, (*batch, *outputs))(constrain.peers, x, *weights)


@functools.partial(jax.jit, static_argnums=2)  # so that the kernel is lowered once for all layers
def all_reduce(x: jax.Array, peers: jax.Array, turn: int) -> jax.Array:
    """The sum of the devices' x, bfloat16, in float32 and in their order: the same numbers on each.

    Args:
        peers: a device's own row of `peers`.
        turn: 0 or 1, never twice the same: while a device still reads what came in one turn, those that are ahead
            write to the slots of the other.
    """
    words = jax.lax.bitcast_convert_type(x.reshape(-1, 2), jnp.int32)
    block = pl.BlockSpec((BLOCK,), lambda i: (i,))
    sums = pl.pallas_call(
        functools.partial(_block, turn),
        grid=(words.size // BLOCK,),
        in_specs=[block, pl.BlockSpec(peers.shape, lambda i: (0,))],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(words.shape, jnp.int32),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        name="all_reduce",
    )(words, peers)
    return jax.lax.bitcast_convert_type(sums, jnp.bfloat16).reshape(x.shape)


def _block(turn: int, words_ref: Any, peers_ref: Any, sums_ref: Any) -> None:
    *addresses, rank = (peers_ref[i] + jnp.zeros(BLOCK, jnp.int32) for i in range(peers_ref.shape[0]))
    n = len(addresses) // 2 - 1
    first = turn * n * MOST + pl.program_id(0) * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
    args = [words_ref[...], first + rank * MOST, first, *addresses]
    [sums_ref[...]] = triton.elementwise_inline_asm(
        assembly(n),
        args=args,
        constraints="=r" + ",r" * len(args),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct((BLOCK,), jnp.int32)],
    )


def assembly(n: int) -> str:
    """PTX of what one thread does for a word.

    It takes ($0) from the word ($1), the slot that it has at each of n devices ($2), its first own one ($3) and
    addresses in two halves each: those of the devices, in order, and its own. A slot is empty again when it was read.
    """
    devices = range(n)
    lines = [
        ".reg .pred again, late;",
        ".reg .b32 half, flag, looks;",
        ".reg .f32 low, high, number;",
        f".reg .b32 word<{n}>, flag<{n}>;",
        f".reg .b64 own, to, sent, empty, slot<{n}>, found<{n}>;",
        "mov.b64 sent, {$1, 1};",
    ]
    for i in devices:
        lines += [f"mov.b64 to, {{${4 + 2 * i}, ${5 + 2 * i}}};", "mad.wide.u32 to, $2, 8, to;"]
        lines += ["st.relaxed.sys.global.b64 [to], sent;"]
    lines += [f"mov.b64 own, {{${4 + 2 * n}, ${5 + 2 * n}}};", "mad.wide.u32 slot0, $3, 8, own;"]
    lines += [f"add.u64 slot{i}, slot{i - 1}, {8 * MOST};" for i in devices[1:]]
    lines += ["mov.b32 looks, 0;", "look:"]
    lines += [f"ld.relaxed.sys.global.b64 found{i}, [slot{i}];" for i in devices]
    lines += [f"mov.b64 {{word{i}, flag{i}}}, found{i};" for i in devices]
    lines += ["mov.b32 flag, flag0;", *(f"and.b32 flag, flag, flag{i};" for i in devices[1:])]
    lines += ["add.u32 looks, looks, 1;", f"setp.gt.u32 late, looks, {PATIENCE};", "@late trap;"]
    lines += ["setp.eq.u32 again, flag, 0;", "@again bra look;"]
    lines += ["mov.b64 empty, 0;", *(f"st.relaxed.sys.global.b64 [slot{i}], empty;" for i in devices)]
    lines += ["mov.f32 low, 0f00000000;", "mov.f32 high, 0f00000000;"]
    for i in devices:
        lines += [f"shl.b32 half, word{i}, 16;", "mov.b32 number, half;", "add.f32 low, low, number;"]
        lines += [f"and.b32 half, word{i}, 0xffff0000;", "mov.b32 number, half;", "add.f32 high, high, number;"]
    lines += ["cvt.rn.bf16x2.f32 $0, high, low;"]
    return "\n".join(["{", *lines, "}"])
