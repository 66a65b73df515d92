"""Batches of picture conversations, drawn by many processes at once."""

from __future__ import annotations

import multiprocessing
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mllama_jax.config import MllamaConfig
from mllama_jax.model.vision import TILES
from mllama_jax.processing.chat import ChatTemplate, encode_conversation, image_spans
from mllama_jax.processing.image import split_tiles
from mllama_jax.processing.tokenizer import Tokenizer
from mllama_jax.train.pictures.dialogue import follow_ups
from mllama_jax.train.pictures.example import Example, conversation
from mllama_jax.train.pictures.stream import sample
from mllama_jax.train.step import IGNORED, Batch

LENGTH = 160  # text positions a row
TILES_A_ROW = 8  # two pictures of four tiles


def answer_labels(
    messages: Sequence[Mapping], tokenizer: Tokenizer, template: ChatTemplate
) -> tuple[list[int], list[int]]:
    """The ids of a conversation that ends with an answer, and for each the next id where an assistant makes it."""
    tokens = encode_conversation(messages, tokenizer, template, add_generation_prompt=False).tokens
    labels = [IGNORED] * len(tokens)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(encode_conversation(messages[:i], tokenizer, template).tokens)
            end = len(encode_conversation(messages[: i + 1], tokenizer, template, add_generation_prompt=False).tokens)
            labels[start - 1 : end - 1] = tokens[start:end]
    return tokens, labels


def make_batch(
    rows: Sequence[Sequence[Example]], config: MllamaConfig, tokenizer: Tokenizer, template: ChatTemplate
) -> Batch:
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
    first = 0
    for b, row in enumerate(rows):
        messages = conversation(row[0])
        row_tokens, row_labels = answer_labels(messages, tokenizer, template)
        for example in row[1:]:
            turns = [{"role": "user", "content": example.question}, {"role": "assistant", "content": example.answer}]
            longer = answer_labels(messages + turns, tokenizer, template)
            if len(longer[0]) > LENGTH:
                break
            messages, (row_tokens, row_labels) = messages + turns, longer
        tokens[b, : len(row_tokens)], labels[b, : len(row_labels)] = row_tokens, row_labels
        kept: list[tuple[int, int, int]] = []
        seen = image_spans(row_tokens, config.image_token)
        for i, (image, (start, end)) in enumerate(zip(row[0].images, seen, strict=True), first):
            split, ratio_ids[i] = split_tiles(image, vision.tile, vision.max_tiles)
            pixels[i, : len(split)] = split
            kept += [(i * vision.max_tiles + tile, start, end) for tile in range(TILES[ratio_ids[i]])]
        tiles[b, : len(kept)] = [tile for tile, _, _ in kept]
        spans[b, : len(kept)] = [span for _, *span in kept]
        first += len(row[0].images)
    return Batch(tokens, labels, pixels, ratio_ids, tiles, spans)


def draw_batch(
    rng: np.random.Generator,
    rows: Mapping[str, int],
    config: MllamaConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate,
) -> Batch:
    """A batch of so many rows of each family, each about a new picture, with up to three further questions about it."""
    drawn = []
    for family, count in rows.items():
        for _ in range(count):
            example = sample(family, rng)
            drawn.append([example, *follow_ups(example, int(rng.integers(4)), rng)])
    return make_batch(drawn, config, tokenizer, template)


def _work(
    seed: int, worker: int, rows: Mapping[str, int], config: MllamaConfig, directory: str, out: multiprocessing.Queue
) -> None:
    from mllama_jax.processing.chat import load_template

    tokenizer, template = Tokenizer.from_directory(directory), load_template(directory)
    rng = np.random.default_rng([0, seed, worker])
    while True:
        out.put(draw_batch(rng, rows, config, tokenizer, template))


def batches(seed: int, rows: Mapping[str, int], config: MllamaConfig, directory: str, workers: int) -> Iterator[Batch]:
    """An endless stream of batches from `workers` processes; `directory` holds the tokenizer."""
    context = multiprocessing.get_context("spawn")
    ready: multiprocessing.Queue = context.Queue(2 * workers)
    for worker in range(workers):
        context.Process(target=_work, args=(seed, worker, rows, config, directory, ready), daemon=True).start()
    ahead: queue.Queue = queue.Queue(4)

    def unpack() -> None:
        while True:
            ahead.put(ready.get())

    threading.Thread(target=unpack, daemon=True).start()
    while True:
        yield ahead.get()
