"""`mllama evaluate`: recipes and data as they come, runs that are killed, spread or compared, and their reports."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from scipy.stats import binomtest

from mllama_jax import Mllama, cli
from mllama_jax.errors import InputError
from mllama_jax.evaluate.data import read_rows
from mllama_jax.evaluate.recipe import Recipe, known, load_recipe
from mllama_jax.evaluate.report import compare, mcnemar
from tests.test_processes import free_port

Run = Callable[..., tuple[int, str, str]]
TASK = """
source = "a test"
prompt = "{question}"
max_new_tokens = 4
metric = "anls"

[fields]
id = "id"
group = "kind"
"""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `mllama` with arguments; gives exit code, stdout and stderr."""
    monkeypatch.setattr(cli, "use_compilation_cache", lambda: None)

    def call(*args: object) -> tuple[int, str, str]:
        code = cli.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def task(tmp_path: Path) -> Path:
    (tmp_path / "task.toml").write_text(TASK)
    return tmp_path / "task.toml"


@pytest.fixture
def data(tmp_path: Path, picture: Callable[..., Image.Image]) -> Path:
    """Eight questions of several lengths about small pictures; alike enough to need few programs."""
    lines = []
    for i in range(8):
        picture(i, 50 - i, 40 + i).save(tmp_path / f"{i}.png")
        row = {"id": f"q{i}", "kind": "ab"[i % 2], "question": "What?" * (1 + i % 3), "answer": "a cat"}
        lines.append(json.dumps(row | {"image": f"{i}.png"}) + "\n")
    (tmp_path / "data.jsonl").write_text("".join(lines))
    return tmp_path / "data.jsonl"


# ---- Recipes and data ---------------------------------------------------------------------------------------------


def test_known_recipes() -> None:
    """Limits and published scores as Meta's eval_details.md and model card have them."""
    found = {name: load_recipe(name) for name in known()}
    limits = {"chartqa": 512, "ai2d": 400, "docvqa": 512, "vqav2": 25, "mmmu": 2048, "mmmu-pro": 2048}
    limits |= {"chartqa-90b": 512, "ai2d-90b": 400, "mathvista": 2048}
    assert {name: found[name].max_new_tokens for name in limits} == limits
    assert {name for name in found if not name.startswith("pictures-")} == set(limits)
    assert found["chartqa-90b"].extract == found["chartqa"].extract
    assert found["chartqa-90b"].published == {"90B Instruct": 85.5}
    assert found["mmmu-pro"].stitch


def png(image: Image.Image) -> dict[str, Any]:
    content = io.BytesIO()
    image.save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def test_rows_as_they_are_published(tmp_path: Path, picture: Callable[..., Image.Image]) -> None:
    """A row of each data set in the columns that it has on huggingface.co: what is asked, and which answer is right."""
    one, other = png(picture(1, 30, 40)), png(picture(2, 50, 20))

    def row(task: str, **columns: Any) -> tuple[Any, Recipe]:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([columns]), tmp_path / "data.parquet")
        recipe = load_recipe(task)
        (found,) = read_rows([tmp_path / "data.parquet"], recipe)
        return found, recipe

    found, recipe = row("chartqa", image=one, query="How many?", label=["14"], human_or_machine=0)
    assert found.text(recipe).endswith("The question is: How many?\nLet's think step by step.")
    assert recipe.score("Bars...\nFINAL ANSWER: 14.2", found.answers, ()) == ("14.2", 1)

    options = ["root", "leaf", "stem", "bud"]
    found, recipe = row("ai2d", image=one, question="What is A?", options=options, answer="2")
    assert "What is A?\n1. root\n2. leaf\n3. stem\n4. bud\nThink" in found.text(recipe)
    assert found.answers == ("3",)
    assert recipe.score("It has 2 leaves. FINAL ANSWER: 3", found.answers, found.options) == ("3", 1)

    found, recipe = row("docvqa", image=one, questionId=7, question="Date?", answers=["May 4", "4 May"])
    assert (found.id, recipe.score("4 may", found.answers, ())) == ("7", ("4 may", 1))

    people = [{"answer": "yes", "answer_confidence": "maybe", "answer_id": i} for i in range(10)]
    found, recipe = row("vqav2", image=one, question_id=7, question="Red?", answers=people, answer_type="yes/no")
    assert (len(found.answers), recipe.score("Yes.", found.answers, ())[1]) == (10, 1)

    mmmu = {"image_1": one, "image_2": other, "image_3": None, "id": "v1", "question": "Which <image 1>?"}
    found, recipe = row("mmmu", **mmmu, options="['$6', '$7']", answer="B")
    assert "Which <image 1>? Options:\nA. $6\nB. $7\nIndicate" in found.text(recipe)
    assert [picture.size for picture in found.pictures(recipe)] == [(30, 40), (50, 20)]
    assert recipe.score("So (A) is out. The correct answer is: B.", found.answers, found.options) == ("B", 1)
    found, recipe = row("mmmu", **mmmu, options="[]", answer="['24', '24.0']")
    assert "Options" not in found.text(recipe)
    assert recipe.score("Answer: 24.00", found.answers, ()) == ("24.00", 1)

    found, recipe = row("mmmu-pro", **mmmu, options="['$6', '$7']", answer="B")
    assert [picture.size for picture in found.pictures(recipe)] == [(96, 40)]  # side by side, 16 apart

    math = {"decoded_image": one, "pid": "1", "query": "Hint: ... Choices: (A) 3 (B) 4"}
    found, recipe = row("mathvista", **math, choices=["3", "4"], answer="4")
    assert recipe.score("The answer is (B) 4", found.answers, found.options) == ("B", 1)
    found, recipe = row("mathvista", **math, choices=None, answer="1.2")
    assert recipe.score("The answer is 1.23", found.answers, ()) == ("1.23", 1)


