"""What a decode step sends between the GPUs of one process: Pallas kernels that store into their peers' memory.

Two bfloat16 numbers travel with a flag in one store of eight bytes, as in NCCL's LL protocol, so that no barrier is
needed: who finds the flag has the numbers. A row's sum takes 2.5 us over two H200, 3.6 over four with a small kernel
behind it, where XLA's kernel and NCCL's take 22 to 30; and a program without their collectives is one CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllama_jax.config import TextConfig
from mllama_jax.model.layers import Axes, Constrain, on_hopper, unconstrained

# Words, of two numbers, that fit into a sum over an axis, and into what is gathered along one: 32 rows of a width of
# 8,192 and a vocabulary of 131,072.
SUMS = {"heads": 1 << 17, "mlp": 1 << 17}
GATHERED = {"embedding": 1 << 17, "vocab": 1 << 21}
WARPS = 8
BLOCK = 32 * WARPS  # a word for each thread: were there fewer, two threads would wait for the same one
PATIENCE = 1 << 30  # looks at a slot, minutes: where a peer has failed a device fails too, rather than hang
IN_TURN = threading.Lock()  # of dispatches: on all devices the same comes first
_MAKING = threading.Lock()  # of slots: a mesh has them once


@functools.cache
def peers(constrain: Constrain, text: TextConfig, dtype: jnp.dtype, rows: int) -> jax.Array | None:
    """What each device must know of its peers to decode so many rows, or None where XLA's collectives are taken.

    int32 [parts of the batch, n, 2 (n + 1) + 1], of n devices that share a row: the addresses of their slots, in two
    halves each, those of its own, and which of them it is.
    """
    mesh = constrain.mesh
    if not isinstance(mesh, Mesh) or dtype != jnp.bfloat16 or not on_hopper(constrain, dtype):
        return None
    batch, own = constrain.axes("batch"), constrain.axes("heads")
    groups, n = constrain.parts("batch"), constrain.parts("heads")
    sizes = {"heads": text.width, "mlp": text.width, "embedding": text.width, "vocab": text.vocab}
    alike = all(constrain.axes(name) == own for name in sizes) and not text.tied
    alone = all(constrain.parts(name) == 1 for name in ("cache", "image_seq", "seq", "residual"))
    shared = {*batch, *own} == {*mesh.axis_names} and groups * n == mesh.size
    whole = rows % groups == 0 and all(size % (2 * n) == 0 for size in sizes.values())
    if n == 1 or not (alike and alone and shared and whole):
        return None
    words = {name: rows // groups * size // 2 for name, size in sizes.items()}
    fits = all(_padded(words[name]) <= most for name, most in SUMS.items())
    fits &= all(n * _padded(words[name] // n) <= most for name, most in GATHERED.items())
    if not fits or not _reach_each_other([*mesh.devices.flat]):
        return None
    with _MAKING:
        return _peers(mesh, batch, own)[0]


def _padded(words: int) -> int:
    """As many as whole blocks have."""
    return -(-words // BLOCK) * BLOCK


def _reach_each_other(devices: Sequence[Any]) -> bool:
    """Whether these GPUs are this process's and may write to each other's memory, which JAX then lets them."""
    if any(device.process_index != jax.process_index() for device in devices):
        return False
    cuda, answer = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    pairs = itertools.permutations([device.local_hardware_id for device in devices], 2)
    return all(cuda.cuDeviceCanAccessPeer(ctypes.byref(answer), *pair) == 0 and answer.value for pair in pairs)


@functools.cache
def _peers(mesh: Mesh, batch: tuple[str, ...], own: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """`peers`, and the slots, which live as long: int32 [parts of the batch, n, words, number and flag]."""
    groups, n = (math.prod(mesh.shape[axis] for axis in axes) for axes in (batch, own))
    sharding = NamedSharding(mesh, PartitionSpec(batch, own))
    shape = groups, n, sum(_room(n).values()), 2
    slots = jax.jit(lambda: jnp.zeros(shape, jnp.int32), out_shardings=sharding)().block_until_ready()
    at = np.zeros((groups, n), np.uint64)
    for shard in slots.addressable_shards:
        at[shard.index[:2]] = shard.data.unsafe_buffer_pointer()
    table = np.zeros((groups, n, 2 * (n + 1) + 1), np.int32)
    table[..., : 2 * n] = at.view(np.int32)[:, None]
    table[..., 2 * n : -1] = at[..., None].view(np.int32)
    table[..., -1] = np.arange(n)
    return jax.device_put(table, sharding), slots


def _room(n: int) -> dict[str, int]:
    """The slots for what goes over an axis. Each axis has its own: while a device still reads what came over one,
    others may be ahead and send over the next."""
    return {axis: n * words for axis, words in SUMS.items()} | GATHERED


def _first(axis: str, n: int) -> int:
    room = _room(n)
    return sum(room[name] for name in itertools.takewhile(lambda name: name != axis, room))


# ---- In a model ---------------------------------------------------------------------------------------------------


def summed(
    product: Callable[..., jax.Array], axes: Axes, constrain: Constrain, x: jax.Array, *weights: jax.Array
) -> jax.Array:
    """`product(constrain, x, *weights)` of x [B, ..., in] and a kernel [out..., in] whose logical axes these are, of
    which the last is one of SUMS: the devices' parts, added."""
    *outputs, inside = axes
    assert inside is not None
    batch: Axes = ("batch", *(None,) * (x.ndim - 2))

    def own(peers: jax.Array, x: jax.Array, *weights: jax.Array) -> jax.Array:
        return all_reduce(product(unconstrained, x, *weights), peers[0, 0], inside)

    inputs = (("batch", inside, None), (*batch, inside), *(axes[: each.ndim] for each in weights))
    return constrain.local(own, inputs, (*batch, *outputs))(constrain.peers, x, *weights)


