"""Conversions that are stopped, refused or short of room: the same call ends what it began, and nothing looks whole."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mllama_jax
from mllama_jax.convert.export import write_hf
from mllama_jax.convert.run import convert
from mllama_jax.convert.table import Layout
from tests.archives import fault
from tests.conftest import SMALL
from tests.test_convert import assert_same_tensors, random_params

ROOT = Path(__file__).parents[1]


def tiny(directory: Path) -> Path:
    """A checkpoint of few tensors: three text layers, one local and one global vision block."""
    text = dataclasses.replace(SMALL.text, layers=3, cross_layers=(1,))
    assert SMALL.vision
    config = dataclasses.replace(
        SMALL, text=text, vision=dataclasses.replace(SMALL.vision, layers=1, global_layers=1, taps=(0,))
    )
    write_hf(directory, random_params(config), config, np.dtype("float32"))
    return directory


def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.killed", str(tiny(tmp_path / "source")), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.endswith("of 20 killed\n"), run.stderr
    assert int(run.stdout.split()[0]) >= 15  # the others had ended


def test_a_lock_that_a_kill_left_is_swept_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorStore does not list the locks beside its files; the folder of notes goes with those in it."""
    source, target = tiny(tmp_path / "source"), tmp_path / "target"
    with monkeypatch.context() as patch:
        patch.setattr("mllama_jax.convert.run.write_index", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(source, target, to="orbax")
    (target / "unfinished" / "never.written.__lock").touch()
    assert convert(source, target, to="orbax")["resumed"] > 0
    assert not (target / "unfinished").exists()
    assert mllama_jax.load(target, dtype="float32", verify=True).config.text.layers == 3


class DiskFull:
    """os.fdatasync until, at the call number `last`, the disk is full."""

    def __init__(self, last: int):
        self.left = last

    def __call__(self, _: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_keeps_what_is_written(
    small_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", DiskFull(2))
        message = fault(lambda: convert(small_directory, target, to="hf"))
    assert message == (
        f"{target}: cannot be written: No space left on device; what is written stays: make room and run the same "
        "command again"
    )
    assert "its conversion has not ended; run the same `mllama convert` again" in fault(mllama_jax.load, target)
    assert convert(small_directory, target, to="hf")["resumed"] == 32
    assert_same_tensors(small_directory, target)


def test_a_partial_file_that_is_gone_is_written_anew(
    small_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", DiskFull(2))
        fault(lambda: convert(small_directory, tmp_path / "target", to="hf"))
    (tmp_path / "target/model.safetensors.partial").unlink()
    convert(small_directory, tmp_path / "target", to="hf")
    assert_same_tensors(small_directory, tmp_path / "target")


def test_too_little_room_is_known_before(
    small_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_300_000))
    message = fault(lambda: convert(small_directory, tmp_path / "target", to="orbax"))
    assert "GB are to be written, 0.0 GB are free; make room, then run the same command again" in message
    monkeypatch.undo()
    assert convert(small_directory, tmp_path / "target", to="orbax")["resumed"] == 0


@pytest.mark.parametrize("to", ["orbax", "hf", "meta"])
def test_targets_that_cannot_be_written(small_directory: Path, tmp_path: Path, to: Layout) -> None:
    (tmp_path / "file").touch()
    message = fault(lambda: convert(small_directory, tmp_path / "file/target", to=to))
    assert message.startswith(f"{tmp_path}/file/target")
    assert "Not a directory" in message
    message = fault(lambda: convert(small_directory, "/proc/target", to=to))  # read-only even for root
    assert message.startswith("/proc/target")


@pytest.mark.parametrize("to", ["orbax", "hf", "meta"])
def test_targets_that_hold_another_model(small_directory: Path, tmp_path: Path, to: Layout) -> None:
    before = {path.name: path.read_bytes() for path in small_directory.iterdir()}
    message = fault(lambda: convert(small_directory, small_directory, to=to))
    assert f"{small_directory}: already holds config.json and {len(before) - 1} more" in message
    assert {path.name: path.read_bytes() for path in small_directory.iterdir()} == before


def test_part_of_another_conversion(small_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", DiskFull(2))
        fault(lambda: convert(small_directory, target, to="hf"))
    message = fault(lambda: convert(small_directory, target, to="hf", dtype="bfloat16"))
    assert "holds part of another conversion" in message
    assert "to hf, dtype None, shards 1" in message
    # the source is another one now, though its name is the same
    copy = tmp_path / "copy"
    shutil.copytree(small_directory, copy)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", DiskFull(2))
        fault(lambda: convert(copy, tmp_path / "other", to="hf"))
    os.utime(copy / "model.safetensors", (1, 1))
    assert "holds part of another conversion" in fault(lambda: convert(copy, tmp_path / "other", to="hf"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to": "hf", "dtype": "int8"}, "dtype must be one of bfloat16, float32, float16, got 'int8'"),
        ({"to": "meta", "shards": 3}, "shards must be 1, 2, 4 or 8"),
        ({"to": "hf", "shards": 2}, "and 1 but for Meta's layout, got 2 for 'hf'"),
    ],
)
def test_bad_settings(small_directory: Path, tmp_path: Path, settings: dict, message: str) -> None:
    assert message in fault(lambda: convert(small_directory, tmp_path / "target", **settings))
    assert not (tmp_path / "target").exists()
