"""Scores of answers against their published definitions on worked examples, and against libraries that are kept up."""

from __future__ import annotations

import itertools

import pytest
from anls_star import anls_score
from lm_eval.tasks.chartqa.utils import RelaxedCorrectness

from mllama_jax.evaluate.metrics import (
    anls,
    choose,
    exact_match,
    levenshtein,
    number_match,
    relaxed_accuracy,
)
from mllama_jax.evaluate.vqa import normalise, vqa_accuracy


def test_exact_match_ignores_case_blanks_and_a_full_stop() -> None:
    assert exact_match(" Top Left. ", ["top left"]) == 1
    assert exact_match("top", ["top left"]) == 0
    assert exact_match("top", ["bottom", "top"]) == 1


RELAXED = [
    *(("95", "100", 1), ("94", "100", 0), ("105", "100", 1), ("0.1", "10%", 1), ("1", "0", 0), ("0", "0", 1)),
    *(("Pear", "pear", 1), ("pears", "pear", 0), ("five", "5", 0), ("-95", "-100", 1), ("10", "10%", 1)),
    *(("$1,020.", "1000", 1), ("12%", "0.12", 1), ("'Pear'", "pear", 1), ("pear.", "Pear", 1), ("2015", "2014", 1)),
    *(("3 apples", "3", 0), ("", "3", 0), ("10%", "10", 1), ("11%", "10", 0), ("top left", "Top Left", 1)),
]


@pytest.mark.parametrize(("prediction", "answer", "score"), RELAXED)
def test_relaxed_accuracy(prediction: str, answer: str, score: float) -> None:
    assert relaxed_accuracy(prediction, [answer]) == score


def test_relaxed_accuracy_is_lm_evals() -> None:
    """On every pairing of the examples' texts. lm-eval lets a text of one letter be met by a word that begins so."""
    texts = sorted({text for prediction, answer, _ in RELAXED for text in (prediction, answer)} - {""})
    theirs = RelaxedCorrectness()
    for prediction, answer in itertools.product(texts, texts):
        assert relaxed_accuracy(prediction, [answer]) == theirs.score(prediction, answer), (prediction, answer)


def test_anls() -> None:
    assert [levenshtein(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("same", "same"))] == [3, 3, 0]
    assert anls("helo", ["hello"]) == pytest.approx(0.8)
    assert anls("HELLO  world", ["hello world"]) == 1
    assert anls("abxy", ["abcd"]) == 0  # at the threshold of half the letters
    assert anls("exit", ["entry", "exits"]) == pytest.approx(0.8)
    assert anls("", [""]) == 1


def test_anls_is_anls_stars() -> None:
    texts = ["hello", "helo", "HELLO world", "hello world!", "42", "24 May", "24 may 1990", "exit", "entry", "exits"]
    for prediction, answer, other in itertools.product(texts, repeat=3):
        assert anls(prediction, [answer, other]) == pytest.approx(anls_score((answer, other), prediction))


@pytest.mark.parametrize(
    ("prediction", "people", "score"),
    [
        ("yes", ["yes"] * 10, 1),
        ("no", ["yes"] * 10, 0),
        ("yes", ["yes"] * 3 + ["no"] * 7, (3 * 2 / 3 + 7) / 10),  # of the three, each leaves two
        ("yes", ["yes"] * 2 + ["no"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("yes", ["yes"] + ["no"] * 9, 9 / 3 / 10),
        ("Two dogs.", ["2 dogs"] * 10, 1),
        ("the frisbee", ["frisbee"], 1),
    ],
)
def test_vqa_accuracy(prediction: str, people: list[str], score: float) -> None:
    assert vqa_accuracy(prediction, people) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The dog's ball", "dog's ball"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("Ten", "10"),
        ("none", "0"),
        ("1,000 people", "1000 people"),
        ("black/white", "black white"),
        ("black, white", "black white"),
        ("3.5 m.", "3.5 m"),
        ("t-shirt\n", "t shirt"),
    ],
)
def test_vqa_normalisation(text: str, plain: str) -> None:
    assert normalise(text) == plain


@pytest.mark.parametrize(
    ("text", "label"),
    [
        *(("B", "B"), ("(C)", "C"), ("The answer is D.", "D"), ("B. Paris", "B"), ("not A but (B), so B", "B")),
        *(("It must be A, no: C", "C"), ("I think it is rome", "C"), ("Bananas", None), ("", None), ("F", None)),
    ],
)
def test_choices(text: str, label: str | None) -> None:
    assert choose(text, "ABCD", ["London", "Paris", "Rome", "Bern"]) == label


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        *(("so x = 1.24", "1.2", 1), ("1.26", "1.2", 0), ("about 3 of 12", "12", 1), ("1,200", "1200", 1)),
        *(("-4", "4", 0), ("none", "4", 0), ("Yes.", "yes", 1), ("4.0", "4", 1)),
    ],
)
def test_numbers(prediction: str, answer: str, score: float) -> None:
    assert number_match(prediction, [answer]) == score
