"""From chats to batches of few shapes, in an order that only the seed decides, read ahead of the training by grain."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from mllama_jax.generate.batch import bucket
from mllama_jax.sharding.rules import Rules
from mllama_jax.train.batch import Batch, Shape, stacked
from mllama_jax.train.chats import Chats
from mllama_jax.train.pictures.drawn import Drawings

SHORTEST = 32  # the least length of a batch
AHEAD = 4  # steps that this process reads before they are wanted, each by a thread of its own


class Order:
    """Which chats make the batches of each step: groups of like length and number of pictures, each padded to a shape.

    A step is a function of the seed and its number. In each epoch every chat occurs once; what a group lacks to fill
    its last step is left empty.
    """

    def __init__(self, chats: Chats | Drawings, samples: int, seed: int | None):
        """`samples` a step; without a seed they come as they are in the file."""
        self.samples, self.seed = samples, seed
        most = chats.reader.length
        sizes, which = np.unique(np.stack([chats.lengths, chats.pictures]), axis=1, return_inverse=True)
        shapes = [
            Shape(min(bucket(length, SHORTEST), most), bucket(pictures) if pictures else 0)
            for length, pictures in sizes.T.tolist()
        ]
        self.groups = {
            shape: np.flatnonzero(np.isin(which, [i for i, each in enumerate(shapes) if each == shape]))
            for shape in sorted(set(shapes), key=dataclasses.astuple)
        }

    def __len__(self) -> int:
        """Steps in an epoch."""
        return sum(-(-len(group) // self.samples) for group in self.groups.values())

    def __getitem__(self, step: int) -> tuple[Shape, np.ndarray]:
        """The shape of a step's batches, and the chats in them, at most `samples`."""
        return self._epoch(step // len(self))[step % len(self)]

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _epoch(self, epoch: int) -> list[tuple[Shape, np.ndarray]]:
        made = []
        rng = None if self.seed is None else np.random.default_rng([self.seed, epoch])
        for shape, group in self.groups.items():
            chats = group if rng is None else rng.permutation(group)
            made += [(shape, chats[start : start + self.samples]) for start in range(0, len(chats), self.samples)]
        return made if rng is None else [made[i] for i in rng.permutation(len(made))]


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of each step, `accumulate` of them stacked: a step's number -> arrays that begin [A, B].

    Attributes:
        steps: how many there are.
        samples: chats in one batch, of which this process reads those in `mine`.
        workers: processes that make them; threads of this one where there are none.
    """

    chats: Chats | Drawings
    order: Order
    steps: int
    samples: int
    accumulate: int
    mine: slice
    workers: int = 0

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        shape, found = self.order[step]
        made = []
        for i in range(self.accumulate):
            some = found[i * self.samples : (i + 1) * self.samples][self.mine]
            made.append(self.chats.batch(some.tolist(), self.mine.stop - self.mine.start, shape))
        return stacked(made)

    def read(self, begin: int = 0) -> grain.DatasetIterator[Batch]:
        """The batches of the steps from `begin` on in order, made ahead.

        A reader is not set to where another was: grain would start its processes one by one, each when its turn comes.
        """
        threads = 1 if self.workers else AHEAD  # several that draw in one process take turns at its interpreter lock
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        source: Any = self
        batches = grain.MapDataset.source(source).slice(slice(begin, None)).to_iter_dataset(options)
        flags.FLAGS.mark_as_parsed()  # grain reads its own, which no command line of ours sets
        return iter(batches.mp_prefetch(grain.MultiprocessingOptions(self.workers), _end_with_parent))

    def lines(self, step: int) -> list[int]:
        """The numbers of the lines that a step reads."""
        return sorted(int(line) for line in self.chats.lines[self.order[step][1]])


def _end_with_parent(worker: int, workers: int) -> None:
    """Let a process that makes batches leave signals to its parent, and end when that does, however it does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def own_samples(samples: int, rules: Rules | None) -> slice:
    """Which samples of a batch lie, in part at least, on this process's devices."""
    if rules is None:
        return slice(0, samples)
    places = rules.sharding("batch").addressable_devices_indices_map((samples,)).values()
    cuts = [index[0].indices(samples) for index in places if index is not None]
    return slice(min(cut[0] for cut in cuts), max(cut[1] for cut in cuts))


def placed(batches: Batch, samples: int, mine: slice, rules: Rules | None) -> Batch:
    """A step's batches on the device, or on those of a mesh, of which this process has read the samples `mine`."""
    if rules is None:
        return jax.device_put(batches)

    def place(local: Any) -> jax.Array:
        each = local.shape[1] // (mine.stop - mine.start)
        shape, first = (local.shape[0], samples * each, *local.shape[2:]), mine.start * each

        def piece(index: tuple[slice, ...] | None) -> np.ndarray:
            start, stop, _ = (index or (slice(None),) * 2)[1].indices(shape[1])
            return local[:, start - first : stop - first]

        return jax.make_array_from_callback(shape, rules.sharding(None, "batch"), piece)

    return jax.tree.map(place, batches)
