"""Attention's kernels for a TPU in the whole model, each device with its own rows and heads."""

from __future__ import annotations

from pathlib import Path

from tests.test_sharding import equal


def test_attention_kernels_of_a_tpu_equal_xla(spread_directory: Path) -> None:
    """Interpreted, alone and on a mesh."""
    found = equal(8, "kernels", str(spread_directory))
    assert [each["chosen"] for each in found] == [["over_all", "over_cache"]] * 2
