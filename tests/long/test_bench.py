"""`mllama bench` over several devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_bench_spreads_the_model_and_checks_it_first(small_directory: Path) -> None:
    small = ["--rows", "2", "--images", "1", "--context", "40", "--prompt", "16", "--repeat", "1"]
    command = [sys.executable, "-m", "mllama_jax.cli", "bench", str(small_directory), "--mesh", "1", "2", "--json"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([*command, *small], env=env, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert [figure["devices"] for figure in told["figures"]] == [1] * 6 + [2] * 6
    assert 0 < told["spread_errors"]["bfloat16 2"] < 0.05
