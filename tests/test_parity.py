"""Parity with Meta's code, layer by layer and end to end, on the goldens that `tests.parity` describes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import mllama_jax
from mllama_jax.model.mllama import call
from tests.parity import (
    CASES,
    GOLDENS,
    GREEDY,
    LOGITS_TOLERANCE,
    RELATIVE_TOLERANCE,
    Array,
    Case,
    Golden,
    Sample,
    present,
)
from tests.toy import write_meta_release


@dataclasses.dataclass(frozen=True)
class Subject:
    """A case, our model of its weights and what Meta's code made of it."""

    case: Case
    model: mllama_jax.Mllama
    golden: Golden

    @classmethod
    def of(cls, case: Case, golden: Golden, directory: Path) -> Subject:
        write_meta_release(directory, case.params, case.weights, case.shards)
        return cls(case, mllama_jax.load(directory, dtype="float32"), golden)

    @property
    def tokens(self) -> Array:
        """int [B, T], shorter rows filled up at their end."""
        rows = self.case.tokens
        longest = max(map(len, rows))
        return np.stack([np.pad(row, (0, longest - len(row))) for row in rows])


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    case = request.param
    return Subject.of(case, Golden.load(GOLDENS / f"{case.name}.npz"), tmp_path_factory.mktemp(case.name))


def test_vision_features(subject: Subject) -> None:
    images, golden = subject.case.images, subject.golden.arrays["features"]
    ours = present(np.asarray(subject.model.encode_images(images)), images)
    assert golden.error(ours) <= RELATIVE_TOLERANCE * golden.scale


def test_logits(subject: Subject) -> None:
    ours = np.asarray(subject.model.logits(subject.tokens, subject.case.images))
    real = np.concatenate([logits[: len(ids)] for logits, ids in zip(ours, subject.case.tokens, strict=True)])
    assert subject.golden.arrays["logits"].error(real) <= LOGITS_TOLERANCE


def test_greedy_decoding(subject: Subject) -> None:
    tokens = [ids.tolist() for ids in subject.case.tokens]
    ours = subject.model.generate_tokens(tokens, subject.case.images, max_new_tokens=GREEDY, temperature=0.0)
    assert ours == subject.golden.greedy


EVEN_CASES = [pytest.param(case, id=case.name) for case in CASES if not case.ragged]


@pytest.mark.parametrize("subject", EVEN_CASES, indirect=True)
def test_layers(subject: Subject) -> None:
    """Each intermediate of both towers. The first name in a failure is the first computed: look there."""
    ours = subject.model.intermediates(subject.tokens, subject.case.images)
    golden = subject.golden.under("vision/", "text/")
    assert ours.keys() == golden.keys()
    assert not differing(golden, ours)


@pytest.mark.parametrize("subject", EVEN_CASES, indirect=True)
def test_image_keys_and_values(subject: Subject) -> None:
    images, model = subject.case.images, subject.model
    features = present(np.asarray(model.encode_images(images)), images)
    spans = np.zeros((*features.shape[:2], 2), np.int32)  # who sees the tiles does not matter here
    caches = call(model.model, model.params, "keys_values", features, spans).layers
    ours = {}
    for layer, cache in zip(model.config.text.cross_layers, caches, strict=True):
        for name, array in (("keys", cache.k), ("values", cache.v)):
            tiles = np.swapaxes(array, 1, 2).reshape(*features.shape[:2], -1, array.shape[1], array.shape[3])
            ours[f"cross/{name}_{layer}"] = tiles[:, :, : features.shape[2]]
    golden = subject.golden.under("cross/")
    assert ours.keys() == golden.keys()
    assert not differing(golden, ours)


def differing(golden: Mapping[str, Sample], ours: Mapping[str, Array]) -> dict[str, float]:
    """The arrays that differ by more than the tolerance, each with its error relative to the array's scale."""
    errors = {name: sample.error(np.asarray(ours[name])) / sample.scale for name, sample in golden.items()}
    return {name: error for name, error in errors.items() if not error <= RELATIVE_TOLERANCE}
