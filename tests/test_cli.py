"""The command line: answers, reports, and one line with exit code 2 for every mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllama_jax import cli
from mllama_jax.convert.export import write_meta
from mllama_jax.model.mllama import Params
from tests.conftest import SMALL

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run `mllama` with arguments; gives exit code, stdout and stderr."""
    monkeypatch.setattr(cli, "use_compilation_cache", lambda: None)

    def call(*args: object) -> tuple[int, str, str]:
        try:
            code = cli.main([str(arg) for arg in args])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def photo(tmp_path: Path, picture: Callable[..., Image.Image]) -> Path:
    picture(1).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_presets_spread_a_model_over_all_devices(run: Run, small_directory: Path) -> None:
    command = ("generate", "--model", small_directory, "--max-new-tokens", 4, "Hello")
    assert run(*command, "--preset", "serve") == run(*command)
    code, _, err = run(*command, "--preset", "fast")
    assert code == 2
    assert err == (
        "mllama generate: preset 'fast' is not known; known are serve, long-context, evaluate, fsdp, fsdp+tensor\n"
    )


def test_a_device_that_is_not_there_is_named() -> None:
    command = [sys.executable, "-m", "mllama_jax.cli", "check"]
    ended = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "nosuch"}, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("mllama check: JAX_PLATFORMS=nosuch: no such device, or no plugin for it; install ")
    assert ended.stderr.count("\n") == 1


def test_generate(run: Run, small_directory: Path, photo: Path) -> None:
    common = ("generate", "--model", small_directory, "--image", photo, "--max-new-tokens", 6, "What is it?")
    code, out, _ = run(*common)
    assert code == 0
    code, report, _ = run(*common, "--json")
    answer = json.loads(report)
    assert (code, answer["text"]) == (0, out.removesuffix("\n"))
    assert len(answer["tokens"]) == len(answer["logprobs"]) == 6
    assert (answer["finish_reason"], answer["dtype"]) == ("length", "float32")


def test_inspect(run: Run, small_directory: Path, small_params: Params, tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", small_params, SMALL, np.dtype("float16"), shards=2)
    code, report, _ = run("inspect", tmp_path / "meta", "--json")
    meta = json.loads(report)
    assert (code, meta["layout"], list(meta["dtypes"])) == (0, "Meta", ["float16"])
    code, report, _ = run("inspect", small_directory, "--json")
    hf = json.loads(report)
    assert (code, hf["layout"], hf["parameters"]) == (0, "Hugging Face", meta["parameters"])
    assert (hf["config"]["text"]["width"], sum(hf["parts"].values())) == (64, hf["parameters"])
    code, out, _ = run("inspect", small_directory)
    assert code == 0
    assert "Hugging Face layout" in out


def cut_short(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_architecture(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "qwen2_vl"}')


def no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def broken_json(directory: Path) -> None:
    (directory / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, "model.safetensors"),
        (other_architecture, "copy/config.json: model_type must be 'mllama' or 'llama' (text only), got 'qwen2_vl'"),
        (no_weights, "no checkpoint"),
        (no_tokenizer, "no tokenizer.json or tokenizer.model here"),
        (broken_json, "config.json"),
    ],
)
def test_damaged_checkpoints(
    run: Run, small_directory: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(small_directory, directory)
    damage(directory)
    refused(run("generate", "--model", directory, "Hello"), message)


def refused(result: tuple[int, str, str], message: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "")
    line = err.splitlines()[-1]
    assert message in line
    assert "Traceback" not in err
    assert len([each for each in err.splitlines() if each.startswith("mllama ")]) == 1


def test_pickle_that_names_anything_but_tensors(run: Run, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "consolidated.00.pth", "w") as archive:
        archive.writestr("consolidated/data.pkl", b"cos\nsystem\n(S'touch ran'\ntR.")
    (tmp_path / "params.json").write_text("{}")
    refused(run("inspect", tmp_path), "os.system")


def test_bad_pictures(run: Run, small_directory: Path, tmp_path: Path, photo: Path) -> None:
    empty, cut, text = tmp_path / "empty.png", tmp_path / "cut.png", tmp_path / "text.png"
    empty.touch()
    cut.write_bytes(photo.read_bytes()[:-1000])
    text.write_text("not a picture")
    bomb = tmp_path / "bomb.png"
    Image.new("1", (30000, 30000)).save(bomb)
    for path in (empty, cut, text, bomb, tmp_path / "absent.png"):
        refused(run("generate", "--model", small_directory, "--image", path, "--", "What is it?"), path.name)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperature", "-1", "temperature must be at least 0, got -1.0"),
        ("--temperature", "nan", "temperature must be a finite number, got nan"),
        ("--top-p", "0", "top_p must be above 0, got 0"),
        ("--top-k", "-3", "top_k must be at least 0, got -3"),
        ("--max-new-tokens", "0", "max_new_tokens must be at least 1, got 0"),
        ("--max-new-tokens", "1000", "exceed the context of 512"),
        ("--lookup", "33", "lookup must be an integer from 0 to 32, got 33"),
        ("--dtype", "int3", "dtype must be one of bfloat16, float32, float16, got 'int3'"),
        ("--model", "/nowhere", "/nowhere: does not exist"),
    ],
)
def test_bad_settings(run: Run, small_directory: Path, option: str, value: str, message: str) -> None:
    refused(run("generate", "--model", small_directory, "Hello", f"{option}={value}"), message)


def test_prompt_longer_than_the_context(run: Run, small_directory: Path) -> None:
    refused(run("generate", "--model", small_directory, "word " * 2000), "exceed the context of 512")


@pytest.mark.parametrize(
    "wrong",
    [
        *[("--rows", 0), ("--context", 3), ("--context", 513), ("--prompt", 513), ("--mesh", 99), ("--mesh", 3)],
        *[("--plot", "b.gif"), ("--plot", "/nowhere/b.png")],
    ],
)
def test_bench_refuses_what_it_cannot_time(run: Run, small_directory: Path, wrong: tuple) -> None:
    code, out, err = run("bench", small_directory, *wrong)
    assert (code, out) == (2, "")
    assert wrong[0] in err
    assert err.count("\n") == 1
