"""Pictures to train on: answers are worked out again here, from the words of the question and what was drawn."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image

from mllama_jax.errors import InputError
from mllama_jax.processing.image import split_tiles
from mllama_jax.train.pictures import FAMILIES, conversation, demo, held_out, recipe, sample, scenes, shuffled, training
from mllama_jax.train.pictures import tokenizer as tokenizers
from mllama_jax.train.pictures.charts import CATEGORIES, Chart
from mllama_jax.train.pictures.labels import CHARACTERS, CLASSES, patch_labels
from mllama_jax.train.pictures.scenes import COLOURS, SHAPES, Scene
from mllama_jax.train.pictures.text import Sign


@pytest.fixture(scope="module")
def examples():
    return {family: list(held_out(family, 300)) for family in FAMILIES}


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.build()


# ---- Answers ------------------------------------------------------------------------------------------------------


def named(scene: Scene, question: str):
    """The things that a question names by colour, shape and place."""
    words = re.findall(r"\w+", question.lower())
    things = list(scene.things)
    for colour in set(COLOURS).intersection(words):
        things = [t for t in things if t.colour == colour]
    for shape in SHAPES:
        if {shape, shape + "s", shape + "es"}.intersection(words):
            things = [t for t in things if t.shape == shape]
    place = re.search(r" (?:in|at|on) the ((?:top|bottom)(?: left| right)?|left|right|middle)\b", question)
    if place:
        corner_or_middle = " " in place[1] or place[1] == "middle"
        things = [t for t in things if (t.place == place[1] if corner_or_middle else place[1] in t.place.split())]
    return things


def answer_scene(scene: Scene, question: str) -> str:
    things = named(scene, question)
    if re.match("how many|count", question.lower()):
        return str(len(things))
    if re.match("is there|do you see", question.lower()):
        return "yes" if things else "no"
    (thing,) = things
    if re.match("where|which place", question.lower()):
        return thing.place
    return thing.colour if "colour" in question else thing.shape


def answer_pair(first: Scene, second: Scene, question: str) -> str:
    if one := re.match("In the (first|second) picture, (.*)", question):
        return answer_scene(first if one[1] == "first" else second, one[2])
    a, b = len(named(first, question)), len(named(second, question))
    if "more" in question:
        return "first" if a > b else "second" if b > a else "the same"
    return "yes" if a and b else "no"


def answer_chart(chart: Chart, question: str) -> str:
    values = {bar.name: bar.value for bar in chart.bars}
    asked = [word for word in re.findall(r"\w+", question) if word in values]
    if "bars" in question:
        return str(len(values))
    for word, extreme in (("largest", max), ("smallest", min)):
        if word in question:
            (name,) = [name for name, value in values.items() if value == extreme(values.values())]
            return name
    if len(asked) == 2:
        a, b = (values[name] for name in asked)
        assert a != b
        return "yes" if (a > b if "larger" in question else a < b) else "no"
    return str(values[asked[0]])


def answer_sign(sign: Sign, question: str) -> str:
    if "number" in question:
        (number,) = [word for word in sign.words if any(map(str.isdigit, word))]
        return number
    if "word" in question:
        (n,) = [n for n, word in enumerate(("first", "second", "third", "last")) if word in question]
        return sign.words[-1 if n == 3 else n]
    return " ".join(sign.words)


ANSWER = {"scenes": answer_scene, "charts": answer_chart, "text": answer_sign, "pairs": answer_pair}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_question_has_one_answer_and_it_is_the_one_given(examples, family):
    for example in examples[family]:
        assert ANSWER[family](*example.contents, example.question) == example.answer, example


@pytest.mark.parametrize("family", FAMILIES)
def test_boxes_lie_in_their_pictures(examples, family):
    for example in examples[family]:
        assert [image.size for image in example.images] == [content.size for content in example.contents]
        for box in example.boxes:
            width, height = example.images[box.image].size
            assert 0 <= box.left < box.right <= width
            assert 0 <= box.top < box.bottom <= height


@pytest.mark.parametrize("kind", ["scenes/exists", "charts/compare", "pairs/both"])
def test_yes_and_no_are_equally_frequent(kind):
    family, rng = kind.split("/")[0], np.random.default_rng(0)
    answers = [e.answer for e in (sample(family, rng) for _ in range(1000)) if e.kind == kind]
    assert set(answers) == {"yes", "no"}
    assert abs(answers.count("yes") / len(answers) - 0.5) < 3 * 0.5 / len(answers) ** 0.5


def test_more_is_answered_evenly():
    rng = np.random.default_rng(0)
    answers = [e.answer for e in (sample("pairs", rng) for _ in range(900)) if e.kind == "pairs/more"]
    for answer in ("first", "second", "the same"):
        assert abs(answers.count(answer) / len(answers) - 1 / 3) < 3 * (2 / 9 / len(answers)) ** 0.5


# ---- Pictures -----------------------------------------------------------------------------------------------------


def test_things_stand_apart_each_inside_its_place():
    rng = np.random.default_rng(0)
    for _ in range(500):
        scene = scenes.compose(rng)
        for a, b in itertools.combinations([t.box for t in scene.things], 2):
            assert a.right <= b.left or b.right <= a.left or a.bottom <= b.top or b.bottom <= a.top
        for thing in scene.things:
            column, row = scenes.PLACES.index(thing.place) % 3, scenes.PLACES.index(thing.place) // 3
            assert column * scene.size[0] / 3 <= thing.box.left < thing.box.right <= (column + 1) * scene.size[0] / 3
            assert row * scene.size[1] / 3 <= thing.box.top < thing.box.bottom <= (row + 1) * scene.size[1] / 3


def test_pixels_show_the_things_and_nothing_else(examples):
    palette = np.array(list(COLOURS.values()))
    for example in examples["scenes"][:100]:
        (image,), (scene,) = example.images, example.contents
        pixels = np.asarray(image).astype(int)
        coloured = np.ptp(pixels, -1) > 70
        for thing in scene.things:
            inside = np.s_[thing.box.top : thing.box.bottom, thing.box.left : thing.box.right]
            shown = pixels[inside][coloured[inside]]
            assert len(shown) > 0.2 * coloured[inside].size
            nearest = np.abs(shown[:, None] - palette).sum(-1).argmin(-1)
            assert np.mean(nearest == list(COLOURS).index(thing.colour)) > 0.8
            coloured[inside] = False
        assert not coloured.any()


def test_bars_end_where_the_scale_says(examples):
    for example in examples["charts"]:
        (image,), (chart,) = example.images, example.contents
        for bar in chart.bars:
            middle = (bar.box.left + bar.box.right) // 2, (bar.box.top + bar.box.bottom) // 2
            if bar.box.bottom - bar.box.top > 2 < bar.box.right - bar.box.left:
                assert np.abs(np.subtract(image.getpixel(middle), bar.colour)).max() < 25
            across, plot = bar.box.right - bar.box.left, chart.plot
            share = (
                across / (plot.right - plot.left)
                if chart.horizontal
                else (bar.box.bottom - bar.box.top) / (plot.bottom - plot.top)
            )
            if not chart.printed:
                assert chart.unit * round(share * chart.end / chart.unit) == bar.value


def test_all_aspect_ratios_occur_and_pictures_are_seen_at_full_size(examples):
    ids = [split_tiles(e.images[0], tile=112, max_tiles=4)[1] for e in examples["scenes"]]
    assert set(ids) == set(range(1, 9))
    assert all(max(e.images[0].size) <= 448 for e in examples["scenes"])


# ---- Streams ------------------------------------------------------------------------------------------------------


def pixels(example) -> bytes:
    return b"".join(image.tobytes() for image in example.images)


@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_examples_are_always_the_same(examples, family):
    for again, example in zip(held_out(family, 20), examples[family], strict=False):
        assert (again.question, again.answer, again.boxes) == (example.question, example.answer, example.boxes)
        assert pixels(again) == pixels(example)


def test_training_streams_differ_from_each_other_and_from_the_held_out_split(examples):
    streams = [list(itertools.islice(training(*key), 60)) for key in ((0, 0), (0, 1), (1, 0), (0, 0))]
    drawn = [[pixels(example) for example in stream] for stream in streams]
    assert drawn[0] == drawn[3]
    kept = {pixels(example) for family in FAMILIES for example in examples[family]}
    assert len({*drawn[0], *drawn[1], *drawn[2], *kept}) == 180 + len(kept)
    assert {e.family for e in itertools.islice(training(0, 0, {"text": 1, "charts": 2}), 40)} == {"text", "charts"}


def test_shuffled_questions_meet_other_pictures(examples):
    some = examples["scenes"][:50]
    mixed = shuffled(some)
    assert [(e.question, e.answer) for e in mixed] == [(e.question, e.answer) for e in some]
    assert all(a.images[0] is not b.images[0] for a, b in zip(some, mixed, strict=True))
    with pytest.raises(InputError, match="at least 2"):
        shuffled(some[:1])


def test_an_unknown_family_is_refused():
    with pytest.raises(InputError, match="'maps' is not known; expected scenes"):
        sample("maps", np.random.default_rng(0))


def test_conversations_show_pictures_before_the_question(examples):
    user, assistant = conversation(examples["charts"][0])
    assert [part["type"] for part in user["content"]] == ["image", "text"]
    assert user["content"][1]["text"] == examples["charts"][0].question
    assert assistant["content"] == [{"type": "text", "text": examples["charts"][0].answer}]
    user, _ = conversation(examples["pairs"][0])
    assert [part["type"] for part in user["content"]] == ["image", "text", "image", "text", "text"]
    assert "first" in user["content"][1]["text"]
    assert "second" in user["content"][3]["text"]


def test_bundled_pictures_are_the_ones_that_the_questions_are_about():
    questions = json.loads((demo.PICTURES / "questions.json").read_text())
    assert {path.name for path in demo.PICTURES.glob("*.png")} == set(questions)
    for name, drawn in demo.examples().items():
        assert questions[name] == [{"question": e.question, "answer": e.answer} for e in drawn]
        for example in drawn:
            assert ANSWER[example.family](*example.contents, example.question) == example.answer
        with Image.open(demo.PICTURES / name) as image:
            difference = np.asarray(image).astype(int) - np.asarray(drawn[0].images[0])
        assert np.abs(difference).mean() < 1  # fonts may differ a little between releases of FreeType
        assert (demo.PICTURES / name).stat().st_size < 100_000


# ---- Labels of patches --------------------------------------------------------------------------------------------


def labelled_patches(example, image=0):
    """The labels [..., aspects] of a picture's patches and the pixels [..., 3] at their centres."""
    vision = recipe.CONFIG.vision
    assert vision is not None
    tiles, _ = split_tiles(example.images[image], vision.tile, vision.max_tiles)
    labels = patch_labels(example, image, vision)[: len(tiles)]
    half = vision.patch // 2
    pixels = tiles[:, :, half :: vision.patch, half :: vision.patch].transpose(0, 2, 3, 1).reshape(*labels.shape[:2], 3)
    return labels.reshape(-1, len(CLASSES)), pixels.reshape(-1, 3).astype(int)


