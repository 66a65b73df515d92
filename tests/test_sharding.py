"""A model spread over a mesh gives what it gives on one device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_sharded_equals_single(small_directory: Path, tmp_path: Path) -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.sharded", str(small_directory), str(tmp_path)],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.endswith("sharded equals single\n"), run.stderr
