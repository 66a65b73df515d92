"""Slices of TPUs and hosts of GPUs: what they are called, what a device of each holds and does, and meshes of them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from mllama_jax.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of chips. Figures are of one *device*, as JAX counts them: half a chip of TPU7x.

    Attributes:
        hbm: bytes a program may use: what the TPU's compiler allows; on a GPU the card's less 2 GiB for CUDA and NCCL.
        bandwidth: bytes/s of that memory, as published.
        flops: bfloat16 FLOP/s, as published.
        link: bytes/s that a device sends to its neighbours, over all links in one direction.
        hop: seconds from one device to the next, about 1 us on a TPU (jax-ml.github.io/scaling-book).
        devices: JAX devices a chip.
        cores: what Cloud names count a chip as: `v5p-8` has four chips of two cores.
        shapes: the slices there are, chips along each physical axis.
        kinds: what JAX calls a device of it.
    """

    name: str
    hbm: float
    bandwidth: float
    flops: float
    link: float
    shapes: tuple[tuple[int, ...], ...]
    cloud: str
    kinds: tuple[str, ...]
    hop: float = 1e-6
    devices: int = 1
    cores: int = 1
    platform: str = "tpu"


def _shapes(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(n) for n in shape.split("x")) for shape in text.split())


_FLAT = _shapes("1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16")
_CUBE = _shapes("1x1x1 2x1x1 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8")
_HOST = _shapes("1 2 4 8")

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 15.75 * GIB, 819e9, 197e12, 200e9, _FLAT, "v5litepod", ("TPU v5 lite", "TPU v5e")),
        Chip("v6e", 31.24 * GIB, 1638e9, 918e12, 400e9, _FLAT, "v6e", ("TPU v6 lite", "TPU v6e")),
        Chip("v5p", 95.73 * GIB, 2765e9, 459e12, 600e9, _CUBE, "v5p", ("TPU v5", "TPU v5p"), cores=2),
        Chip("tpu7x", 94.74 * GIB, 3690e9, 1153.5e12, 300e9, _CUBE, "tpu7x", ("TPU7x", "TPU v7x"), devices=2, cores=2),
        Chip("h100", 76 * GIB, 3350e9, 989e12, 450e9, _HOST, "a3-highgpu", ("NVIDIA H100 80GB HBM3",), platform="gpu"),
        Chip("h200", 137 * GIB, 4800e9, 989e12, 450e9, _HOST, "a3-ultragpu", ("NVIDIA H200",), platform="gpu"),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` equal slices of chips, joined by the data centre's network."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As the compiler calls it: `v6e:2x4`; several slices of it: `2xv6e:2x4`."""
        one = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return one if self.slices == 1 else f"{self.slices}x{one}"

    @property
    def cloud(self) -> str:
        """What Google Cloud calls one slice or host: `v6e-8`, `v5p-8`, `a3-highgpu-8g`."""
        chips = math.prod(self.shape)
        gpus = self.chip.platform == "gpu"
        return f"{self.chip.cloud}-{chips}g" if gpus else f"{self.chip.cloud}-{chips * self.chip.cores}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def hops(self) -> int:
        """Links between the two devices of a slice that are farthest apart; rings only close along axes of 4 chips
        (v5p, TPU7x) or 16 (v5e, v6e)."""
        ring = 4 if len(self.shape) == 3 else 16
        return max(sum(n // 2 if n % ring == 0 else n - 1 for n in self.shape), self.devices > 1)

    def compile_devices(self) -> Sequence[Any]:
        """Devices to compile for, without having any."""
        from mllama_jax.sharding.compiler import tpu_topology

        return tpu_topology(f"{self.chip.name}:{'x'.join(map(str, self.shape))}", self.slices)


def topology(name: str) -> Topology:
    """Read a name as the compiler (`v6e:2x4`) or Google Cloud (`v6e-8`, `v5p-8`, `a3-highgpu-8g`) writes it.

    Several slices have their number in front: `2xv6e:4x4`. Raises InputError, which lists the known names.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*(?:-\w*gpu)?)([:-])([\dx]+?)g?", name.lower())
    if found:
        count, kind, mark, size = found.groups()
        chip = next((c for c in CHIPS.values() if kind in (c.name, c.cloud)), None)
        slices = int(count or 1)
        if chip and slices and (chip.platform == "tpu" or slices == 1):
            cores = chip.cores if chip.platform == "tpu" else 1
            for shape in chip.shapes:
                exact = mark == ":" and "x".join(map(str, shape)) == size
                if exact or (mark == "-" and str(math.prod(shape) * cores) == size):
                    return Topology(chip, shape, slices)
    known = "; ".join(f"{c.name}:{{{','.join('x'.join(map(str, s)) for s in c.shapes)}}}" for c in CHIPS.values())
    raise InputError(f"topology {name!r} is not known; known are {known}, their Cloud names (v6e-8), 2xNAME for slices")


def topology_of(devices: Sequence[Any]) -> Topology | None:
    """The slice or host that these devices are, where its chips are known."""
    for chip in CHIPS.values():
        if devices[0].device_kind in chip.kinds:
            shapes = [shape for shape in chip.shapes if math.prod(shape) * chip.devices == len(devices)]
            return Topology(chip, shapes[0]) if shapes else None
    return None


def slices_of(devices: Sequence[Any]) -> int:
    """In how many slices devices lie."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any]) -> Mesh:
    """A mesh with these axes, in order, in which neighbours are neighbours on the wire.

    Devices of several slices are split between the slices along the first axis. Raises InputError where the sizes
    do not multiply to the number of devices.
    """
    shape, named = tuple(axes.values()), ", ".join(f"{axis} {size}" for axis, size in axes.items())
    if math.prod(shape) != len(devices):
        raise InputError(
            f"mesh ({named}) takes {math.prod(shape)} devices, there are {len(devices)}; sizes must multiply to that"
        )
    slices = slices_of(devices)
    if shape[0] % slices:
        first = next(iter(axes))
        raise InputError(f"mesh ({named}): {first} must be a multiple of the {slices} slices that it spans")
    if slices > 1:
        placed = mesh_utils.create_hybrid_device_mesh(
            (shape[0] // slices, *shape[1:]),
            (slices, *(1,) * (len(shape) - 1)),
            devices,
            allow_split_physical_axes=True,
        )
    else:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    placed = _along_the_wire(np.asarray(placed))
    return Mesh(placed, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def _along_the_wire(placed: np.ndarray) -> np.ndarray:
    """Reorder each mesh axis so that it winds through the chips that it spans, instead of jumping from row to row."""
    if not hasattr(placed.flat[0], "core_on_chip"):  # GPUs have coordinates of another kind
        return placed
    for axis in range(placed.ndim):
        line = np.moveaxis(placed, axis, 0).reshape(placed.shape[axis], -1)[:, 0]
        coordinates = np.array(
            [(getattr(device, "slice_index", 0), *device.coords, device.core_on_chip) for device in line]
        )
        placed = placed.take(_winding(coordinates), axis)
    return placed


def _winding(coordinates: np.ndarray) -> np.ndarray:
    """The order int [n] in which points int [n, dims] of a grid are each beside the last, the longest rows unbroken."""
    ranks = [np.unique(column, return_inverse=True)[1] for column in coordinates.T]
    place, keys = np.zeros(len(coordinates), int), []
    for rank in sorted(ranks, key=lambda rank: rank.max()):
        size = rank.max() + 1
        keys.append(np.where(place % 2, size - 1 - rank, rank))
        place = place * size + keys[-1]
    return np.argsort(place, kind="stable")
