"""The published scores for answers to questions about pictures, each from 0 to 1 for one answer."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

from mllama_jax.evaluate.vqa import vqa_accuracy

TOLERANCE = 0.05  # of the right number, in relaxed accuracy
THRESHOLD = 0.5  # of the normalised distance, in ANLS


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where one of the answers is the same but for case, outer blanks and a final full stop."""
    return float(any(_plain(prediction) == _plain(answer) for answer in answers))


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().lower()


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """ChartQA's score: a number may be off by 5% of the right one, anything else must match exactly.

    Methani et al. (PlotQA, 2020), Masry et al. (ChartQA, 2022, section 5.1). As the evaluations of Mistral and
    lm-eval's chartqa read answers: case, thousands separators, dollar signs and final punctuation do not count, and a
    percentage is met as the number before its sign or as a fraction. A right answer of zero must be met exactly.
    """
    return max(float(_relaxed(_bare(prediction), _bare(answer))) for answer in answers)


def _relaxed(prediction: str, answer: str) -> bool:
    guesses, rights = _numbers(prediction), _numbers(answer)
    if not guesses or not rights:
        return prediction.rstrip(string.punctuation).lower() == answer.lower()
    # As written, and where one of the two is a percentage also as a fraction of one side.
    pairs = {(guesses[0], rights[0]), (guesses[-1], rights[0]), (guesses[0], rights[-1])}
    return any(abs(guess - right) <= TOLERANCE * abs(right) for guess, right in pairs)


def _bare(text: str) -> str:
    text = text.strip()
    if any(character.isdigit() for character in text):
        return text.rstrip(string.punctuation.replace("%", "") + string.whitespace).replace(",", "").replace("$", "")
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _numbers(text: str) -> list[float]:
    """The number that a text is, followed by its hundredth where a per cent sign stands behind it."""
    try:
        number = float(text.strip().rstrip("%"))
    except ValueError:
        return []
    return [number, number / 100] if text.strip().endswith("%") else [number]


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Normalised Levenshtein similarity (Biten et al., ST-VQA, 2019), the best over `answers`; its average is ANLS.

    1 - NL where NL, the edit distance over the longer length, lies below one half, else 0. Case and the amount of white
    space do not count.
    """
    return max(_similarity(prediction, answer) for answer in answers)


def _similarity(prediction: str, answer: str) -> float:
    prediction, answer = (" ".join(text.lower().split()) for text in (prediction, answer))
    longest = max(len(prediction), len(answer))
    distance = levenshtein(prediction, answer) / longest if longest else 0.0
    return 1 - distance if distance < THRESHOLD else 0.0


def levenshtein(a: str, b: str) -> int:
    """The fewest insertions, deletions and substitutions of a character that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def number_match(prediction: str, answers: Sequence[str]) -> float:
    """MathVista's score for free answers (Lu et al., 2024): the same number, or the same text.

    A right answer of d decimals is met by the last number of the prediction when it rounds to it.
    """
    return max(float(_same_number(prediction, answer)) for answer in answers)


def _same_number(prediction: str, answer: str) -> bool:
    right = answer.strip().replace(",", "")
    if not re.fullmatch(r"-?\d*\.?\d+", right):
        return bool(exact_match(prediction, [answer]))
    found = re.findall(r"-?(?:\d[\d,]*\.?\d*|\.\d+)", prediction)
    if not found:
        return False
    decimals = len(right.partition(".")[2])
    return round(float(found[-1].replace(",", "")), decimals) == round(float(right), decimals)


def choose(prediction: str, labels: Sequence[str], options: Sequence[str]) -> str | None:
    """The label that an answer to a multiple-choice question names; None where it names none.

    In the order of MMMU's parser (Yue et al., 2024): a label in brackets, a label by itself, the text of an option,
    the last of each. That parser guesses at random where nothing is found, which here counts as wrong.
    """
    any_label = "|".join(map(re.escape, labels))
    for form in (rf"\(({any_label})\)", rf"(?<![\w'])({any_label})(?![\w'])"):
        if found := re.findall(form, prediction):
            return found[-1]
    places = [
        (prediction.lower().rfind(option.lower()), label)
        for label, option in zip(labels, options, strict=True)
        if option
    ]
    place, label = max(places, default=(-1, ""))
    return label if place >= 0 else None


# What a recipe may name. Rows that have options are scored by their choice, whatever the metric.
METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "relaxed_accuracy": relaxed_accuracy,
    "anls": anls,
    "vqa_accuracy": vqa_accuracy,
    "number_match": number_match,
}