def gathered(x: jax.Array, axis: str, constrain: Constrain) -> jax.Array:
    """x [B, ..., D] of which the devices have parts along its last axis, one of GATHERED: whole on all."""
    batch: Axes = ("batch", *(None,) * (x.ndim - 2))

    def own(peers: jax.Array, x: jax.Array) -> jax.Array:
        return all_gather(x, peers[0, 0], axis)

    return constrain.local(own, (("batch", axis, None), (*batch, axis)), (*batch, None))(constrain.peers, x)


# ---- Kernels ------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="axis")  # so that a kernel is lowered once for all layers
def all_reduce(x: jax.Array, peers: jax.Array, axis: str) -> jax.Array:
    """The sum of the devices' x, bfloat16, in float32 and in their order: the same numbers on each.

    `peers` is a device's own row of them. Between two sums over an axis there must be one over another.
    """
    words, n = _words(x), peers.size // 2 - 1
    block = pl.BlockSpec((BLOCK,), lambda i: (i,))
    body = functools.partial(_add, n, words.size, _first(axis, n))
    sums = _kernel("all_reduce", body, (words.size // BLOCK,), block, block, words.shape)(words, peers)
    return _numbers(sums, x.size).reshape(x.shape)


@functools.partial(jax.jit, static_argnames="axis")
def all_gather(x: jax.Array, peers: jax.Array, axis: str) -> jax.Array:
    """The devices' x [..., D], bfloat16, side by side: [..., n D]. No axis comes twice in a row here either."""
    words, n = _words(x), peers.size // 2 - 1
    one, part = pl.BlockSpec((BLOCK,), lambda s, i: (i,)), pl.BlockSpec((None, BLOCK), lambda s, i: (s, i))
    body = functools.partial(_put, n, words.size, _first(axis, n))
    parts = _kernel("all_gather", body, (n, words.size // BLOCK), one, part, (n, words.size))(words, peers)
    parts = jax.vmap(lambda words: _numbers(words, x.size))(parts).reshape(n, *x.shape)
    return jnp.moveaxis(parts, 0, -2).reshape(*x.shape[:-1], -1)


def _words(x: jax.Array) -> jax.Array:
    """Pairs of numbers as int32, as many as whole blocks have."""
    words = jax.lax.bitcast_convert_type(x.reshape(-1, 2), jnp.int32)
    return jnp.pad(words, (0, _padded(words.size) - words.size))


def _numbers(words: jax.Array, size: int) -> jax.Array:
    return jax.lax.bitcast_convert_type(words, jnp.bfloat16).reshape(-1)[:size]


def _kernel(
    name: str, body: Callable, grid: tuple[int, ...], words: pl.BlockSpec, out: pl.BlockSpec, shape: tuple[int, ...]
) -> Callable[..., jax.Array]:
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=[words, pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=out,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.int32),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        name=name,
    )


def _add(n: int, size: int, first: int, words: Any, peers: Any, sums: Any) -> None:
    """A block of a sum. Each device has a place in everyone's slots, and all places are added up."""
    at = first + pl.program_id(0) * BLOCK + jnp.arange(BLOCK)
    sums[...] = _run(adding(n, size), words[...], at + peers[2 * (n + 1)] * size, at, peers)


def _put(n: int, size: int, first: int, words: Any, peers: Any, part: Any) -> None:
    """A block of a device's part. Whose own it is, puts it into everyone's slots."""
    source = pl.program_id(0)
    at = first + source * size + pl.program_id(1) * BLOCK + jnp.arange(BLOCK)
    own = jnp.where(source == peers[2 * (n + 1)], jnp.ones(BLOCK, jnp.int32), 0)
    part[...] = _run(putting(n), words[...], at, own, peers)


def _run(assembly: str, words: jax.Array, at: jax.Array, other: jax.Array, peers: Any) -> jax.Array:
    """Run PTX once for each word. JAX says of all PTX that it is pure, so a kernel has one such result and stores it:
    what was left out, doubled or merged would send less or wait for more than there is."""
    addresses = [jnp.full(BLOCK, peers[i]) for i in range(peers.shape[0] - 1)]
    [found] = triton.elementwise_inline_asm(
        assembly,
        args=[words, at, other, *addresses],
        constraints="=r" + ",r" * (3 + len(addresses)),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct((BLOCK,), jnp.int32)],
    )
    return found


def adding(n: int, size: int) -> str:
    """PTX for a word of a sum: $0 of what n devices give, from $1 on, the own slot $2 and the first that is read $3."""
    lines = ["mov.f32 low, 0f00000000;", "mov.f32 high, 0f00000000;"]
    for i in range(n):
        lines += [f"shl.b32 half, word{i}, 16;", "mov.b32 number, half;", "add.f32 low, low, number;"]
        lines += [f"and.b32 half, word{i}, 0xffff0000;", "mov.b32 number, half;", "add.f32 high, high, number;"]
    return _exchange(n, [], range(n), "$3", size, [*lines, "cvt.rn.bf16x2.f32 $0, high, low;"])


def putting(n: int) -> str:
    """PTX for a word that one device gives to all: $0 is what comes to the slot $2, $1 what goes there if $3."""
    mine = "setp.ne.u32 mine, $3, 0;"
    return _exchange(n, [mine], range(1), "$2", 0, ["mov.b32 $0, word0;"], when="@mine ")


def _exchange(n: int, before: list[str], sources: range, first: str, size: int, then: list[str], when: str = "") -> str:
    """PTX that sends $1 to the slot $2 of n devices, waits until the own slots from `first` on, `size` apart, are full
    and leaves them empty. From $4 on are addresses in two halves each: the devices' in order, and the own."""
    lines = [
        ".reg .pred mine, again, late;",
        ".reg .b32 half, full, looks;",
        ".reg .f32 low, high, number;",
        f".reg .b32 word<{n}>, full<{n}>;",
        f".reg .b64 own, to, sent, empty, slot<{n}>, found<{n}>;",
        *before,
        "mov.b64 sent, {$1, 1};",
    ]
    for i in range(n):
        lines += [f"mov.b64 to, {{${4 + 2 * i}, ${5 + 2 * i}}};", "mad.wide.u32 to, $2, 8, to;"]
        lines += [f"{when}st.relaxed.sys.global.b64 [to], sent;"]
    lines += [f"mov.b64 own, {{${4 + 2 * n}, ${5 + 2 * n}}};", f"mad.wide.u32 slot0, {first}, 8, own;"]
    lines += [f"add.u64 slot{i}, slot{i - 1}, {8 * size};" for i in sources[1:]]
    lines += ["mov.b32 looks, 0;", "look:"]
    lines += [f"ld.relaxed.sys.global.b64 found{i}, [slot{i}];" for i in sources]
    lines += [f"mov.b64 {{word{i}, full{i}}}, found{i};" for i in sources]
    lines += ["mov.b32 full, full0;", *(f"and.b32 full, full, full{i};" for i in sources[1:])]
    lines += ["add.u32 looks, looks, 1;", f"setp.gt.u32 late, looks, {PATIENCE};", "@late trap;"]
    lines += ["setp.eq.u32 again, full, 0;", "@again bra look;", "mov.b64 empty, 0;"]
    lines += [f"st.relaxed.sys.global.b64 [slot{i}], empty;" for i in sources]
    return "\n".join(["{", *lines, *then, "}"])
