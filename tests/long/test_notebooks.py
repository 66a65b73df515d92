"""Every notebook runs from its first cell to its last."""

from __future__ import annotations

import math
import resource
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
# Seconds of CPU, which no neighbour's work adds to: what needs as many is done sooner on two cores.
MOST = {"finetune.ipynb": 180}


def used() -> float:
    """Seconds of CPU of all children that have ended, kernels among them."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook(path: Path) -> None:
    notebook, before = nbformat.read(path, as_version=4), used()
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    spent = used() - before
    print(f"{path.name}: {spent:.0f} s of CPU")
    assert 1 < spent < MOST.get(path.name, math.inf)
