"""The parity tests once more, on weights and pictures that no golden was made from, with Meta's code at hand."""

import numpy as np
import pytest

from tests.oracle import meta
from tests.parity import CASES, GOLDENS, RELATIVE_TOLERANCE, Case, Golden, all_positions
from tests.test_parity import (  # noqa: F401  collected here too, to run on the subject below
    Subject,
    test_greedy_decoding,
    test_image_keys_and_values,
    test_layers,
    test_logits,
    test_vision_features,
)

FRESH_SEED = 2


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    case = request.param.reseeded(FRESH_SEED)
    return Subject.of(case, Golden.of(meta.run(case), all_positions), tmp_path_factory.mktemp(case.name))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_goldens_are_what_metas_code_computes(case: Case) -> None:
    stored, now = Golden.load(GOLDENS / f"{case.name}.npz"), Golden.of(meta.run(case))
    assert list(stored.arrays) == list(now.arrays)
    assert stored.greedy == now.greedy
    for name, sample in now.arrays.items():
        golden = stored.arrays[name]
        assert golden.shape == sample.shape, name
        assert np.abs(golden.values - sample.values).max() <= RELATIVE_TOLERANCE * sample.scale, name


def test_the_cases_cover_all_eight_aspect_ratios() -> None:
    ratios, *_ = CASES
    transform = meta.meta.VariableSizeImageTransform(ratios.tile)
    found = {transform(image, max_num_chunks=4)[1] for row in ratios.images for image in row}
    assert found == {(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)}
