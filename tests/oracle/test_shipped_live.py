"""Meta's own code, given the weights that ship in Meta's layout, says the same tokens as we do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mllama_jax
from mllama_jax.check import GOLDENS
from mllama_jax.cli import SHIPPED
from mllama_jax.train.pictures import FAMILIES, conversation, held_out
from tests.parity import GREEDY

EACH = 10


@pytest.mark.filterwarnings("ignore:.*all_gather_tensor. is deprecated:FutureWarning")  # Meta's code calls it
def test_metas_code_says_the_same_tokens(tmp_path: Path) -> None:
    from tests.oracle.meta import run_rows
    from tests.oracle.shipped import metas_model

    ours = mllama_jax.load(SHIPPED, dtype="float32")
    theirs = metas_model(ours, tmp_path)
    prompts = [ours.prompt(conversation(example)[:1]) for family in FAMILIES for example in held_out(family, EACH)]
    made = ours.generate_tokens(
        [prompt.tokens for prompt in prompts], [prompt.images for prompt in prompts], max_new_tokens=GREEDY
    )
    for prompt, tokens in zip(prompts, made, strict=True):
        row, choose = np.array([prompt.tokens]), lambda logits: logits.argmax(-1)
        meta = run_rows(theirs, row, [prompt.images], choose)["greedy"][0].tolist()
        assert meta[: len(tokens)] == tokens


def test_the_goldens_that_ship_are_metas() -> None:
    from tests.oracle.shipped import goldens

    arrays = goldens()
    with np.load(GOLDENS) as file:
        stored = dict(file)
    assert arrays.keys() == stored.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(stored[name], array, rtol=1e-4, atol=1e-4, err_msg=name)
