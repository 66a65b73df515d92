"""Batches of picture conversations, drawn by many processes at once."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import struct

from mllama_jax.config import MllamaConfig
from mllama_jax.model.vision import TILES
from mllama_jax.processing.chat import ChatTemplate, encode_conversation, image_spans, load_template
from mllama_jax.processing.image import split_tiles
from mllama_jax.processing.tokenizer import Tokenizer
from mllama_jax.train.batch import IGNORED, Batch, answer_labels
from mllama_jax.train.pictures.dialogue import dialogue
from mllama_jax.train.pictures.example import Example, conversation
from mllama_jax.train.pictures.labels import CLASSES, patch_labels
from mllama_jax.train.pictures.stream import sample

LENGTH = 128  # text positions a row
TILES_A_ROW = 8  # two pictures of four tiles


@struct.dataclass
class PictureBatch(Batch):
    """A batch whose rows have different numbers of pictures.

    Attributes:
        tiles: int32 [B, M], which of the I * C tiles a row sees.
        patches: int8 [I, C, N - 1, aspects], for each patch of its pictures the classes of `patch_labels`.
    """

    tiles: jax.Array | np.ndarray
    patches: jax.Array | np.ndarray


def _tokens(row: Sequence[Example], tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """The ids of a conversation about one example's pictures, without the last questions where LENGTH is too short."""
    messages = conversation(row[0])
    for example in row[1:]:
        messages.append({"role": "user", "content": example.question})
        messages.append({"role": "assistant", "content": example.answer})
    tokens = encode_conversation(messages, tokenizer, template, add_generation_prompt=False).tokens
    return tokens if len(tokens) <= LENGTH else _tokens(row[:-1], tokenizer, template)


def make_batch(
    rows: Sequence[Sequence[Example]], config: MllamaConfig, tokenizer: Tokenizer, template: ChatTemplate
) -> PictureBatch:
    """One row for each run of examples about the same pictures; turns that do not fit LENGTH are left out."""
    vision = config.vision
    assert vision is not None
    tokens = np.full((len(rows), LENGTH), config.pad, np.int32)
    labels = np.full((len(rows), LENGTH), IGNORED, np.int32)
    spans = np.zeros((len(rows), TILES_A_ROW, 2), np.int32)
    tiles = np.zeros((len(rows), TILES_A_ROW), np.int32)
    pictures = sum(len(row[0].images) for row in rows)
    pixels = np.zeros((pictures, vision.max_tiles, 3, vision.tile, vision.tile), np.uint8)
    ratio_ids = np.zeros(pictures, np.int32)
    patches = np.zeros((pictures, vision.max_tiles, vision.tokens - 1, len(CLASSES)), np.int8)
    first = 0
    for b, row in enumerate(rows):
        row_tokens = _tokens(row, tokenizer, template)
        tokens[b, : len(row_tokens)] = row_tokens
        labels[b, : len(row_tokens)] = answer_labels(row_tokens, tokenizer)
        kept: list[tuple[int, int, int]] = []
        seen = image_spans(row_tokens, config.image_token)
        for i, (image, (start, end)) in enumerate(zip(row[0].images, seen, strict=True), first):
            split, ratio_ids[i] = split_tiles(image, vision.tile, vision.max_tiles)
            pixels[i, : len(split)] = split
            patches[i] = patch_labels(row[0], i - first, vision)
            kept += [(i * vision.max_tiles + tile, start, end) for tile in range(TILES[ratio_ids[i]])]
        tiles[b, : len(kept)] = [tile for tile, _, _ in kept]
        spans[b, : len(kept)] = [span for _, *span in kept]
        first += len(row[0].images)
    return PictureBatch(tokens, labels, pixels, ratio_ids, spans, tiles, patches)


def draw_batch(
    rng: np.random.Generator,
    rows: Mapping[str, int],
    config: MllamaConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate,
) -> PictureBatch:
    """A batch of so many rows of each family, each a dialogue about a new picture."""
    drawn = []
    for family, count in rows.items():
        for _ in range(count):
            drawn.append(dialogue(sample(family, rng), rng))
    return make_batch(drawn, config, tokenizer, template)


def batches(
    seed: int, rows: Mapping[str, int], config: MllamaConfig, directory: Path, workers: int
) -> Iterator[PictureBatch]:
    """An endless stream of batches from `workers` processes; `directory` holds the tokenizer."""
    context = multiprocessing.get_context("spawn")
    ready: multiprocessing.Queue[tuple[Path, PictureBatch]] = context.Queue(2 * workers)
    # Pixels travel in files, in memory where there is such a place: a pipe moves them too slowly.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        processes = [
            context.Process(
                target=_work, args=(seed, worker, rows, config, directory, Path(scratch), ready), daemon=True
            )
            for worker in range(workers)
        ]
        for process in processes:
            process.start()
        try:
            while True:
                path, batch = ready.get()
                pixels = np.load(path)
                path.unlink()
                yield dataclasses.replace(batch, pixels=pixels)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _work(
    seed: int,
    worker: int,
    rows: Mapping[str, int],
    config: MllamaConfig,
    directory: Path,
    scratch: Path,
    ready: multiprocessing.Queue[tuple[Path, PictureBatch]],
) -> None:
    tokenizer, template = Tokenizer.from_directory(directory), load_template(directory)
    rng = np.random.default_rng([0, seed, worker])
    for n in itertools.count():
        batch = draw_batch(rng, rows, config, tokenizer, template)
        path = scratch / f"{worker}-{n}.npy"
        np.save(path, batch.pixels)
        ready.put((path, dataclasses.replace(batch, pixels=np.zeros(0, np.uint8))))
