"""Run by `test_lmms_live` in lmms-eval's environment: the answers of a task of a folder, by its registry's model.

python lmms_eval_0_7.py DIRECTORY FOLDER TASK
"""

from __future__ import annotations

import json
import sys

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager


class Arguments:
    """What lmms-eval reads of a command line that was not given."""

    def __getattr__(self, name: str) -> None:
        return None


def main(directory: str, folder: str, task: str) -> None:
    found = simple_evaluate(
        "mllama_jax",
        model_args=f"pretrained={directory},dtype=float32",
        tasks=[task],
        batch_size=4,
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        cli_args=Arguments(),
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    print(json.dumps([sample["resps"][0][0] for sample in samples]))


if __name__ == "__main__":
    main(*sys.argv[1:])
