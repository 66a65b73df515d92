"""Logical axis -> mesh axis, as a static value that a model holds; presets by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mllama_jax.config import MllamaConfig
from mllama_jax.errors import InputError

MeshAxes = str | tuple[str, ...] | None

LOGICAL_AXES = {
    "batch": "rows, of activations and caches",
    "images": "pictures on their way through the vision tower",
    "seq": "positions of activations",
    "residual": "the width of activations between blocks",
    "cache": "positions of the self-attention cache",
    "image_seq": "positions of the image cache",
    "kv_heads": "key/value heads, of parameters, activations and caches",
    "q_heads": "query heads of one key/value head, of parameters",
    "queries": "the same, of queries on their way to the cache",
    "heads": "all query heads side by side: what attention gives to its output kernel",
    "head_dim": "the width of a head",
    "mlp": "the MLP's hidden width",
    "vocab": "the vocabulary, of the output head",
    "embedding": "the width of the embedding table",
    "embed": "the residual's width, of all other parameters",
    "features": "the vision tower's output width, of the projector",
    "vision_heads": "heads of the vision tower",
    "vision_mlp": "the hidden width of the vision tower's MLP",
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """Where each logical axis lies on `mesh`. Hashable: a jitted function that holds it is traced when it changes."""

    mesh: Mesh | AbstractMesh
    table: tuple[tuple[str, MeshAxes], ...]
    peers: jax.Array | None = dataclasses.field(default=None, compare=False)  # within a program, see `gpu_peers`

    @classmethod
    def of(cls, mesh: Mesh | AbstractMesh, table: Mapping[str, MeshAxes]) -> Rules:
        """Rules from a dictionary; an axis that it leaves out is not split. Raises InputError on unknown names."""
        if unknown := sorted(set(table) - set(LOGICAL_AXES)):
            raise InputError(f"rules: unknown logical axes {unknown}; known are {', '.join(LOGICAL_AXES)}")
        used = {axis for axes in table.values() for axis in _tuple(axes)}
        if missing := sorted(used - set(mesh.axis_names)):
            raise InputError(f"mesh: expected axes {sorted(used)}, got {list(mesh.axis_names)}; {missing} are missing")
        return cls(mesh, tuple(table.items()))

    def among(self, peers: jax.Array) -> Rules:
        """The same within a program in which devices send each other few rows by `gpu_peers`."""
        return dataclasses.replace(self, peers=peers)

    def axes(self, name: str | None) -> tuple[str, ...]:
        """The mesh axes of a logical axis."""
        return _tuple(dict(self.table).get(name) if name else None)

    def parts(self, name: str | None) -> int:
        """In how many parts a logical axis is split."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(name))

    def spec(self, *names: str | None) -> PartitionSpec:
        return PartitionSpec(*(self.axes(name) or None for name in names))

    def sharding(self, *names: str | None) -> NamedSharding:
        used = [axis for name in names for axis in self.axes(name)]
        if twice := sorted({axis for axis in used if used.count(axis) > 1}):
            clash = [name for name in names if set(self.axes(name)) & set(twice)]
            raise InputError(
                f"rules: an array with the axes {list(names)} would be split twice over {twice}, by {clash}; "
                "give these different mesh axes"
            )
        return NamedSharding(self.mesh, self.spec(*names))

    def __call__(self, x: jax.Array, *names: str | None) -> jax.Array:
        """Place an activation by the logical names of its axes: the model's `constrain`."""
        return jax.lax.with_sharding_constraint(x, self.sharding(*names))

    @property
    def platform(self) -> str:
        """What its devices are, be they here or only compiled for."""
        return self.mesh.devices.flat[0].platform if isinstance(self.mesh, Mesh) else jax.default_backend()

    def local(
        self, function: Callable, inputs: Sequence[tuple[str | None, ...]], output: tuple[str | None, ...]
    ) -> Callable:
        """`function`, run by each device on its own parts of arrays whose axes have these logical names."""
        specs = tuple(self.spec(*names) for names in inputs)
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=self.spec(*output), check_vma=False)

    def describe_mesh(self) -> str:
        return "mesh (" + ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items()) + ")"


