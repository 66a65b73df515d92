"""One of several processes that meet, agree and add numbers up until they are killed; run by test_processes.py."""

from __future__ import annotations

import sys
import time

from mllama_jax import processes
from mllama_jax.errors import InputError


def main(coordinator: str, process: int, count: int, flag: str) -> None:
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    try:
        processes.join(coordinator, process, count)
        processes.agree({"jax": jax.__version__, "flags": flag})
    except InputError as error:
        processes.leave(2, str(error))
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere, parts = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("x",)))
    total = jax.jit(lambda x: x.sum(), out_shardings=everywhere)
    ones = jax.make_array_from_callback((12,), parts, lambda index: np.ones(12, np.float32)[index])
    with processes.leaving():
        for step in range(10_000):
            assert float(total(ones)) == 12
            if step == 5:
                print("running", flush=True)
            time.sleep(0.05)


if __name__ == "__main__":
    if not processes.attended():
        sys.exit(processes.attend(["tests.process", *sys.argv[1:]]))
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