def test_a_file_overrides_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "docvqa"\nmax_new_tokens = 32\n[fields]\nquestion = "q"\n')
    mine, theirs = load_recipe(str(tmp_path / "mine.toml")), load_recipe("docvqa")
    fields = dataclasses.replace(theirs.fields, question="q")
    assert mine == dataclasses.replace(theirs, name="mine", max_new_tokens=32, fields=fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("max_new_tokens", "max_tokens"), "max_tokens is not known; known are source, prompt, max_new_tokens"),
        (('id = "id"', 'picture = "id"'), "fields: picture is not known; known are question, answers, images, id"),
        (("anls", "bleu"), "metric: expected exact_match, relaxed_accuracy, anls, vqa_accuracy, number_match, got"),
        (("= 4", '= "4"'), "max_new_tokens: expected a number, got '4'"),
        (("{question}", "{q}"), "prompt: expected {question} or {options}, got {q}"),
        (("metric", "extract = ['(.+']\nmetric"), r"extract: '(.+': missing ), unterminated subpattern"),
        (('source = "a test"', ""), "source is missing"),
        (("source", "["), "expected a TOML file"),
        (("source", 'base = "docvqq"\nsource'), "task docvqq: is not there; known are ai2d, "),
        (("[fields]", "[published]"), "published: expected a table of numbers, got "),
    ],
)
def test_recipes_that_cannot_be_used(task: Path, change: tuple[str, str], message: str) -> None:
    task.write_text(TASK.replace(*change))
    with pytest.raises(InputError) as error:
        load_recipe(str(task))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_that_cannot_be_used_are_counted_and_named(data: Path, task: Path) -> None:
    lines = data.read_text().splitlines()
    changes = {
        1: ("1.png", "absent.png"),
        2: ('"q2"', '"q0"'),
        3: ("a cat", " "),
        4: ('"question"', '"query"'),
        5: ('{"id"', '{"id'),
        6: ('"6.png"', "[]"),
        7: ('"a cat"', "[]"),
    }
    data.write_text("\n".join(line.replace(*changes.get(i, ("", ""))) for i, line in enumerate(lines)))
    with pytest.raises(InputError) as error:
        read_rows([data], load_recipe(str(task)))
    told = str(error.value)
    assert told.startswith(f"7 of 8 rows cannot be used: data.jsonl line 2: image: {data.parent}/absent.png: no such ")
    for each in (
        "line 3: id 'q0' is that of data.jsonl line 1 too",
        "line 4: answer: empty answer",
        "line 5: has no question; its fields are id, kind, query, answer, image",
        "line 6: is no JSON",
        "line 7: image: no picture",
        "line 8: answer: empty answer; mend them",
    ):
        assert each in told
    assert "\n" not in told


