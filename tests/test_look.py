"""Where it looks: heat lies on what an answer is about, in the picture's own pixels."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mllama_jax
from mllama_jax import Mllama
from mllama_jax.cli import SHIPPED, main
from mllama_jax.config import VisionConfig
from mllama_jax.errors import InputError
from mllama_jax.generate import decode
from mllama_jax.look import view, words_of
from mllama_jax.processing.image import split_tiles
from mllama_jax.train.pictures import conversation, held_out

Draw = Callable[..., Image.Image]
VISION = VisionConfig(tile=56, width=32, layers=3, global_layers=1, heads=4, hidden=64, taps=(0, 2))


def test_heat_falls_on_the_shape_that_the_question_names() -> None:
    model = mllama_jax.load(SHIPPED, dtype="float32")
    about_one = (example for example in held_out("scenes", 1000) if len(example.boxes) == 1)
    ratios, hottest = [], []
    for example in itertools.islice(about_one, 100):
        look = model.look(conversation(example)[:1], example.answer)
        mean = np.mean([look.views[0].heat(n) for n in range(len(look.words))], axis=0)
        (named,), (scene,) = example.boxes, example.contents
        inside = np.zeros(mean.shape, bool)
        inside[named.top : named.bottom, named.left : named.right] = True
        ratios.append(mean[inside].mean() / mean[~inside].mean())
        boxes = [thing.box for thing in scene.things]
        on = [mean[box.top : box.bottom, box.left : box.right].mean() for box in boxes]
        hottest.append(boxes[int(np.argmax(on))] == named)
    assert np.mean(np.array(ratios) > 1) >= 0.95
    assert np.median(ratios) >= 5
    assert np.mean(hottest) >= 0.95


@pytest.mark.parametrize(("width", "height"), [(56, 56), (90, 60), (200, 40), (30, 180), (112, 112), (13, 9)])
def test_heat_lies_where_the_patch_was_cut(width: int, height: int) -> None:
    """One bright spot in a dark picture; the patch that holds most of its light gets all attention."""
    rng = np.random.default_rng(width)
    for _ in range(8):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3] = 255
        tiles, _ = split_tiles(picture := Image.fromarray(pixels), VISION.tile, VISION.max_tiles)
        side = VISION.tile // VISION.patch
        light = tiles.reshape(len(tiles), 3, side, VISION.patch, side, VISION.patch).sum((1, 3, 5), dtype=np.int64)
        attention = np.zeros((1, len(tiles), VISION.tokens), np.float32)
        attention[0, :, 1:] = (light == light.max()).reshape(len(tiles), -1)
        heat = view(attention, picture, VISION).heat(0)
        assert heat.shape == (height, width)
        hot_y, hot_x = np.argwhere(heat == heat.max()).mean(axis=0)
        patch = VISION.patch * max(width / VISION.tile, height / VISION.tile, 1)  # in pixels of the picture, at most
        assert max(abs(hot_y - y), abs(hot_x - x)) <= patch


def test_attention_is_shared_out_whole(small: Mllama, picture: Draw) -> None:
    content = [{"type": "image", "image": picture(1)}, {"type": "text", "text": "?"}]
    prompt = small.prompt([{"role": "user", "content": content}])
    rows, cross = small._prepare([prompt.tokens], [prompt.images])
    assert cross is not None
    weights = decode.attention_to_tiles(small.model, small.params, jnp.asarray(rows.tokens), cross)
    image = prompt.tokens.index(small.config.image_token)
    np.testing.assert_allclose(weights[0, image : len(prompt.tokens)].sum((-2, -1)), 1, rtol=1e-5)
    shown = int((np.asarray(cross.spans)[0, :, 1] > 0).sum())
    assert not np.asarray(weights)[0, image : len(prompt.tokens), shown:].any()


def test_words(small: Mllama) -> None:
    tokenizer = small.tokenizer
    assert tokenizer is not None
    text = "South gate, 95 – ä\n\nok "
    words = words_of(tokens := tokenizer.encode(text, specials=False), tokenizer)
    assert [word for word, _ in words] == text.split()
    spelled = [tokenizer.decode([tokens[place] for place in places]).strip() for _, places in words]
    assert spelled == text.split()


def test_several_pictures_each_have_their_heat(small: Mllama, picture: Draw) -> None:
    pictures = [picture(1, 90, 60), picture(2, 40, 100)]
    content: list[dict[str, Any]] = [{"type": "image", "image": each} for each in pictures]
    look = small.look([{"role": "user", "content": [*content, {"type": "text", "text": "Same?"}]}], "not quite")
    assert look.words == ["not", "quite"]
    heats = [view.heat(1) for view in look.views]
    assert [heat.shape for heat in heats] == [(60, 90), (100, 40)]
    assert all(heat.min() >= 0 and heat.max() > 0 for heat in heats)
    sheet = np.asarray(look.draw())
    assert sheet.shape[1] > 2 * 224
    assert sheet.max() > 200


@pytest.mark.parametrize(
    ("content", "answer", "message"),
    [
        ("Hello", "well", "the conversation shows no picture to look at"),
        ([{"type": "image", "image": Image.new("RGB", (9, 9))}], " \n", "the answer has no words"),
    ],
)
def test_nothing_to_look_at(small: Mllama, content: Any, answer: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        small.look([{"role": "user", "content": content}], answer)


def test_a_line_of_pixels_can_be_drawn(small: Mllama) -> None:
    content = [{"type": "image", "image": Image.new("RGB", (600, 1), "red")}, {"type": "text", "text": "?"}]
    assert small.look([{"role": "user", "content": content}], "red").draw().width > 224


def test_a_large_photo_is_drawn_small(small: Mllama) -> None:
    """What is kept of a photo of 12 megapixels is the photo and its patches, not its pixels once more for each word."""
    content = [{"type": "image", "image": Image.new("RGB", (4000, 3000), "red")}, {"type": "text", "text": "?"}]
    look = small.look([{"role": "user", "content": content}], " ".join(["red"] * 12))
    assert look.views[0].patches.nbytes < 2**16
    tracemalloc.start()
    look.draw()
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def test_command_line(small_directory: Path, picture: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo, drawn = tmp_path / "photo.png", tmp_path / "look.png"
    picture(1).save(photo)
    ask = ["generate", "--model", str(small_directory), "--image", str(photo), "--max-new-tokens", "12", "What is it?"]
    assert main([*ask, "--look", str(drawn)]) == 0
    with Image.open(drawn) as sheet:
        assert sheet.format == "PNG"
    capsys.readouterr()
    for argv, message in (
        ([*ask, "--look", str(tmp_path / "look.txt")], "expected the name of a .png file, got .txt"),
        ([*ask, "--look", str(tmp_path / "no" / "look.png")], "cannot write there; expected a folder that exists"),
        ([*ask, "--look", str(tmp_path)], "expected the name of a .png file"),
        (["generate", "Hello", "--look", str(drawn)], "--look shows where on a picture an answer looked; give --image"),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
