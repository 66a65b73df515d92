"""Text-only Llama 3.1 and 3.2 checkpoints, as transformers saves them, are the same decoder without cross-attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mllama_jax


@pytest.mark.parametrize(("tied", "factor"), [(True, 32.0), (False, 8.0)], ids=["3.2", "3.1"])
def test_logits_equal_transformers(tmp_path: Path, tied: bool, factor: float) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        bos_token_id=128,
        eos_token_id=[129, 136, 137],
        initializer_range=0.2,
    )
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 384, (2, 100))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    ours = mllama_jax.load(tmp_path, dtype="float32")
    assert ours.config.text.tied == tied
    assert ours.config.vision is None
    np.testing.assert_allclose(ours.logits(tokens, [[], []]), expected, atol=1e-4)