def _tuple(axes: MeshAxes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


# Heads and caches over `kv`, what divides further over (`kv`, `q`); activations stay whole between blocks, so that a
# layer costs two all-reduces. The embedding table is split by width: 16 does not divide its height with 8 extra rows.
_SERVE: dict[str, MeshAxes] = {
    "batch": "data",
    "images": "data",
    "kv_heads": "kv",
    "q_heads": "q",
    "queries": "q",
    "heads": ("kv", "q"),
    "mlp": ("kv", "q"),
    "vocab": ("kv", "q"),
    "embedding": ("kv", "q"),
    "vision_heads": ("kv", "q"),
    "vision_mlp": ("kv", "q"),
}
_FSDP: dict[str, MeshAxes] = {"batch": "fsdp", "images": "fsdp", "embed": "fsdp", "embedding": "fsdp"}
_TENSOR = ("kv_heads", "heads", "mlp", "vocab", "vision_heads", "vision_mlp")

PRESETS: dict[str, dict[str, MeshAxes]] = {
    # Tensor-parallel over all devices as far as heads go, rows over what is left.
    "serve": _SERVE,
    # Caches also by position, over the devices that key/value heads cannot use; for few rows of very many tokens.
    # Over `data` as well XLA's partitioner gives wrong numbers (jax 0.10.2, mesh (2, 2, 2), positions over data and q).
    "long-context": _SERVE | {"queries": None, "cache": "q", "image_seq": "q"},
    # Replicas that share out the rows, each of one device if no larger group is asked for.
    "evaluate": _SERVE,
    # Training: every parameter over all devices, rows too.
    "fsdp": _FSDP,
    # Training: the same between groups that split heads and hidden widths.
    "fsdp+tensor": _FSDP | dict.fromkeys(_TENSOR, "tensor"),
}


def mesh_axes(
    preset: str, config: MllamaConfig, devices: int, group: int | None = None, slices: int = 1
) -> dict[str, int]:
    """The sizes of a preset's mesh axes on so many devices, of so many slices: no group spans two.

    Args:
        group: how many devices share one copy of the computation of a row; by default all that can for `serve` and
            `long-context`, one for `evaluate` and `fsdp`, and up to the square root of `devices` for `fsdp+tensor`.

    Raises:
        InputError: the preset is unknown, or `group` does not divide the devices of a slice or the heads.
    """
    check_preset(preset)
    near = devices // slices
    heads, queries = config.text.kv_heads, config.text.heads // config.text.kv_heads
    if preset == "fsdp":
        if group not in (None, 1):
            raise InputError(f"fsdp: every device computes rows of its own, got groups of {group}; take fsdp+tensor")
        return {"fsdp": devices}
    if preset == "fsdp+tensor":
        tensor = _divisor(near, heads, math.isqrt(devices)) if group is None else group
        _check_group(preset, tensor, near, heads)
        return {"fsdp": devices // tensor, "tensor": tensor}
    if group is None:
        group = 1 if preset == "evaluate" else _divisor(near, heads * queries, near)
    _check_group(preset, group, near, heads * queries)
    kv = math.gcd(group, heads)
    if queries % (group // kv):
        raise InputError(f"{preset}: {group} devices cannot share {heads} key/value heads of {queries} query heads")
    return {"data": devices // group, "kv": kv, "q": group // kv}


def preset_rules(preset: str, config: MllamaConfig, mesh: Mesh | AbstractMesh) -> Rules:
    """The rules of a preset on a mesh that has its axes."""
    check_preset(preset)
    rules = Rules.of(mesh, PRESETS[preset])
    if config.vision is not None and config.vision.heads % rules.parts("vision_heads"):
        # The tower has fewer heads than such a group has devices: they follow the key/value heads.
        rules = Rules.of(mesh, PRESETS[preset] | {"vision_heads": "kv"})
    return rules


def check_preset(preset: str) -> None:
    if preset not in PRESETS:
        raise InputError(f"preset {preset!r} is not known; known are {', '.join(PRESETS)}")


def _divisor(devices: int, of: int, most: int) -> int:
    """The largest number up to `most` that divides both `devices` and `of`."""
    return max(n for n in range(1, max(most, 1) + 1) if devices % n == 0 and of % n == 0)


def _check_group(preset: str, group: int, devices: int, heads: int) -> None:
    if group < 1 or devices % group or heads % group:
        works = [n for n in range(1, devices + 1) if devices % n == 0 and heads % n == 0]
        raise InputError(
            f"{preset}: groups of {group} must divide a slice's {devices} devices and {heads} heads; {works} do"
        )
