"""`mllama check`: all is well here, and it says so where it is not."""

from __future__ import annotations

import json

import jax.numpy as jnp
import pytest

from mllama_jax import check
from mllama_jax.cli import main


def test_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["processes"] == 1
    assert len(report["findings"]) == 15
    assert all(each["ok"] for each in report["findings"])


def test_a_wrong_attention_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = check.attention
    monkeypatch.setattr(check, "attention", lambda q, k, v, *seen: right(q, k, v, *seen) * jnp.asarray(1.1, v.dtype))
    monkeypatch.setattr(check, "parity", lambda dtype: iter(()))
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    assert out.count("BAD") == 6
    assert "9 comparisons, 6 beyond its limit" in out
