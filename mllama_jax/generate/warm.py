"""Every program that an engine runs in its life, compiled before anyone waits for it.

There are few, for what they work on has few sizes: caches are at one of the engine's levels, prompts are read in chunks
of a few sizes, alone or together, and settings are of two kinds.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from mllama_jax.config import VisionConfig
from mllama_jax.generate import decode, engine, slots
from mllama_jax.generate.answer import Answer
from mllama_jax.generate.engine import Engine
from mllama_jax.generate.levels import Level, Need, choose, spare_memory
from mllama_jax.generate.requests import Picture, Request, settings_of
from mllama_jax.generate.runner import PICTURES
from mllama_jax.generate.sampling import SamplingParams
from mllama_jax.model.vision import TILES
from mllama_jax.processing.chat import Prompt

AT_ONCE = 16  # programs that are compiled at once, at most
KINDS = tuple(SamplingParams(max_new_tokens=engine.STEPS + 2, stop_ids=(), logprobs=n) for n in (0, 1))  # of settings


def warm_up(served: Engine) -> Iterator[tuple[int, int]]:
    """Compile all programs, several at once, and run each; gives how many of how many steps of this are done.

    The engine must be idle, and is empty thereafter. Its caches are at their largest for a while, so that what does not
    fit is known now.
    """
    levels = served.scheduler.levels
    encoders = list(_encoders(served))
    programs = len(encoders) + sum(len(KINDS) + len(level.reads()) for level in levels)
    steps, done = programs + len(levels), itertools.count(1)
    compilers = ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1))
    try:  # JAX keeps what was compiled for calls with such arguments
        lowered = itertools.chain.from_iterable(_lowered(served, level) for level in reversed(levels))
        compiled = []
        for each in itertools.chain(encoders, lowered):
            compiled.append(compilers.submit(each.compile))
            yield 0, steps
        for each in compiled:
            each.result()
            yield next(done), steps
        if encoders and not _fits(compiled[len(encoders) - 1].result()):
            served.runner.at_once = 1
    finally:
        compilers.shutdown(cancel_futures=True)
    for level in levels:
        _rehearse(served, level)
        yield next(done), steps
    served.scheduler.begin_anew()
    served.scheduler.counts.clear()


def _encoders(served: Engine) -> Iterator[jax.stages.Lowered]:
    """The programs that encode pictures, if any are."""
    vision = served.config.vision
    if vision is not None and any(level.tiles for level in served.scheduler.levels):
        picture = _picture(vision)
        for size in 1, PICTURES:
            ratio_ids = np.repeat(picture.ratio_id, size)
            yield slots.encode.lower(served.runner.model, served.runner.params, [picture.pixels] * size, ratio_ids)


def _fits(program: jax.stages.Compiled) -> bool:
    """Whether there is memory for what a program makes and needs meanwhile."""
    memory: Any = program.memory_analysis()
    spare = spare_memory()
    return spare is None or memory.temp_size_in_bytes + memory.output_size_in_bytes <= spare


def _lowered(served: Engine, level: Level) -> Iterator[jax.stages.Lowered]:
    """The programs at a level that take long to compile."""
    model, params, n, width = served.runner.model, served.runner.params, level.rows, level.tiles
    caches = slots.empty(model, slots=n, length=level.positions, tiles=width)

    def ints(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.int32)

    for rows, size in level.reads():
        places = ints(rows, width, 2), ints(rows)
        yield slots.read.lower(model, params, caches, *places, ints(rows, size), ints(rows), ints(rows))
    for kind in KINDS:
        settings, counts, top = settings_of(served.config, [_request(served, 0, 1, kind)] * n)
        state = served.runner.state(ints(n), ints(n), ints(n), np.ones(n, bool), counts)
        state = dataclasses.replace(state, cache=caches.text)
        cross = caches.cross(jax.device_put(ints(n, width, 2)), slots.tile_tokens(model))
        run = decode.decoder(model.constrain.platform)
        among = decode.peers_of(model, n)
        yield run.lower(model, params, state, cross, settings, among, steps=engine.STEPS, top=top)


def _rehearse(served: Engine, level: Level) -> None:
    """Run all that is run at a level, and whatever leads from there to others."""
    runner, scheduler = served.runner, served.scheduler
    scheduler.begin_anew(level)
    runner.copy(0, 0)
    if level.tiles and (vision := served.config.vision) is not None:
        for size in 1, runner.at_once:
            for piece in runner.encode([_picture(vision)] * size):
                runner.put(piece, 0, 0)
        runner.put(runner.take(0, 0), 0, 0)
    numbers = itertools.count()
    for kind, (rows, size) in itertools.product(KINDS, level.reads()):
        for _ in range(min(rows, 2)):
            served.submit(_request(served, next(numbers), min(size, level.positions - kind.max_new_tokens), kind))
        while served.busy:
            for _ in served.step():
                pass
    for other in scheduler.levels:
        largest = [Need(other.positions, other.tiles)] * other.rows
        if other is not level and choose(scheduler.levels, level, largest) is other:
            scheduler.begin_anew(level)
            scheduler.move(other)


def _picture(vision: VisionConfig) -> Picture:
    pixels = np.zeros((1, vision.max_tiles, 3, vision.tile, vision.tile), np.uint8)
    return Picture(b"", pixels, np.array([TILES.index(vision.max_tiles)], np.int32))


def _request(served: Engine, number: int, size: int, kind: SamplingParams) -> Request:
    """Of so many tokens, if there is room, which begin unlike those of the numbers before."""
    tokens = [number % served.config.text.vocab] * min(size, served.scheduler.room(0) - kind.max_new_tokens)
    return Request.prepared(served.config, Prompt(tokens, []), Answer(kind, (), None), [], None)
