"""Run by long/test_train_run: a training run that ends itself.

python -m tests.tuned RECIPE OUT kill step N     SIGKILL behind step N, whatever of a checkpoint is on its way
python -m tests.tuned RECIPE OUT kill saving N   SIGKILL while the checkpoint of step N is being written
python -m tests.tuned RECIPE OUT term step N     SIGTERM behind step N; `term saving N` is known as well
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from mllama_jax.cli import main
from mllama_jax.train.batch import Batch
from mllama_jax.train.history import History
from mllama_jax.train.step import Report

add = History.add


def watch(out: Path, step: int, end: signal.Signals) -> None:
    """Wait for the checkpoint's unfinished directory, and send the signal."""
    while not any(out.glob(f"checkpoints/{step}.*tmp*")):
        pass
    os.kill(os.getpid(), end)


if __name__ == "__main__":
    recipe, out, what, moment, number = sys.argv[1:]
    end = signal.SIGKILL if what == "kill" else signal.SIGTERM

    def add_and_end(self: History, step: int, batches: Batch, report: Report, held_out: float | None) -> None:
        add(self, step, batches, report, held_out)
        if step == int(number):
            os.kill(os.getpid(), end)

    if moment == "saving":
        threading.Thread(target=watch, args=(Path(out), int(number), end), daemon=True).start()
    else:
        History.add = add_and_end
    sys.exit(main(["train", recipe, out]))
