"""Arrays spread over the devices of several processes, brought together for the first of them slice by slice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mllama_jax.convert.apply import Parameter, Parameters, Path
from mllama_jax.convert.axes import Index, everything
from mllama_jax.generate.decode import on_host


@contextmanager
def gathered(leaves: Mapping[Path, Any], dtypes: Mapping[Path, np.dtype]) -> Iterator[Parameters | None]:
    """Arrays as parameters of `dtypes` that the first process reads, in any order; None in the others.

    All processes call it, with the same arrays. The others take part in what the first reads until it is done: it tells
    them which slice comes, and that slice alone is whole in every process, cast on the devices before.
    """
    arrays, names = list(leaves.values()), list(leaves)
    words = 1 + 2 * max(array.ndim for array in arrays)

    def tell(*numbers: int) -> list[int]:
        """What the first process says, in all of them."""
        said = np.zeros(words, np.int32)
        said[: len(numbers)] = numbers
        return multihost_utils.broadcast_one_to_all(said).tolist()

    def fetch(number: int, index: Index) -> np.ndarray:
        array = arrays[number]
        part = array if index == everything(array.shape) else array[index]
        return np.asarray(on_host(part.astype(dtypes[names[number]])))

    def parameter(number: int) -> Parameter:
        def read(index: Index) -> np.ndarray:
            tell(number, *(bound for cut in index for bound in (cut.start, cut.stop)))
            return fetch(number, index)

        return Parameter(arrays[number].shape, dtypes[names[number]], read)

    if jax.process_index() == 0:
        yield {name: parameter(number) for number, name in enumerate(names)}
        tell(-1)
        return
    yield None
    while (said := tell())[0] >= 0:
        bounds = said[1 : 1 + 2 * arrays[said[0]].ndim]
        fetch(said[0], tuple(map(slice, bounds[::2], bounds[1::2])))
