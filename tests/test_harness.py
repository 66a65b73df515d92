"""lm-eval over a small model: request by request what the same weights say in a plain loop, one row at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import jax
import numpy as np
import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from PIL import Image

from mllama_jax import Mllama, cli
from mllama_jax.evaluate.harness import HarnessModel
from mllama_jax.processing.chat import tokenize

COLUMNS = {
    "question": [
        "What shape is it?",
        "How many bars?",
        "Is it red, or is it green?",
        "Which?",
        "And what does it say?",
    ],
    "choices": [["ring", "a cross"], ["one", "two"], ["red", "the green one"], ["left", "right"], ["EXIT", "GATE"]],
    "answer": [0, 1, 1, 0, 1],
}
TASKS = {
    "toy_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "toy_seen_choice": """
output_type: multiple_choice
doc_to_image: [image]
doc_to_text: "<image>{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "toy_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[0]}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
    "toy_until": """
output_type: generate_until
doc_to_image: [image]
doc_to_text: "<image>{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: [" "], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), np.uint8)) for i in range(5)]


@pytest.fixture
def tasks(tmp_path: Path, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks over a local parquet file."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    file = tmp_path / "data.parquet"
    datasets.Dataset.from_dict(COLUMNS | {"image": images}).to_parquet(str(file))
    head = f"dataset_path: parquet\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, body in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{head}{body}")
    return folder


def responses(model: HarnessModel, folder: Path, task: str, chat: bool) -> list[list[Any]]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found: Any = simple_evaluate(model, tasks=[task], task_manager=manager, apply_chat_template=chat, bootstrap_iters=0)
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [[response for (response,) in sample["resps"]] for sample in samples]


def said(model: Mllama, context: list[int], continuation: list[int], images: list[Image.Image]) -> tuple[float, bool]:
    """Log-probability of a continuation, and whether it is the likeliest, from all logits of one row."""
    logits = model.logits([context + continuation], [images])[0][len(context) - 1 : -1]
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    total = sum(float(logprobs[i, token]) for i, token in enumerate(continuation))
    return total, bool((logits.argmax(-1) == continuation).all())


def test_loglikelihoods_are_those_of_a_plain_loop(small: Mllama, tasks: Path, images: list[Image.Image]) -> None:
    model, bos = HarnessModel(small, batch=4), small.config.bos

    def ids(text: str) -> list[int]:
        assert small.tokenizer is not None
        return tokenize(text, small.tokenizer)

    for task, start, own in (("toy_choice", "{}", False), ("toy_seen_choice", "<|image|>{}", True)):
        for i, found in enumerate(responses(model, tasks, task, chat=False)):
            context = [bos, *ids(start.format(COLUMNS["question"][i]))]
            for choice, (logprob, greedy) in zip(COLUMNS["choices"][i], found, strict=True):
                wanted = said(small, context, ids(f" {choice}"), [images[i]] if own else [])
                assert logprob == pytest.approx(wanted[0], abs=1e-4)
                assert greedy == wanted[1]
    for i, (logprob,) in enumerate(responses(model, tasks, "toy_rolling", chat=False)):
        text = f"{COLUMNS['question'][i]} {COLUMNS['choices'][i][0]}"
        assert logprob == pytest.approx(said(small, [bos], ids(text), [])[0], abs=1e-4)


def test_answers_are_those_of_a_plain_loop(small: Mllama, tasks: Path, images: list[Image.Image]) -> None:
    found = responses(HarnessModel(small, batch=4), tasks, "toy_until", chat=True)
    for i, (text,) in enumerate(found):
        question = [{"type": "image", "image": images[i]}, {"type": "text", "text": COLUMNS["question"][i]}]
        conversation = [{"role": "user", "content": question}]
        assert text == small.generate([conversation], max_new_tokens=12, stop=[" "])[0].text


def test_the_command(
    tasks: Path,
    small_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "use_compilation_cache", lambda: None)
    command = ["evaluate", "--harness", "lm-eval", "--model", str(small_directory), "--include", str(tasks), "--json"]
    command += ["--output", str(tmp_path / "run"), "--limit", "4", "--batch", "4"]
    assert cli.main([*command, "--tasks", "toy_until", "--chat"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["n-samples"]["toy_until"]["effective"] == 4
    assert json.loads((tmp_path / "run" / "result.json").read_text())["configuration"]["dtype"] == "float32"
    monkeypatch.setattr(Mllama, "complete", None)  # every answer is there: nothing is asked
    command.remove("--json")
    assert cli.main([*command, "--tasks", "toy_until", "--chat"]) == 0
    assert "|toy_until|" in capsys.readouterr().out
    assert cli.main([*command, "--tasks", "toy_untl"]) == 2
    assert "--tasks: toy_untl: not known to lm-eval" in capsys.readouterr().err
    (tmp_path / "data.parquet").rename(tmp_path / "elsewhere.parquet")
    command[command.index(str(tmp_path / "run"))] = str(tmp_path / "again")
    assert cli.main([*command, "--tasks", "toy_rolling"]) == 2
    assert "--tasks: toy_rolling: the data cannot be had" in capsys.readouterr().err
    command[command.index(str(tasks))] = str(tmp_path / "nowhere")
    assert cli.main([*command, "--tasks", "toy_until"]) == 2
    assert "--include: " in capsys.readouterr().err
