"""`mllama check`: all is well here, and it says so where it is not."""

from __future__ import annotations

import json
import re
from typing import Any

import jax.numpy as jnp
import pytest

from mllama_jax import check
from mllama_jax.cli import main
from mllama_jax.generate import decode
from mllama_jax.generate.decode import STEPS
from mllama_jax.sharding.mesh import topology
from tests.conftest import SMALL


def test_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["processes"] == 1
    assert len(report["findings"]) == 25
    assert all(each["ok"] for each in report["findings"])
    assert report["decode"]["milliseconds"] > 0
    assert report["decode"]["floor"] is None  # of a CPU the planner knows nothing


def test_decode_stands_beside_its_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    made, dispatch = [], decode.decode

    def counting(*args: Any, **options: Any) -> Any:
        result = dispatch(*args, **options)
        made.append(int(result[2]))
        return result

    monkeypatch.setattr(decode, "decode", counting)
    found = check.timed(SMALL, "of a toy", topology("v6e:1x1"))
    assert set(made) == {STEPS}  # all rows go on to the end
    assert found.floor is not None
    assert 0 < found.floor < found.milliseconds
    assert re.fullmatch(r"decode: [\d.]+ ms a step of 8 rows of a toy; the plan's floor is [\d.]+ ms, \d+% of it",
                        found.describe())  # fmt: skip


def test_a_wrong_attention_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = check.attention
    monkeypatch.setattr(check, "attention", lambda q, k, v, *seen: right(q, k, v, *seen) * jnp.asarray(1.1, q.dtype))
    monkeypatch.setattr(check, "parity", lambda dtype: iter(()))
    monkeypatch.setattr(check, "pace", lambda: check.Pace("of nothing", 8, 1.0, None))
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    assert out.count("BAD") == 16
    assert "19 comparisons, 16 beyond its limit" in out