def test_labels_of_bars_lie_on_the_bars(examples):
    aspects = list(CLASSES)
    for example in examples["charts"]:
        (chart,) = example.contents
        if len({bar.colour for bar in chart.bars}) < len(chart.bars):
            continue
        labels, pixels = labelled_patches(example)
        for n, bar in enumerate(chart.bars, 1):
            own = labels[:, aspects.index("part")] == n
            assert set(labels[own, aspects.index("category")]) <= {1 + CATEGORIES.index(bar.name)}
            assert set(labels[own, aspects.index("value")]) <= {bar.value}
            coloured = np.abs(pixels - bar.colour).max(axis=1) <= 12
            assert not (coloured & ~own).any()


def test_labels_of_shapes_tell_their_colours(examples):
    aspects = list(CLASSES)
    for example in examples["scenes"]:
        labels, pixels = labelled_patches(example)
        for n, colour in enumerate(COLOURS.values(), 1):
            coloured = np.abs(pixels - colour).max(axis=1) <= 12
            assert set(labels[coloured, aspects.index("colour")]) <= {n}
        assert (labels[:, aspects.index("colour")] > 0).any()


def test_labels_of_characters_spell_the_words(examples):
    part, character, number = ([*CLASSES].index(aspect) for aspect in ("part", "character", "number"))
    found = total = 0
    for example in examples["text"]:
        (sign,) = example.contents
        labels, _ = labelled_patches(example)
        seen = {(row[part], row[number]): CHARACTERS[row[character] - 1] for row in labels if row[part] > 0}
        for (n, i), letter in seen.items():
            assert sign.words[n - 1][i - 1] == letter
        found, total = found + len(seen), total + sum(map(len, sign.words))
    assert found > 0.7 * total  # narrow letters may lie between the centres of two patches


