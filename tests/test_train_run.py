"""`mllama train` as its users see it: runs that end anywhere and go on, what they leave, and bad input in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllama_jax.cli import main

ROOT = Path(__file__).parents[1]
Line = dict[str, Any]


def line(i: int, answer: str | None = None, words: int = 3) -> Line:
    """A chat about a picture; every third one is about none."""
    parts: list[Line] = [{"type": "text", "text": f"What is in picture {i}?"}]
    said = answer or " ".join(f"word{(i * 7 + n) % 10}" for n in range(words))
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": said}]
    if i % 3 == 2:
        return {"messages": messages}
    parts.insert(0, {"type": "image"})
    return {"messages": messages, "images": [f"{i % 4}.png"]}


def write(directory: Path, lines: list[Any], model: Path, name: str = "chats.jsonl", **settings: Any) -> Path:
    """A recipe beside its chats and their pictures."""
    directory.mkdir(exist_ok=True)
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (40 + 30 * i, 60, 3), np.uint8)
        Image.fromarray(pixels).save(directory / f"{i}.png")
    (directory / name).write_text("".join(each if isinstance(each, str) else json.dumps(each) + "\n" for each in lines))
    lora = settings.pop("lora", {"rank": 2, "alpha": 4.0})
    settings = {
        "model": str(model), "data": name, "part": "lora", "steps": 8, "samples": 3, "length": 128, "save_every": 3,
        "learning_rate": 3e-3, "dtype": "float32",
    } | settings  # fmt: skip
    table = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    table += ["[lora]", *(f"{key} = {json.dumps(value)}" for key, value in lora.items())]
    (directory / "recipe.toml").write_text("\n".join(table) + "\n")
    return directory / "recipe.toml"


def history(out: Path) -> list[dict[str, float]]:
    return [json.loads(each) for each in (out / "history.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache of compiled programs for all runs here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def test_a_run_that_is_ended_anywhere_ends_as_one_that_is_not(tiny_directory: Path, tmp_path: Path) -> None:
    chats = [line(i) for i in range(11)]
    recipe = write(tmp_path / "data", chats, tiny_directory, held_out="chats.jsonl", accumulate=2)
    assert main(["train", str(recipe), str(tmp_path / "whole")]) == 0
    out = tmp_path / "ended"
    for what, moment, number, code, kept in (
        ("kill", "step", 2, -9, None),  # before anything is saved
        ("kill", "saving", 3, -9, None),
        ("kill", "step", 5, -9, "3"),
        ("term", "step", 4, 143, "5"),  # notices, does one more step, saves
        ("kill", "saving", 6, -9, "5"),
    ):
        command = [sys.executable, "-m", "tests.tuned", str(recipe), str(out), what, moment, str(number)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == code, run.stderr
        assert [each.name for each in sorted(out.glob("checkpoints/?"))][-1:] == ([kept] if kept else [])
    assert main(["train", str(recipe), str(out)]) == 0
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    whole, ended = history(tmp_path / "whole"), history(out)
    assert [each["step"] for each in ended] == list(range(1, 9))
    for name in ("loss", "gradient_norm", "held_out_loss"):
        assert [each.get(name) for each in ended] == [each.get(name) for each in whole]
    assert whole[-1]["held_out_loss"] < whole[2]["held_out_loss"]
    assert (out / "history.png").stat().st_size > 10_000
    assert list(out.glob("events/*tfevents*"))
