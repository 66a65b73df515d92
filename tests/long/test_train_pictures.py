"""The recipes of the checkpoint that ships, run: shorter, and with a smaller model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mllama_jax
from mllama_jax.cli import main
from mllama_jax.convert.export import write_hf
from mllama_jax.model.mllama import Params
from mllama_jax.train.pictures import Example, conversation, held_out, recipe, shuffled
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tiny_params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipes need, with a smaller model to begin from."""
    folder = tmp_path_factory.mktemp("pictures")
    recipe.lay_out(folder, held=16)
    write_hf(folder / "start", tiny_params, TINY, np.dtype("float32"))
    return folder


def shorter(folder: Path, name: str, **settings: Any) -> Path:
    """The first stage's recipe with other settings."""
    text = 'dtype = "float32"\n' + (folder / "first.toml").read_text()
    for key, value in settings.items():
        text, found = re.subn(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
        assert found == 1
    (folder / f"{name}.toml").write_text(text)
    return folder / f"{name}.toml"


def losses(out: Path) -> list[tuple[float, float | None]]:
    lines = [json.loads(each) for each in (out / "history.jsonl").read_text().splitlines()]
    return [(line["loss"], line.get("held_out_loss")) for line in lines]


def test_a_model_that_begins_from_nothing_answers_by_looking(folder: Path) -> None:
    settings = {"steps": 250, "samples": 32, "learning_rate": 6e-3, "save_every": 125, "workers": 0}
    assert main(["train", str(shorter(folder, "short", **settings)), str(folder / "short")]) == 0
    training, held = zip(*losses(folder / "short"), strict=True)
    assert np.mean(training[-20:]) < 0.5 * np.mean(training[:20])
    assert held[-1] < held[124]
    model = mllama_jax.load(folder / "short/model", dtype="float32")
    examples = [each for each in held_out("scenes", 300) if each.kind == "scenes/colour"]

    def score(examples: list[Example]) -> float:
        said = model.generate([conversation(each)[:1] for each in examples], max_new_tokens=8)
        return np.mean([each.text == example.answer for each, example in zip(said, examples, strict=True)]).item()

    seeing, blind = score(examples), score(shuffled(examples))
    print(f"{len(examples)} colours: {seeing:.3f} right, with pictures shuffled {blind:.3f}")
    assert seeing > blind + 0.3


def test_a_run_that_draws_goes_on_as_if_it_had_not_been_ended(folder: Path) -> None:
    """Whichever processes draw."""
    settings = {"steps": 6, "samples": 4, "save_every": 6}
    assert main(["train", str(shorter(folder, "whole", workers=0, **settings)), str(folder / "whole")]) == 0
    out, ended = folder / "ended", shorter(folder, "ended", workers=2, **settings)
    run = subprocess.run(
        [sys.executable, "-m", "tests.tuned", str(ended), str(out), "term", "step", "3"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 143, run.stderr
    assert main(["train", str(ended), str(out)]) == 0
    assert losses(out) == losses(folder / "whole")
    name = "model/model.safetensors"
    assert (out / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_patches_teach_only_what_sees(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(shorter(folder, "text", part='"lora"')), str(folder / "text")]) == 2
    assert capsys.readouterr().err == (
        "mllama train: pictures.patches: does nothing where nothing that sees is trained; set it to 0\n"
    )
