"""Logical axis -> mesh axis, as a static value that a model holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
        return cls(mesh, tuple(table.items()))

    def sharding(self, *axes: str | None) -> NamedSharding:
        table = dict(self.table)
        return NamedSharding(self.mesh, PartitionSpec(*(table.get(axis) if axis else None for axis in axes)))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Place an activation by the logical names of its axes."""
        return jax.lax.with_sharding_constraint(x, self.sharding(*axes))