# ---- Runs ---------------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_a_killed_run_goes_on_and_ends_with_the_same_files(
    run: Run, data: Path, task: Path, small_directory: Path, tmp_path: Path
) -> None:
    command = ["evaluate", "--model", small_directory, "--data", data, "--task", task, "--batch", 2, "--output"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, out, _ = run(*command, whole, "--json")
    assert (code, json.loads(out)["asked"]["batches"]) == (0, 4)
    assert [each["id"] for each in answers(whole)] == [f"q{i}" for i in range(8)]
    arguments = [sys.executable, "-m", "mllama_jax.cli", *map(str, [*command, killed])]
    process = subprocess.Popen(arguments, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")})
    growing = killed / "answers.jsonl"
    while not growing.exists() or growing.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "result.json").exists()
    with open(growing, "ab") as file:
        file.write(b'{"id": "q1", "gro')  # as a kill in the middle of writing leaves it
    code, out, _ = run(*command, killed, "--json")
    assert code == 0
    assert 0 < json.loads(out)["asked"]["batches"] <= 3
    assert files(killed) == files(whole)


def test_answers_do_not_depend_on_batches_meshes_and_processes(
    run: Run, data: Path, task: Path, small_directory: Path, tmp_path: Path
) -> None:
    """On one device; on eight of two processes, each with a copy of the weights: half as many batches."""
    command = ["evaluate", "--model", small_directory, "--data", data, "--task", task, "--batch", 2, "--json"]
    code, out, _ = run(*command, "--output", tmp_path / "one")
    assert (code, json.loads(out)["asked"]) == (0, {"batches": 4, "rows": 8, "rows_at_once": 2, "groups": 1})
    coordinator = f"127.0.0.1:{free_port()}"
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command += ["--output", tmp_path / "two", "--group", 4, "--join"]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "mllama_jax.cli", *map(str, [*command, f"{coordinator},{number},2"])],
            env={**os.environ, **environment, "XDG_CACHE_HOME": str(tmp_path / f"cache {number}")},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]
    first, second = (process.communicate(timeout=240)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert json.loads(first)["asked"] == {"batches": 2, "rows": 8, "rows_at_once": 4, "groups": 2}
    assert second == ""  # the first speaks for both
    for a, b in zip(answers(tmp_path / "one"), answers(tmp_path / "two"), strict=True):
        assert a.pop("logprob") == pytest.approx(b.pop("logprob"), abs=1e-4)  # its last digits may differ
        assert a == b


def test_report_page_and_comparison(run: Run, data: Path, task: Path, small_directory: Path, tmp_path: Path) -> None:
    command = ("evaluate", "--model", small_directory, "--data", data, "--task", task, "--batch", 2, "--output")
    assert run(*command, tmp_path / "a")[0] == 0
    data.write_text(data.read_text().replace('"What', '"<b>So</b>, what'))
    page = tmp_path / "page.html"
    code, out, _ = run(*command, tmp_path / "b", "--html", page, "--versus", tmp_path / "a")
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["task", "8"], ["a", "4"], ["b", "4"]]
    assert "against" in lines[-2]
    assert "over 8 questions" in lines[-2]
    wrong = sum(each["score"] < 0.5 for each in answers(tmp_path / "b"))
    html = page.read_text()
    assert html.count("<article>") == wrong > 0
    assert html.count("data:image/webp;base64,") >= wrong
    assert "&lt;b&gt;So&lt;/b&gt;, what" in html
    assert "<b>" not in html
    assert "http" not in html.replace("https://www.w3.org", "")
    result = json.loads((tmp_path / "b" / "result.json").read_text())
    scores = [each["score"] for each in answers(tmp_path / "b")]
    assert result["score"] == pytest.approx(sum(scores) / 8)
    assert len(result["configuration"]["weights"]) == 64
    assert result["configuration"]["versions"].keys() >= {"jax", "flax", "python"}