# ---- Tokenizer ----------------------------------------------------------------------------------------------------


def test_tokenizer_is_laid_out_like_llama(tokenizer):
    ids = tokenizer.get_vocab()
    assert sorted(ids.values()) == list(range(769))
    assert [ids[t] for t in ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>")] == [512, 513, 516]
    assert [ids[t] for t in ("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>")] == [520, 521, 522, 768]
    assert ids["<|reserved_special_token_246|>"] == 767
    assert tokenizer.encode("hello").ids[0] == 512


def test_everything_asked_and_answered_survives_the_tokenizer(examples, tokenizer):
    for text in {text for family in examples.values() for e in family for text in (e.question, e.answer)}:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
    assert len(tokenizer.encode("75310", add_special_tokens=False).ids) == 5
    assert tokenizer.encode("\n\n", add_special_tokens=False).tokens == ["ĊĊ"]


def test_tokenizer_files_are_the_same_each_time(tmp_path, tokenizer):
    again = tokenizers.write(tmp_path)
    assert again.to_str(pretty=True) == tokenizer.to_str(pretty=True) == (tmp_path / "tokenizer.json").read_text()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"]["768"]["content"] == "<|image|>"
    assert set(json.loads((tmp_path / "special_tokens_map.json").read_text())) == {
        "bos_token",
        "eos_token",
        "pad_token",
    }
