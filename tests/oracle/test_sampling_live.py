"""The distributions that tokens are drawn from, beside transformers' logits processors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import generation

from mllama_jax import SamplingParams
from mllama_jax.generate.sampling import Settings, adjusted, kept

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle's warnings are not ours
VOCAB, STOPS = 500, (7, 8)


def draw_settings(rng: np.random.Generator) -> SamplingParams:
    """Each setting is off in half of the cases."""

    def maybe(value: Any, off: Any) -> Any:
        return value if rng.random() < 0.5 else off

    return SamplingParams(
        temperature=float(rng.uniform(0.2, 2)),
        top_k=maybe(int(rng.integers(1, VOCAB)), 0),
        top_p=maybe(float(rng.uniform(0.05, 1)), 1.0),
        min_p=maybe(float(rng.uniform(0, 0.5)), 0.0),
        repetition_penalty=maybe(float(rng.uniform(0.6, 2)), 1.0),
        logit_bias=maybe({int(token): float(rng.normal()) for token in rng.integers(0, VOCAB, 5)}, {}),
        min_new_tokens=maybe(4, 0),
    )


def theirs(logits: np.ndarray, params: SamplingParams, prompt: list[int], made: list[int]) -> np.ndarray:
    """Probabilities [V], the processors in the order in which transformers applies them."""
    processors: list[Any] = []
    if params.logit_bias:
        processors.append(
            generation.SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias.items()})
        )
    if params.repetition_penalty != 1:
        processors.append(generation.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_new_tokens:
        processors.append(
            generation.MinNewTokensLengthLogitsProcessor(len(prompt), params.min_new_tokens, list(STOPS), device="cpu")
        )
    processors.append(generation.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(generation.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(generation.TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(generation.MinPLogitsWarper(params.min_p))
    scores = generation.LogitsProcessorList(processors)(
        torch.tensor([prompt + made]), torch.tensor(logits[None], dtype=torch.float64)
    )
    return torch.softmax(scores[0], -1).numpy()


def test_distributions_equal_transformers() -> None:
    rng, equal, borders, keep = np.random.default_rng(5), 0, 0, jax.jit(kept)
    for _ in range(600):
        params = draw_settings(rng)
        logits = (rng.normal(size=VOCAB) * rng.uniform(1, 5)).astype(np.float32)
        prompt, made = (rng.integers(0, VOCAB, n).tolist() for n in (12, int(rng.integers(0, 8))))
        settings = Settings.of([params], [prompt], STOPS, VOCAB)
        counts = jnp.asarray(np.bincount(made, minlength=VOCAB)[None]) if params.penalised else None
        changed = adjusted(jnp.asarray(logits[None]), settings, jnp.array([len(made)]), counts)
        scaled = changed / settings.temperature[:, None]
        scaled = np.asarray(jnp.where(keep(scaled, settings), scaled, -jnp.inf)[0], np.float64)
        ours = np.exp(scaled - scaled.max())
        expected = theirs(logits, params, prompt, made)
        if (expected > 0).sum() != (ours > 0).sum():  # top-p may cut one token earlier or later: a sum in float32
            assert abs((expected > 0).sum() - (ours > 0).sum()) == 1
            assert params.top_p < 1
            borders += 1
            continue
        np.testing.assert_allclose(ours / ours.sum(), expected, atol=1e-6)
        equal += 1
    assert equal + borders == 600
    assert borders <= 10
