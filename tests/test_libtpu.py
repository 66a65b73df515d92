"""What libtpu is told on TPU7x."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mllama_jax.sharding.libtpu import forbid_large_tiles, is_tpu7x


@pytest.mark.parametrize(
    ("vendor", "device", "found"),
    [("0x1ae0", "0x0076", True), ("0x1ae0", "0x006f", False), ("0x10de", "0x0076", False)],
)
def test_tpu7x_is_found_on_the_bus(tmp_path: Path, vendor: str, device: str, found: bool) -> None:
    (tmp_path / "0000:00:01.0").mkdir()  # one that says nothing of itself
    (tmp_path / "0000:00:05.0").mkdir()
    for name, value in (("vendor", vendor), ("device", device)):
        (tmp_path / "0000:00:05.0" / name).write_text(value + "\n")
    assert is_tpu7x(tmp_path) is found


@pytest.mark.parametrize(
    ("given", "after"),
    [
        ("", "--xla_tpu_impure_use_large_2nd_minor_layout_for_x16=false"),
        ("--a=1", "--xla_tpu_impure_use_large_2nd_minor_layout_for_x16=false --a=1"),
        ("--xla_tpu_impure_use_large_2nd_minor_layout_for_x16=true",) * 2,
    ],
)
def test_users_flags_are_kept(monkeypatch: pytest.MonkeyPatch, given: str, after: str) -> None:
    monkeypatch.setenv("LIBTPU_INIT_ARGS", given)
    forbid_large_tiles()
    assert os.environ["LIBTPU_INIT_ARGS"] == after