def test_folders_that_cannot_be_used(run: Run, data: Path, task: Path, small_directory: Path, tmp_path: Path) -> None:
    command = ["evaluate", "--model", small_directory, "--data", data, "--task", task, "--limit", 4, "--batch", 2]
    command.append("--output")
    run_folder = tmp_path / "run"

    def refused(message: str, *more: object) -> None:
        code, out, err = run(*command, *more)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1

    assert run(*command, run_folder)[0] == 0
    refused('holds another run (dtype: "float32" there, "bfloat16" now)', run_folder, "--dtype", "bfloat16")
    refused("holds other files", tmp_path)
    refused("the runs differ in 2 questions, such as 'q4'", tmp_path / "c", "--limit", 6, "--versus", run_folder)
    refused("--batch must be at least 1, got 0", tmp_path / "c", "--batch", 0)
    refused("groups of 3 must divide", tmp_path / "grouped", "--group", 3)
    refused("nowhere/page.html: cannot write there", tmp_path / "c", "--html", tmp_path / "nowhere/page.html")
    refused("is no run's folder", tmp_path / "c", "--versus", tmp_path / "absent")
    result = run_folder / "result.json"
    result.write_bytes(result.read_bytes()[:-20])
    refused("result.json: is damaged or cut short", tmp_path / "c", "--versus", run_folder)
    assert run(*command, run_folder)[0] == 0  # makes it anew from the answers
    assert json.loads(result.read_text())["n"] == 4
    growing = run_folder / "answers.jsonl"
    growing.write_bytes(growing.read_bytes().replace(b'{"id": "q1"', b'{"id": "q1'))
    refused("answers.jsonl line 2: is damaged or cut short", run_folder)
    (data.parent / "2.png").write_bytes(b"not a picture")
    refused("data.jsonl line 3: ", tmp_path / "c")


def test_mcnemar() -> None:
    """As the exact binomial test of the pairs that differ."""
    for b, c in ((0, 0), (1, 0), (3, 9), (15, 6), (40, 40), (120, 80)):
        assert mcnemar(b, c) == pytest.approx(binomtest(b, b + c).pvalue if b + c else 1)

    def records(*scores: float) -> list[dict[str, Any]]:
        return [{"id": str(i), "answers": ["a"], "images": [], "score": score} for i, score in enumerate(scores)]

    found = compare(records(1, 0, 0, 0, 1), records(1, 1, 1, 0.5, 0))
    assert (found.n, found.first_only, found.second_only, found.p) == (5, 1, 3, 0.625)
    assert (found.difference, found.stderr) == pytest.approx((0.3, 0.37416573867))


# ---- Agreement ----------------------------------------------------------------------------------------------------


def test_models_are_compared_along_known_answers(
    run: Run, data: Path, task: Path, small: Mllama, small_directory: Path, tmp_path: Path
) -> None:
    """A model agrees with itself, and with its own logits as another program might have made them, up to one change."""
    given = ("--data", data, "--task", task, "--limit", 3, "--json")
    code, out, _ = run("compare", small_directory, small_directory, *given)
    same = json.loads(out)
    assert (code, same["rows"], same["top1"], same["kl"], same["diverging"]) == (0, 3, 1, 0, [])
    assert same["perplexity"][0] == same["perplexity"][1] > 1

    recipe = load_recipe(str(task))
    prompts = [small.prompt(row.conversation(recipe, row.pictures(recipe))) for row in read_rows([data], recipe, 3)]
    assert small.tokenizer is not None
    answer = small.tokenizer.encode("a cat", specials=False)
    length = max(len(prompt.tokens) for prompt in prompts) + len(answer)
    tokens, logits = np.full((3, length), -1), np.zeros((3, length, small.config.text.vocab), np.float32)
    for i, prompt in enumerate(prompts):
        row = prompt.tokens + answer
        tokens[i, : len(row)], logits[i, : len(row)] = row, small.logits([row], [prompt.images])[0]
    place = len(prompts[1].tokens)  # foretells the second token of the answer
    logits[1, place, 7] += 50
    np.savez(tmp_path / "other.npz", tokens=tokens, logits=logits)
    code, out, _ = run("compare", small_directory, tmp_path / "other.npz", *given)
    found = json.loads(out)
    assert (code, found["top1"]) == (0, 1 - 1 / found["tokens"])
    assert found["kl_max"] / found["tokens"] == pytest.approx(found["kl"], rel=1e-3)
    assert found["kl_max"] > 10
    (diverging,) = found["diverging"]
    assert (diverging["id"], diverging["place"]) == ("q1", 1)
    assert diverging["second"] == small.tokenizer.decode([7])

    tokens[2, 0] += 1
    np.savez(tmp_path / "other.npz", tokens=tokens, logits=logits)
    code, out, err = run("compare", small_directory, tmp_path / "other.npz", *given)
    assert (code, out) == (2, "")
    assert "row 2 has" in err
    assert "other ones from 0 on" in err
