"""`mllama_jax.train.measure`: it times a real step, and says what it may not be asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def measure(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mllama_jax.train.measure", *args]
    return subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)


def test_a_step_is_timed(small_directory: Path) -> None:
    done = measure(str(small_directory), "--rows", "2", "--length", "40", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    ours = json.loads(done.stdout)["ours, remat layer"]
    assert 0 < ours["seconds"] < ours["compiling"]
    assert abs(ours["tokens_per_second"] * ours["seconds"] - 2 * 40) < 1e-6


def test_the_peer_has_the_11bs_shapes(small_directory: Path) -> None:
    done = measure(str(small_directory), "--versus", "peft")
    assert done.returncode == 1
    assert f"--versus peft: expected the shapes of 11b-instruct, got {small_directory}; leave it out" in done.stderr
