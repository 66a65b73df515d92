"""lmms-eval, in an environment of its own, finds our model and gets from it what a plain loop gives."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import datasets
from PIL import Image

from mllama_jax import Mllama
from mllama_jax.evaluate.vqa import normalise

TASK = """
task: toy_seen
dataset_path: parquet
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_visual: !function toy.visual
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [" "], max_new_tokens: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def test_lmms_eval_gets_what_a_plain_loop_gives(
    small: Mllama, small_directory: Path, tmp_path: Path, picture: Callable[..., Image.Image]
) -> None:
    questions = ["What shape is it?", "How many?", "Is it red, or is it green?", "Which?", "What does it say?"]
    images = [picture(i, 40 + 10 * i, 50) for i in range(5)]
    columns = {"question": questions, "answer": ["ring"] * 5, "image": images}
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "data.parquet"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "toy.py").write_text("def visual(doc):\n    return [doc['image'].convert('RGB')]\n")
    (folder / "toy.yaml").write_text(TASK.replace("FILE", str(tmp_path / "data.parquet")))
    script = Path(__file__).with_name("lmms_eval_0_7.py")
    done = subprocess.run(
        [os.environ["MLLAMA_LMMS_PYTHON"], str(script), str(small_directory), str(folder), "toy_seen"],
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    for question, image, answer in zip(questions, images, answers, strict=True):
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        (alone,) = small.generate([[{"role": "user", "content": content}]], max_new_tokens=12, stop=[" "])
        assert answer == alone.text


PIECES = "a The 3,000 dog's dont couldnt've / - x-y p.m. 2.5 , ten None oclock red, blue;green ? (no) $5 yes."
NORMALISE = """
import json, sys
from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
theirs = EvalAIAnswerProcessor()
texts = json.load(sys.stdin)
print(json.dumps([theirs.process_digit_article(theirs.process_punctuation(text)) for text in texts]))
"""


def test_vqa_answers_are_normalised_as_lmms_eval_does() -> None:
    """5,000 random strings of words and marks that its rules are about."""
    pieces = PIECES.split()
    rng = random.Random(0)
    texts = ["".join(rng.choice(pieces) + rng.choice(["", " "]) for _ in range(4)).strip() for _ in range(5000)]
    done = subprocess.run(
        [os.environ["MLLAMA_LMMS_PYTHON"], "-c", NORMALISE],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [normalise(text) for text in texts]
