"""What a profile's kernels are added up to."""

from __future__ import annotations

import pytest

from mllama_jax.bench_profile import covered, job, table
from mllama_jax.errors import InputError


def test_what_lies_beside_other_kernels_is_hidden() -> None:
    kernels = [("gemm", 0.0, 4.0), ("ncclAllReduce", 3.0, 7.0), ("all_reduce_3_fusion", 8.0, 9.0), ("gemm", 9.0, 12.0)]
    busy, *longest = table([(name, 1e3 * start, 1e3 * end) for name, start, end in kernels], steps=2, top=1)
    assert busy == "  busy 5.500 ms of 6.000; 1 collectives 2.500, of which hidden 0.500"
    assert longest == ["       1.0 x    3500.0 us     3.500 ms  gemm"]


def test_spans_that_overlap_count_once() -> None:
    assert covered([(5, 6), (0, 3), (1, 2), (2, 4)]) == 5


@pytest.mark.parametrize(
    ("name", "message"), [("decode", "decode: expected a kind and a number"), ("train:1", "expected one of decode, te")]
)
def test_what_is_not_known_is_told(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        job(None, name)  # pyright: ignore[reportArgumentType]
