"""Two real processes on loopback that train together are as one, whichever of them ends; what they cannot share."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mllama_jax.processes import LOST
from mllama_jax.train.command import PREEMPTED
from tests.test_processes import children, free_port
from tests.training import line, write

ROOT = Path(__file__).parents[2]
STEPS = 40


class Pair:
    """Two processes that train by a recipe into `out`; none is left behind."""

    def __init__(self, *recipes: Path, out: Path | str, folders: Sequence[Path] = (ROOT, ROOT), **environment: str):
        """They run in `folders`, where relative paths lead them to different places."""
        coordinator = f"127.0.0.1:{free_port()}"
        flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
        self.out = Path(out)
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "mllama_jax.cli", "train", str(recipe), str(out), "--join",
                 f"{coordinator},{number},{len(recipes)}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=folders[number],
                env={
                    **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags,
                    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **environment,
                },
            )
            for number, recipe in enumerate(recipes)
        ]  # fmt: skip

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            for child in children(process):
                os.kill(child, signal.SIGKILL)
            process.kill()
            process.communicate()

    def at(self, step: int) -> None:
        """Wait until that step is done."""
        while not (self.out / "history.jsonl").exists() or history(self.out)[-1]["step"] < step:
            assert all(process.poll() is None for process in self.processes), self.ended()
            time.sleep(0.01)

    def ended(self) -> list[tuple[int, str, str]]:
        """The exit code of each, and what it printed."""
        texts = [process.communicate(timeout=300) for process in self.processes]
        return [(process.returncode, *text) for process, text in zip(self.processes, texts, strict=True)]


def history(out: Path) -> list[dict[str, float]]:
    lines = (out / "history.jsonl").read_text().splitlines()
    return [json.loads(each) for each in lines if each.endswith("}")] or [{"step": 0}]


def curve(out: Path, name: str) -> Any:
    return [each.get(name) for each in history(out)]


@pytest.fixture(scope="module")
def recipe(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    chats = [line(i) for i in range(18) if i % 3 < 2]  # of one shape: each compiles
    settings = {"preset": "fsdp", "held_out": "chats.jsonl", "samples": 4, "steps": STEPS, "save_every": 10}
    return write(tmp_path_factory.mktemp("data") / "data", chats, tiny_directory, **settings)


def test_two_processes_train_as_one(recipe: Path, tmp_path: Path) -> None:
    """Also where one is killed, and where one alone is told to end: both save the same step, and go on from it."""
    out = tmp_path / "two"
    with Pair(recipe, out=tmp_path / "one") as one:
        assert [each[0] for each in one.ended()] == [0]
    with Pair(recipe, recipe, out=out) as killed:
        killed.at(12)
        os.kill(children(killed.processes[1])[0], signal.SIGKILL)
        assert killed.ended()[0][0] == LOST
    with Pair(recipe, recipe, out=out) as told:
        told.at(22)
        told.processes[1].send_signal(signal.SIGTERM)
        ended = told.ended()
    saved = history(out)[-1]["step"]
    assert 22 <= saved < STEPS
    for code, _, error in ended:
        assert code == PREEMPTED
        assert f"{out}: told to end; step {saved} is saved, the same command goes on from it\n" in error
    with Pair(recipe, recipe, out=out) as last:
        first, second = last.ended()
    assert (first[0], second) == (0, (0, "", ""))
    assert first[1].startswith(f"{out / 'adapter'}: {STEPS} steps, loss ")
    assert curve(out, "step") == curve(tmp_path / "one", "step")
    for name in ("loss", "gradient_norm", "learned_tokens"):
        np.testing.assert_allclose(curve(out, name), curve(tmp_path / "one", name), rtol=1e-5)
    scored, wanted = ([each for each in history(run) if "held_out_loss" in each] for run in (out, tmp_path / "one"))
    for name in ("step", "held_out_loss"):
        np.testing.assert_allclose([each[name] for each in scored], [each[name] for each in wanted], rtol=1e-5)
    tuned, expected = (load_file(run / "adapter/adapter_model.safetensors") for run in (out, tmp_path / "one"))
    assert tuned.keys() == expected.keys()
    for name, array in tuned.items():
        np.testing.assert_allclose(array, expected[name], atol=1e-4)


def test_processes_that_do_not_share_are_told(recipe: Path, tmp_path: Path) -> None:
    """Other chats under the same name, and a folder for the run that each has for itself."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        shutil.copytree(recipe.parent, folder)
    alike = [Path("recipe.toml")] * 2
    with Pair(*alike, out=Path("out"), folders=folders) as apart:
        first, second = apart.ended()
    assert (first[0], second[0]) == (LOST, 2)
    assert second[2] == "out: not what process 0 writes to; processes need a directory that they all share\n"
    (folders[1] / "chats.jsonl").write_text(json.dumps(line(0)) + "\n")
    with Pair(*alike, out=tmp_path / "out", folders=folders) as differ:
        ended = differ.ended()
    assert [code for code, _, _ in ended] == [2, 2]
    for _, _, error in ended:
        assert error.startswith("processes differ in chats.jsonl: ")
        assert error.count("\n") == 1


def test_processes_without_a_mesh_are_told(recipe: Path, tmp_path: Path) -> None:
    alone = tmp_path / "recipe.toml"
    alone.write_text(recipe.read_text().replace('preset = "fsdp"\n', ""))
    with Pair(alone, alone, out=tmp_path / "out") as pair:
        for code, _, error in pair.ended():
            assert code == 2
            assert error == ("preset: missing; several processes train on one mesh, used as fsdp, fsdp+tensor, serve\n")
