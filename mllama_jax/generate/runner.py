"""What runs the engine's programs on the device, and holds the caches of all slots between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mllama_jax.generate import decode, slots
from mllama_jax.generate.levels import Level
from mllama_jax.generate.requests import Picture, Request, settings_of
from mllama_jax.generate.sampling import Settings
from mllama_jax.generate.slots import Caches, Layers
from mllama_jax.model.mllama import MllamaModel, Params

PICTURES = 8  # for one reading at most


@dataclasses.dataclass(frozen=True, eq=False)
class Pending:
    """New tokens on their way from the device.

    Attributes:
        state, settings, spans, top: what the next block goes on from; the caches are the runner's.
        made, columns: the tokens, and how many a row got.
    """

    state: decode.State
    settings: Settings
    spans: jax.Array
    top: int
    made: decode.Made
    columns: jax.Array


class Runner:
    """Runs programs one after the other. Where one fails the caches are gone, and `begin` makes new ones.

    Attributes:
        level: of the caches.
        at_once: pictures that one program encodes, where just so many are to be: PICTURES, or 1 if these do not fit.
        caches: None where a program has taken them.
    """

    def __init__(self, model: MllamaModel, params: Params, level: Level):
        self.model, self.params, self.level = model, params, level
        self.caches: Caches | None = None
        self.at_once = PICTURES
        self._dispatcher = ThreadPoolExecutor(1, "dispatch")

    def begin(self, level: Level) -> None:
        """Empty caches."""
        self.level = level
        self.caches = slots.empty(self.model, slots=level.rows, length=level.positions, tiles=level.tiles)

    def move(self, level: Level, rows: Sequence[int]) -> None:
        """Go on at another level, at which these rows come first."""
        caches = self._taken()
        chosen = np.array([*rows, *[0] * (level.rows - len(rows))], np.int32)
        text, tiles, tile = [*caches.text], [*caches.tiles], slots.tile_length(self.model)
        del caches  # one layer after the other, so that no two whole caches exist
        for layers, length, axis in (text, level.positions, "cache"), (tiles, level.tiles * tile, "image_seq"):
            for i, layer in enumerate(layers):
                if (layer.rows, layer.length) != (level.rows, length):
                    layers[i] = layer = slots.moved(self.model, layer, chosen, length=length, axis=axis)
        self.caches, self.level = Caches(tuple(text), tuple(tiles)), level

    # ---- Pictures and rows ------------------------------------------------------------------------------------------

    def encode(self, pictures: Sequence[Picture]) -> Iterator[Layers]:
        """Keys and values of each picture. Just `at_once` go together, else each goes alone, for few programs."""
        size = self.at_once if len(pictures) == self.at_once else 1
        for start in range(0, len(pictures), size):
            some = pictures[start : start + size]
            pixels, ratio_ids = [each.pixels for each in some], np.concatenate([each.ratio_id for each in some])
            yield from slots.encode(self.model, self.params, pixels, ratio_ids)

    def put(self, piece: Layers, row: int, first: int) -> None:
        """Put a picture's keys and values into a row from a tile on."""
        caches = self._taken()
        self.caches = dataclasses.replace(caches, tiles=slots.put_tiles(self.model, caches.tiles, piece, row, first))

    def take(self, row: int, first: int) -> Layers:
        """Keys and values of a picture, from a row's tile on."""
        assert self.caches is not None
        return slots.take_tiles(self.model, self.caches.tiles, row, first)

    def copy(self, source: int, target: int) -> None:
        self.caches = slots.copy_row(self._taken(), source, target)

    # ---- Tokens -----------------------------------------------------------------------------------------------------

    def read(
        self, requests: Sequence[Request], spans: np.ndarray, rows: Sequence[int], *chunks: np.ndarray
    ) -> decode.Made:
        """Read chunks (see `slots.read`) of requests into their rows: what follows each, on the device."""
        settings, counts, top = settings_of(self.model.config, requests)
        made = np.array([len(each.answer.tokens) for each in requests], np.int32)
        places = spans, np.array(rows, np.int32)
        self.caches, logits = slots.read(self.model, self.params, self._taken(), *places, *chunks)
        return slots.follow(self.model, logits, settings, made, counts, top=top)

    def decode(
        self, requests: Sequence[Request | None], spans: np.ndarray, position: np.ndarray, steps: int
    ) -> Pending:
        """A block of new tokens for each row that has a request, its last token going to a position int32 [R]."""
        settings, counts, top = settings_of(self.model.config, requests)
        token, made = np.zeros((2, len(requests)), np.int32)
        for row, request in enumerate(requests):
            if request is not None:
                token[row], made[row] = request.answer.tokens[-1], len(request.answer.tokens)
        done = np.array([request is None for request in requests])
        state = self.state(token, position, made, done, counts)
        return self._dispatch(state, settings, jax.device_put(spans), top, steps).result()

    def go_on(self, block: Pending, steps: int) -> Future[Pending]:
        """The next block, from where one ends on the device."""
        return self._dispatch(block.state, block.settings, block.spans, block.top, steps)

    def state(self, *columns: np.ndarray | jax.Array | None) -> decode.State:
        """Of a token, its position, ... a row; where a block leaves it, lest the first take a program of its own."""
        place = jax.tree.leaves(self.params)[0].sharding
        mesh = place.mesh if isinstance(place, NamedSharding) and place.is_fully_addressable else None
        whole = mesh and NamedSharding(mesh, PartitionSpec())
        token, position, made, done, counts = jax.device_put(columns, whole)
        return decode.State((), token, position, made, done, counts)

    def _dispatch(
        self, state: decode.State, settings: Settings, spans: jax.Array, top: int, steps: int
    ) -> Future[Pending]:
        """Decode in the thread for that: where XLA's collectives join several GPUs these ask their host before each
        step, so that a dispatch lasts as long as the block. Nobody else touches the caches until it is done."""
        caches = self._taken()

        def run() -> Pending:
            after, made, columns = decode.decode(
                self.model,
                self.params,
                dataclasses.replace(state, cache=caches.text),
                caches.cross(spans, slots.tile_tokens(self.model)),
                settings,
                steps=steps,
                top=top,
            )
            self.caches = dataclasses.replace(caches, text=after.cache)
            return Pending(dataclasses.replace(after, cache=()), settings, spans, top, made, columns)

        return self._dispatcher.submit(run)

    def _taken(self) -> Caches:
        """The caches, for a program that gives them back."""
        caches, self.caches = self.caches, None
        assert caches is not None
        return caches
