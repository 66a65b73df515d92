"""The TPU's compiler (libtpu), asked about slices that nobody here has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from jax.experimental import topologies

from mllama_jax.errors import InputError

# libtpu asks the host what TPU it is part of; these answer, and the topology that is compiled for decides.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def has_compiler() -> bool:
    import importlib.util

    return importlib.util.find_spec("libtpu") is not None


def tpu_topology(name: str, slices: int = 1) -> Sequence[Any]:
    """Devices of `slices` slices to compile for. Raises InputError without libtpu."""
    if not has_compiler():
        raise InputError("compiling for a TPU needs libtpu: pip install 'mllama-jax[plan]'")
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    options = {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
