"""VQA accuracy with its answer normalisation (Antol et al., 2015; Goyal et al., VQA v2, 2017; their vqaEval.py)."""

from __future__ import annotations

import re
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(n) for n, word in enumerate(WORDS)} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
# A word that lacks one apostrophe of these gets it back.
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
RESTORED = {
    word[:i] + word[i + 1 :]: word
    for word in CONTRACTIONS.split()
    for i, character in enumerate(word)
    if character == "'"
}


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """min(matches / 3, 1) against all other people's answers, the mean over leaving each person out.

    Prediction and answers are normalised alike. With one answer alone, it is whether they are the same.
    """
    prediction, *people = (normalise(text) for text in (prediction, *answers))
    if len(people) == 1:
        return float(prediction == people[0])
    matches = [answer == prediction for answer in people]
    return sum(min((sum(matches) - own) / 3, 1.0) for own in matches) / len(matches)


def normalise(text: str) -> str:
    """Lower case, no articles, digits for the words up to ten, punctuation taken out, apostrophes put back."""
    text = " ".join(text.split())
    out = text
    for mark in PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_blank or re.search(r"\d,\d", text) else " ")
    words = (NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", out).lower().split())
    return " ".join(RESTORED.get(word, word) for word in words if word not in ARTICLES)
