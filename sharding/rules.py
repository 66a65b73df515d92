"""Logical axis -> mesh axis, as a static value that a model holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllama_jax.errors import InputError

MeshAxes = str | tuple[str, ...] | None

# Heads and caches over `kv`, what divides further over (`kv`, `q`); activations stay whole between blocks, so that a
# layer costs two all-reduces. The embedding table is split by width: 16 does not divide its height with 8 extra rows.
SERVE: dict[str, MeshAxes] = {
    "batch": "data",
    "kv_heads": "kv",
    "q_heads": "q",
    "heads": ("kv", "q"),
    "mlp": ("kv", "q"),
    "vocab": ("kv", "q"),
    "embedding": ("kv", "q"),
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """Where each logical axis lies on `mesh`. Hashable: a jitted function that holds it is traced when it changes."""

    mesh: Mesh
    table: tuple[tuple[str, MeshAxes], ...]

    @classmethod
    def of(cls, mesh: Mesh, table: Mapping[str, MeshAxes]) -> Rules:
        used = {axis for axes in table.values() for axis in ((axes,) if isinstance(axes, str) else axes or ())}
        if missing := sorted(used - set(mesh.axis_names)):
            raise InputError(f"mesh: expected axes {sorted(used)}, got {list(mesh.axis_names)}; {missing} are missing")
        return cls(mesh, tuple(table.items()))

    def sharding(self, *axes: str | None) -> NamedSharding:
        table = dict(self.table)
        return NamedSharding(self.mesh, PartitionSpec(*(table.get(axis) if axis else None for axis in axes)))

    def __call__(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Place an activation by the logical names of its axes: the model's `constrain`."""
        return jax.lax.with_sharding_constraint(x, self.sharding(*axes))
