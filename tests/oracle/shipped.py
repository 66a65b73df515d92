"""What Meta's own code makes of the checkpoint and the pictures that ship: `mllama check` compares with it anywhere.

    python -m tests.oracle.shipped

writes `mllama_jax/assets/check.npz` anew. It holds, for the k-th question of questions.json,

    tokens_k    int32 [T + n]    the prompt and the greedy answer
    logits_k    float32 [n, V]   what the answer's tokens were chosen from
    features_k  float32 [S]      projected features of the picture at every `STRIDE`-th place, padding tiles included
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

import mllama_jax
from mllama_jax.check import GOLDENS, STRIDE
from mllama_jax.cli import SHIPPED
from mllama_jax.convert.export import write_meta
from mllama_jax.convert.sources import open_checkpoint
from mllama_jax.demo import ask, questions
from tests.oracle.meta import build, run_rows


def metas_model(ours: mllama_jax.Mllama, directory: Path) -> Any:
    """Meta's own model with the weights of ours, by way of a release written to `directory`."""
    write_meta(directory, ours.params, ours.config, np.dtype("float32"))
    params = json.loads((directory / "params.json").read_text())
    release = open_checkpoint(directory)
    return build(params, {name: release.parts(name)[0].copy() for name in release.names()})


def goldens() -> dict[str, np.ndarray]:
    ours, arrays = mllama_jax.load(SHIPPED, dtype="float32"), {}
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*all_gather_tensor. is deprecated", FutureWarning)  # Meta's code calls it
        theirs = metas_model(ours, Path(directory))
        for k, (picture, question, _) in enumerate(questions()):
            prompt = ours.prompt(ask(picture, question))
            found = run_rows(theirs, np.array([prompt.tokens]), [prompt.images], lambda logits: logits.argmax(-1))
            answer = found["greedy"][0].tolist()
            answer = answer[: 1 + next(i for i, token in enumerate(answer) if token in ours.config.stops)]
            tokens = np.array([*prompt.tokens, *answer], np.int32)
            whole = run_rows(theirs, tokens[None], [prompt.images], lambda logits: logits.argmax(-1))["logits"]
            arrays[f"tokens_{k}"] = tokens
            arrays[f"logits_{k}"] = whole[len(prompt.tokens) - 1 : -1]
            arrays[f"features_{k}"] = found["features"].ravel()[::STRIDE]
    return arrays


if __name__ == "__main__":
    np.savez_compressed(GOLDENS, **goldens())  # pyright: ignore[reportArgumentType]
