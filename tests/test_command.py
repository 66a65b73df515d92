"""`mllama convert` and `mllama verify`: reports, and one line with exit code 2 for every mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mllama_jax import cli
from tests.test_convert import assert_same_tensors

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `mllama` with arguments; gives exit code, stdout and stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        code = cli.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_there_and_back(run: Run, small_directory: Path, tmp_path: Path) -> None:
    ours, back = tmp_path / "ours", tmp_path / "back"
    code, out, _ = run("convert", small_directory, ours)
    assert code == 0
    assert out.startswith(f"{ours}: ours layout, ")
    code, out, _ = run("convert", ours, back, "--to", "hf", "--json")
    report = json.loads(out)
    assert (code, report["from"], report["to"], report["resumed"]) == (0, "orbax", "hf", 0)
    assert_same_tensors(small_directory, back)
    code, out, _ = run("verify", ours, "--json")
    report = json.loads(out)
    assert (code, report["damaged"], report["nan"], report["infinite"]) == (0, {}, {}, {})
    code, out, _ = run("verify", ours)
    assert (code, out.splitlines()[1]) == (0, "  every tensor and file is what was written")
    code, out, _ = run("verify", back)
    assert (code, out.splitlines()[1:]) == (
        0,
        ["  no manifest: nothing to compare with; `mllama convert --to orbax` writes one", "  no NaN, no infinity"],
    )
    code, out, _ = run("convert", ours, tmp_path / "meta", "--to", "meta")
    told = "  params.json has no field for the context, 512; it will be read as 131072"
    assert (code, out.splitlines()[1:]) == (0, [told])


def test_mistakes(run: Run, small_directory: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    run("convert", small_directory, ours)
    chunk = ours / "text.final_norm.scale/c/0"
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    for arguments, message in (
        (("verify", ours), f"{ours}: 1 damaged: text.final_norm.scale"),
        (("verify", tmp_path / "absent"), "absent: does not exist; expected a checkpoint directory"),
        (("convert", small_directory, ours), f"{ours}: already holds"),
        (("convert", small_directory, chunk), f"{chunk}: is a file; expected a new or empty directory"),
        (("convert", small_directory, tmp_path / "b", "--dtype", "int8"), "dtype must be one of bfloat16"),
        (("convert", small_directory, tmp_path / "b", "--to", "meta", "--shards", "5"), "shards must be 1, 2, 4 or 8"),
        (("convert", small_directory, tmp_path / "b", "--revision", "v1"), "is for names on huggingface.co"),
    ):
        code, _, err = run(*arguments)
        assert code == 2
        assert message in err
        assert len(err.splitlines()) == 1
