"""One of several processes that meet; run by test_processes.py.

python -m mllama_jax.run tests/process.py COORDINATOR NUMBER COUNT ...

add FLAG                          agree on FLAG, add numbers up until killed
load DIRECTORY DTYPE              load
model DIRECTORY KV TARGET         load on a mesh of KV groups of key/value heads, generate, save to TARGET
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mllama_jax
from mllama_jax import loading, processes
from mllama_jax.sharding.mesh import make_mesh
from tests.sharded import rows


def add() -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))
    everywhere, parts = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("x",)))
    total = jax.jit(lambda x: x.sum(), out_shardings=everywhere)
    ones = jax.make_array_from_callback((12,), parts, lambda index: np.ones(12, np.float32)[index])
    for step in range(10_000):
        assert float(total(ones)) == 12
        if step == 5:
            print("running", flush=True)
        time.sleep(0.05)


def model(directory: str, kv: str, target: str) -> None:
    """Print the bytes that were read and those that this process's devices hold, and the tokens."""
    read = 0
    parameters = loading.parameters

    def counted(*args: Any) -> Any:
        def one(parameter: Any) -> Any:
            def count(index: Any) -> np.ndarray:
                nonlocal read
                value = parameter.read(index)
                read += value.nbytes
                return value

            return dataclasses.replace(parameter, read=count)

        return {path: one(parameter) for path, parameter in parameters(*args).items()}

    loading.parameters = counted
    model = mllama_jax.load(directory, dtype="float32", mesh=mesh(4 // int(kv), int(kv), 1))
    leaves = jax.tree.leaves(model.params)
    held = sum(
        sum({str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}.values()) for leaf in leaves
    )
    mllama_jax.save(model, target)
    tokens = model.generate_tokens(*rows(), max_new_tokens=8, stop_ids=())
    print(json.dumps({"read": read, "held": held, "whole": sum(leaf.nbytes for leaf in leaves), "tokens": tokens}))


def mesh(*sizes: int) -> jax.sharding.Mesh:
    return make_mesh(dict(zip(("data", "kv", "q"), sizes, strict=True)), jax.devices())


def load(directory: str, dtype: str) -> None:
    mllama_jax.load(directory, dtype=dtype, mesh=mesh(1, jax.device_count(), 1))


def main(coordinator: str, number: str, count: str, what: str, *args: str) -> None:
    processes.join(coordinator, int(number), int(count), facts={"flags": args[0]} if what == "add" else None)
    {"add": lambda _: add(), "model": model, "load": load}[what](*args)


if __name__ == "__main__":
    main(*sys.argv[1:])
