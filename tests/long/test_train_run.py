"""`mllama train` as its users see it: runs that end anywhere and go on, what they leave, and bad input in one line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mllama_jax.cli import main
from mllama_jax.train.recipe import read_recipe
from mllama_jax.train.trainer import Trainer
from tests.training import Line, line, write

ROOT = Path(__file__).parents[2]


def history(out: Path) -> list[dict[str, float]]:
    return [json.loads(each) for each in (out / "history.jsonl").read_text().splitlines()]


def test_a_run_that_is_ended_anywhere_ends_as_one_that_is_not(tiny_directory: Path, tmp_path: Path) -> None:
    chats = [line(i) for i in range(11)]
    recipe = write(tmp_path / "data", chats, tiny_directory, held_out="chats.jsonl", accumulate=2)
    assert main(["train", str(recipe), str(tmp_path / "whole")]) == 0
    out = tmp_path / "ended"
    for what, moment, number, code, kept in (
        ("kill", "step", 2, -9, []),
        ("kill", "saving", 3, -9, []),
        ("term", "step", 4, 143, ["3", "5"]),  # noticed, one more step, saved
        ("term", "saving", 6, 143, ["3", "6", "7"]),
        ("kill", "saving", 8, -9, ["3", "6", "7"]),
    ):
        command = [sys.executable, "-m", "tests.tuned", str(recipe), str(out), what, moment, str(number)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == code, run.stderr
        assert sorted(each.name for each in out.glob("checkpoints/?")) == kept
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


@pytest.fixture(scope="module")
def run(tiny_directory: Path) -> Callable[..., tuple[int, str]]:
    """Train on lines; returns the exit code and what stands on stderr."""

    def train(
        capsys: pytest.CaptureFixture[str], directory: Path, lines: list[Any], **settings: Any
    ) -> tuple[int, str]:
        code = main(["train", str(write(directory, lines, tiny_directory, **settings)), str(directory / "out")])
        return code, capsys.readouterr().err

    return train


def chat(*parts: Line, **others: Any) -> Line:
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "yes"}], **others}


IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "Is it?"}
BAD: list[tuple[str, list[Any], dict[str, Any], str]] = [
    ("none", [], {}, "chats.jsonl: no chats in it; expected one a line"),
    ("json", [line(0), "{\n"], {}, "chats.jsonl, line 2: expected JSON, got an error at "),
    ("messages", [{"text": "?"}], {}, "line 1: expected an object with a list of messages under 'messages'"),
    (
        "no picture",
        [line(0), chat(IMAGE, TEXT)],
        {},
        "line 2: an image part without a picture; give it an 'image' or a 'path', or ",
    ),
    ("spare", [chat(TEXT, images=["0.png"])], {}, "line 1: images: 1 pictures but 0 image parts without their own"),
    ("absent", [chat(IMAGE, TEXT, images=["9.png"])], {}, "9.png': no such file; expected a picture, check the path"),
    ("base64", [chat(IMAGE, TEXT, images=[{"bytes": "?"}])], {}, "line 1: picture: expected base64, got an error at"),
    (
        "broken",
        [chat(IMAGE, TEXT, images=[{"bytes": "aGVsbG8="}])],
        {},
        "line 1: picture of 5 bytes: expected a picture",
    ),
    (
        "silent",
        [{"messages": [{"role": "user", "content": "?"}]}],
        {},
        "line 1: no answer to learn from; expected a mess",
    ),
    ("long", [line(0)], {"length": 8}, "nothing to learn from; 1 lines are longer than 8 tokens"),
    ("pairs", [line(0)], {"loss": "preference"}, "a list of messages under 'chosen' and 'rejected'"),
    ("part", [line(0)], {"part": "head"}, "recipe.toml: part: expected adapter, lora, full, got 'head'"),
    ("type", [line(0)], {"steps": "8"}, "recipe.toml: steps: expected int, got '8'"),
    ("key", [line(0)], {"stepps": 8}, "recipe.toml: stepps: not known; known are model, part, "),
    ("sign", [line(0)], {"samples": 0}, "recipe.toml: samples: expected more than 0, got 0"),
    ("int8", [line(0)], {"quantize": "int8", "part": "full"}, "int8 kernels cannot be trained; expected part 'lora'"),
    ("decay", [line(0)], {"weight_decay": -1.0}, "recipe.toml: weight_decay: expected at least 0, got -1.0"),
    ("bucket", [line(0)], {"data": "gs://none/chats.jsonl"}, "gs://none/chats.jsonl: "),
    ("rank", [line(0)], {"lora": {"rank": 0}}, "recipe.toml: lora.rank: expected at least 1, got 0"),
    ("alpha", [line(0)], {"lora": {"alpha": 0.0}}, "recipe.toml: lora.alpha: expected more than 0, got 0.0"),
    ("lora of", [line(0)], {"part": "adapter", "lora": {"rank": 4}}, "toml: lora: does nothing beside part 'adapter'"),
]


@pytest.mark.parametrize(("lines", "settings", "message"), [each[1:] for each in BAD], ids=[each[0] for each in BAD])
def test_bad_input_is_told_in_one_line(
    run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[Any], settings: Line, message: str
) -> None:
    code, said = run(capsys, tmp_path / "data", lines, **settings)
    assert code == 2
    assert message in said
    assert said.count("\n") == 1


def test_a_run_needs_a_directory(run: Callable, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file\n")
    code, told = run(capsys, tmp_path, [line(0)])
    assert (code, (tmp_path / "out").read_text()) == (2, "a file\n")
    assert told.endswith("out: is a file; expected a new or empty directory or one of a run\n")


@pytest.mark.parametrize("part", ["lora", "adapter"])
def test_preferences_are_learned(tiny_directory: Path, tmp_path: Path, part: str) -> None:
    """The first loss is that of no preference, ln 2."""
    pairs = []
    for i in range(6):
        (question, chosen), (_, rejected) = line(i)["messages"], line(i, "no such thing")["messages"]
        pairs.append({**line(i), "prompt": [question], "chosen": [chosen], "rejected": [rejected]})
        del pairs[-1]["messages"]
    recipe = write(tmp_path / "data", pairs, tiny_directory, loss="preference", part=part, steps=6, beta=1.0)
    assert main(["train", str(recipe), str(tmp_path / "out")]) == 0
    losses = [each["loss"] for each in history(tmp_path / "out")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.9 * losses[0]


def test_a_directory_of_another_run_is_refused(
    run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, tmp_path / "data", [line(0)], steps=1)[0] == 0
    code, said = run(capsys, tmp_path / "data", [line(0)], steps=1, lora={"rank": 3})
    assert code == 2
    assert "holds a run of another recipe, lora: expected {'rank': 3," in said
    code, said = run(capsys, tmp_path / "data", [line(1)], steps=1)
    assert (code, said.count("\n")) == (2, 1)
    assert said.endswith(
        f"chats.jsonl: has changed since the run in {tmp_path / 'data/out'} began; choose another directory\n"
    )
    (tmp_path / "data/out/recipe.json").write_text("{")
    code, said = run(capsys, tmp_path / "data", [line(0)], steps=1)
    assert (code, "recipe.json: invalid JSON" in said, said.count("\n")) == (2, True, 1)
    (tmp_path / "data/out/recipe.json").unlink()
    code, said = run(capsys, tmp_path / "data", [line(0)], steps=1)
    assert (code, "expected a new or empty directory or one of a run" in said) == (2, True)


def test_a_loss_that_is_no_number_names_its_batch(
    run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line(i) for i in (2, 5, 8, 11, 14)]
    settings = {"learning_rate": 1e30, "clip": 1e30, "warmup": 0.0, "steps": 20}
    code, said = run(capsys, tmp_path / "data", lines, **settings)
    assert code == 2
    step = int(said.partition("step ")[2].partition(":")[0])
    batch = Trainer.of(read_recipe(tmp_path / "data/recipe.toml")).batches.lines
    assert batch(step - 1) != batch(step)
    assert f"its batch is lines {', '.join(map(str, batch(step - 1)))} of " in said
    assert said.count("\n") == 1
