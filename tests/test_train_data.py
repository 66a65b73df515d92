"""Chats as training reads them: labels, lengths, and an order that only the seed decides."""

from __future__ import annotations

import base64
import dataclasses
import multiprocessing
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllama_jax import Mllama
from mllama_jax.errors import InputError
from mllama_jax.train.batch import IGNORED
from mllama_jax.train.chats import Chats, Reader, TooLong
from mllama_jax.train.loader import Batches, Order
from tests.training import Line, line, write


def read(
    model: Mllama, directory: Path, lines: list[Any], rows: int = 1, length: int = 256, too_long: TooLong = "drop"
) -> Chats:
    write(directory, lines, directory)
    assert model.tokenizer is not None
    return Chats(
        directory / "chats.jsonl", Reader(model.tokenizer, model.template, model.config, rows, length, too_long)
    )


def test_labels_are_the_assistants_words_and_their_ends(small: Mllama, tmp_path: Path) -> None:
    asked: list[Line] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "One?"}]},
        {"role": "assistant", "content": "First."},
        {"role": "user", "content": [{"type": "text", "text": "Two?"}, {"type": "image", "image": "1.png"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Second."}]},
    ]
    chats = read(small, tmp_path, [{"messages": asked, "images": ["0.png"]}])
    ((row, images),) = chats[0]
    assert small.tokenizer is not None
    learned = [label for label in row.labels if label != IGNORED]
    assert small.tokenizer.decode(learned, skip_specials=False) == "First.<|eot_id|>Second.<|eot_id|>"
    assert [row.tokens[i + 1] for i, label in enumerate(row.labels) if label != IGNORED] == learned
    assert small.config.image_token not in row.labels
    assert [image.size for image in images] == [(60, 40), (60, 70)]


def test_a_picture_in_an_answer_is_no_label(small: Mllama, tmp_path: Path) -> None:
    drawn = [{"type": "text", "text": "Here:"}, {"type": "image"}, {"type": "text", "text": "a cat."}]
    asked: list[Line] = [{"role": "user", "content": "Draw."}, {"role": "assistant", "content": drawn}]
    ((row, _),) = read(small, tmp_path, [{"messages": asked, "images": ["0.png"]}])[0]
    assert small.tokenizer is not None
    assert small.config.image_token in row.tokens
    learned = [label for label in row.labels if label != IGNORED]
    assert small.tokenizer.decode(learned, skip_specials=False) == "Here:a cat.<|eot_id|>"


def test_pictures_are_paths_or_bytes(small: Mllama, tmp_path: Path) -> None:
    write(tmp_path, [], tmp_path)
    data = base64.b64encode((tmp_path / "2.png").read_bytes()).decode()
    content = [{"image": "2.png"}, {}, {"image": {"bytes": data}}, {"path": "2.png"}]
    content = [{"type": "image"} | part for part in content]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Same."}]
    ((_, images),) = read(small, tmp_path, [{"messages": messages, "images": [{"path": "2.png", "bytes": None}]}])[0]
    assert len(images) == 4
    for image in images[1:]:
        np.testing.assert_array_equal(image, images[0])


def test_pairs_share_their_prompt(small: Mllama, tmp_path: Path) -> None:
    prompt = line(0)["messages"][:1]
    better, worse = ([{"role": "assistant", "content": text}] for text in ("Better.", "Far worse."))
    chats = read(
        small, tmp_path, [{"prompt": prompt, "chosen": better, "rejected": worse, "images": ["0.png"]}], rows=2
    )
    (chosen, _), (rejected, pictures) = chats[0]
    assert len(pictures) == 1
    first = next(i for i, label in enumerate(chosen.labels) if label != IGNORED)
    assert chosen.tokens[: first + 1] == rejected.tokens[: first + 1]
    assert chats.lengths[0] == max(len(chosen.tokens), len(rejected.tokens))


def test_long_chats_are_dropped_or_cut_but_never_their_pictures(small: Mllama, tmp_path: Path) -> None:
    late = line(0, words=40)
    late["messages"] += line(1)["messages"]
    late["images"] += ["1.png"]
    lines = [line(0), line(3, words=40), late]
    dropped = read(small, tmp_path, lines, length=64)
    assert (dropped.lines.tolist(), dropped.dropped, dropped.cut) == ([1], 2, 0)
    cut = read(small, tmp_path, lines, length=64, too_long="cut")
    assert (cut.lines.tolist(), cut.dropped, cut.cut) == ([1, 2], 1, 1)
    ((row, _),) = cut[1]
    assert (len(row.tokens), len(row.labels), row.labels[-1]) == (64, 64, IGNORED)


def batches(chats: Chats, samples: int, seed: int = 0, mine: slice | None = None, steps: int = 20) -> Batches:
    return Batches(chats, Order(chats, samples, seed), steps, samples, 1, mine or slice(0, samples))


def test_each_epoch_shows_every_chat_once_in_an_order_of_its_own(small: Mllama, tmp_path: Path) -> None:
    chats = read(small, tmp_path, [line(i, words=1 + 9 * (i % 4)) for i in range(23)])
    order = Order(chats, 4, 7)
    epochs = [[order[epoch * len(order) + i] for i in range(len(order))] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(int(i) for _, found in epoch for i in found) == list(range(23))
        for shape, found in epoch:
            assert len(found) <= 4
            assert max(chats.lengths[found]) <= shape.length
            assert set(chats.pictures[found]) == {shape.pictures}
    assert len({str(epoch) for epoch in epochs}) == 3
    again = Order(chats, 4, 7)
    assert str(epochs[2]) == str([again[2 * len(order) + i] for i in range(len(order))])
    assert str(epochs[0]) != str([Order(chats, 4, 8)[i] for i in range(len(order))])


def test_a_reader_begins_at_any_step(small: Mllama, tmp_path: Path) -> None:
    chats = read(small, tmp_path, [line(i) for i in range(11)])
    whole = list(batches(chats, 3, steps=9).read())
    assert len(whole) == 9
    rest = list(batches(chats, 3, steps=9).read(4))
    assert len(rest) == 5
    for one, two in zip(rest, whole[4:], strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)
        np.testing.assert_array_equal(one.pixels, two.pixels)


def test_processes_that_make_batches_start_together(small: Mllama, tmp_path: Path) -> None:
    """Wherever a reader begins: one by one they would hold up as many steps as there are processes."""
    chats = read(small, tmp_path, [line(i) for i in range(11)])
    made = dataclasses.replace(batches(chats, 3, steps=9), workers=2)
    before = multiprocessing.active_children()
    with closing(made.read(4)) as reader:
        one = next(reader)
        deadline = time.monotonic() + 60
        while len(multiprocessing.active_children()) < len(before) + 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        np.testing.assert_array_equal(one.tokens, made[4].tokens)
    assert multiprocessing.active_children() == before


def test_processes_share_a_batch_out(small: Mllama, tmp_path: Path) -> None:
    chats = read(small, tmp_path, [line(i) for i in range(10)])
    for step in range(4):
        whole = batches(chats, 4)[step]
        for name in ("tokens", "labels", "pixels", "ratio_ids", "spans"):
            parts = [getattr(batches(chats, 4, mine=mine)[step], name) for mine in (slice(0, 2), slice(2, 4))]
            np.testing.assert_array_equal(np.concatenate(parts, axis=1), getattr(whole, name))


def test_what_cannot_be_opened_is_named_with_its_line(small: Mllama, tmp_path: Path) -> None:
    chats = read(small, tmp_path, [line(0), line(1)])
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"chats.jsonl, line 2: .*1.png': expected a picture"):
        next(iter(batches(chats, 2).read()))
