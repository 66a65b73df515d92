"""The gradient of every parameter against autograd through Meta's code, on the toy, in float32."""

from __future__ import annotations

import warnings
from pathlib import Path

import jax
import numpy as np
import torch

import mllama_jax
from mllama_jax.convert.apply import from_tree, tensors
from mllama_jax.train.batch import IGNORED, Row, Shape, make_batch
from mllama_jax.train.loss import supervised
from mllama_jax.train.step import tie_tiles
from tests.oracle import meta
from tests.parity import CASES, Case, spans
from tests.toy import write_meta_release

ROWS = CASES[1]
RELATIVE = 1e-4  # of a gradient's largest absolute value


def labels(case: Case) -> np.ndarray:
    """The tokens that follow, behind the first picture or in the second half; the image token is none."""
    tokens = np.stack(case.tokens)
    following = np.roll(tokens, -1, axis=1)
    following[:, -1] = IGNORED
    following[following == case.params["vocab_size"]] = IGNORED
    following[:, : tokens.shape[1] // 3] = IGNORED
    return following


def metas_gradients(case: Case) -> tuple[float, dict[str, np.ndarray]]:
    """Meta's loss and its gradient by Meta's names; zero where nothing came."""
    model, tokens = meta.build(case.params, case.weights), np.stack(case.tokens)
    rows, length = tokens.shape
    model.setup_cache(rows, meta.CPU, torch.float32)
    row_spans = [spans(row, model.text_model.vocab_size) for row in tokens]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*all_gather_tensor. is deprecated", FutureWarning)  # Meta's code calls it
        caches, mask, row_mask = model.compute_vision_tokens_masks(case.images, row_spans, length, meta.CPU)
        logits = model(torch.arange(length), torch.from_numpy(tokens), mask, row_mask, caches, False)
        wanted = torch.from_numpy(labels(case))
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        loss.backward()
    return float(loss.detach()), {
        name: (torch.zeros_like(p) if p.grad is None else p.grad).numpy() for name, p in model.named_parameters()
    }


def test_gradients_are_those_of_metas_code(tmp_path: Path) -> None:
    loss, theirs = metas_gradients(ROWS)
    loaded = mllama_jax.load(write_meta_release(tmp_path, ROWS.params, ROWS.weights), dtype="float32")
    made = [
        (Row(t.tolist(), wanted.tolist(), []), i)
        for t, wanted, i in zip(ROWS.tokens, labels(ROWS), ROWS.images, strict=True)
    ]
    batch = make_batch(made, Shape(len(ROWS.tokens[0]), max(map(len, ROWS.images))), loaded.config)
    (value, _), gradient = jax.jit(
        jax.value_and_grad(lambda params: supervised(loaded.model, params, batch), has_aux=True)
    )(loaded.params)
    assert abs(float(value) - loss) <= 1e-5 * abs(loss)
    ours = tensors(from_tree(jax.device_get(tie_tiles(gradient)), np.dtype("float32")), loaded.config, "meta")
    assert ours.keys() >= theirs.keys()
    errors = {}
    for name, wanted in theirs.items():
        got = np.asarray(ours[name])
        errors[name] = float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-12))
    worst = sorted(errors, key=lambda name: -errors[name])[:5]
    print("".join(f"\n{errors[name]:.1e} {name}" for name in worst), f"\nworst of {len(errors)}")
    assert errors[worst[0]] <= RELATIVE, worst
