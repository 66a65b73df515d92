"""The published scores for answers to questions about pictures, each from 0 to 1 for one answer."""

from __future__ import annotations


def exact_match(prediction: str, answer: str) -> float:
    """1 where both are the same but for case, outer blanks and a final full stop."""
    return float(_plain(prediction) == _plain(answer))


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().lower()


def relaxed_accuracy(prediction: str, answer: str, tolerance: float = 0.05) -> float:
    """ChartQA's score: a number may be off by `tolerance` of the right one, anything else must match exactly.

    As Methani et al. (PlotQA, 2020) define it and Masry et al. (ChartQA, 2022) use it; percentages are read as numbers,
    case is ignored, and a right answer of zero must be met exactly.
    """
    guess, right = _number(prediction), _number(answer)
    if guess is not None and right:
        return float(abs(guess - right) <= tolerance * abs(right))
    return exact_match(prediction, answer)


def _number(text: str) -> float | None:
    text = _plain(text)
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


def anls(prediction: str, *answers: str, threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity (Biten et al., ST-VQA, 2019), the best over `answers`; its average is ANLS.

    1 - NL where NL, the edit distance over the longer length, lies below `threshold`, else 0. Case and the amount of
    white space do not count.
    """
    return max(_similarity(prediction, answer, threshold) for answer in answers)


def _similarity(prediction: str, answer: str, threshold: float) -> float:
    prediction, answer = (" ".join(text.lower().split()) for text in (prediction, answer))
    longest = max(len(prediction), len(answer))
    distance = levenshtein(prediction, answer) / longest if longest else 0.0
    return 1 - distance if distance < threshold else 0.0


def levenshtein(a: str, b: str) -> int:
    """The fewest insertions, deletions and substitutions of a character that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


# How each family of pictures is scored.
SCORES = {"scenes": exact_match, "pairs": exact_match, "charts": relaxed_accuracy, "text": anls}
