"""`mllama bench`: every figure, on one device and spread over two, which is checked first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mllama_jax.bench_model import Bench
from mllama_jax.model.quantize import widen
from mllama_jax.sharding.mesh import CHIPS
from tests.conftest import SMALL


def test_everything_is_timed_beside_its_name(small_directory: Path, tmp_path: Path) -> None:
    small = ["--rows", "2", "--images", "1", "--context", "40", "--prompt", "16", "--repeat", "2"]
    small += ["--dtype", "int8", "--cache", "int8", "--mesh", "1", "2", "--plot", str(tmp_path / "b.png"), "--json"]
    command = [sys.executable, "-m", "mllama_jax.cli", "bench", str(small_directory), *small]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    kinds = ["decode", "decode", "encode", "first token", "answer", "prefill", "prefill"]
    assert [figure["name"].split(",")[0] for figure in told["figures"]] == 2 * kinds
    lines = done.stderr.splitlines()
    assert [line.split(",")[0] for line in lines if line.startswith(tuple(kinds))] == 2 * kinds  # as they are measured
    assert [figure["devices"] for figure in told["figures"]] == [1] * 7 + [2] * 7
    assert all(0 < figure["low"] <= figure["median"] <= figure["high"] for figure in told["figures"])
    first, again = told["figures"][0], told["figures"][7]
    assert first["held"] > again["held"] > first["held"] / 2  # the text model's halves, and the picture encoder's whole
    assert first["beside"] > 0
    assert told["best"]["read"][0] >= 1e3 * first["read"] / first["median"] > 0
    assert told["best"]["computed"][0] >= 1e3 * first["operations"] / first["median"] > 0
    assert 0 < told["spread_errors"]["int8 2"] < 0.05
    assert (tmp_path / "b.png").stat().st_size > 5000


def test_int4_reads_less_and_computes_the_same() -> None:
    """Random packed weights are of about the size that those in bfloat16 have."""
    wide, packed = (Bench.of(SMALL, dtype) for dtype in ("bfloat16", "int4"))
    floors = [bench.decode(1, 64, True).phases[0][1] for bench in (wide, packed)]
    assert floors[1].weight_flops == pytest.approx(floors[0].weight_flops, rel=0.02)
    assert floors[1].read < 0.6 * floors[0].read
    down = packed.params["text"]["layers_0"]["mlp"]["down"]
    assert 0.5 < float(widen(down["kernel"], down["scale"], jnp.dtype("float32")).std()) * 96**0.5 < 2
    assert all(np.isfinite(logits).all() for logits in packed.logits())


def test_what_follows_takes_its_own_time() -> None:
    """Phases one after the other: the floors of all, where each may be bound by something else."""
    bench, chip = Bench.of(SMALL, "bfloat16"), CHIPS["h100"]
    encoder = bench.encode(1)
    first = bench.first_token(16, encoder)
    answer, step = bench.answer(16, 5, encoder), bench.decode(1, 21, True)
    limit = first.limit(chip, "bfloat16")[0] + 4 * step.limit(chip, "bfloat16")[0]
    assert answer.limit(chip, "bfloat16")[0] == pytest.approx(limit, rel=1e-6)
    assert first.limit(chip, "bfloat16")[0] > encoder.limit(chip, "bfloat16")[0]
    assert answer.read == first.read + 4 * step.read
    assert len(answer.run()) == 5
