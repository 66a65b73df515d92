"""LoRA adapters as PEFT loads them beside transformers: its logits with the adapter are ours."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

import mllama_jax
from mllama_jax.convert.apply import from_tree
from mllama_jax.convert.lora import write_lora
from mllama_jax.convert.run import convert
from mllama_jax.train.parts import Lora, init_lora, merge
from tests.oracle import huggingface
from tests.parity import CASES, LOGITS_TOLERANCE
from tests.toy import write_meta_release

ROWS = CASES[1]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT reads it
def test_peft_loads_our_adapters(tmp_path: Path) -> None:
    import peft

    convert(write_meta_release(tmp_path / "meta", ROWS.params, ROWS.weights), tmp_path / "hf", to="hf")
    loaded = mllama_jax.load(tmp_path / "hf", dtype="float32")
    lora = Lora(rank=3, alpha=5.0, targets=r"attention/|mlp/(up|gate_up)$|projector")
    rng = np.random.default_rng(0)
    pairs: Any = jax.tree.map(
        lambda leaf: np.float32(leaf + 0.05 * rng.standard_normal(leaf.shape)),
        init_lora(loaded.config, lora, jax.random.key(0)),
    )
    adapter = from_tree(pairs, np.dtype("float32"))
    write_lora(tmp_path / "adapter", adapter, loaded.config, lora.rank, lora.alpha, str(tmp_path / "hf"))
    base = transformers.MllamaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    huggingface.tap_inputs(base)
    huggingface.mask_rows(base)
    plain = huggingface.logits(base, ROWS)
    peft.PeftModel.from_pretrained(base, tmp_path / "adapter")  # puts the adapter into `base`
    expected = huggingface.logits(base.eval(), ROWS)
    assert np.abs(expected - plain).max() > 0.1
    tokens, images = np.stack(ROWS.tokens), ROWS.images
    beside = dataclasses.replace(loaded, params=merge(pairs, loaded.params, lora))
    convert(tmp_path / "hf", tmp_path / "merged", to="orbax", lora=tmp_path / "adapter")
    for model in (beside, mllama_jax.load(tmp_path / "merged", dtype="float32")):
        logits = model.logits(tokens, images).reshape(expected.shape)
        np.testing.assert_allclose(logits, expected, atol=LOGITS_TOLERANCE)
