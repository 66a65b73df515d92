"""Pictures, texts and conversations on which processing is compared with Meta's and transformers' code.

`tests/oracle/make_processing_goldens.py` writes into `tests/data/processing`

    pictures.json    for each of `PICTURES` the aspect ratio id and a digest of the pixels, by transformers
    tokenizer.model  a small vocabulary in Meta's format
    ids.json         the ids of each of `TEXTS` in that vocabulary, by tiktoken
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DATA = Path(__file__).parent / "data" / "processing"
TILE = 56
MODES = ("L", "P", "CMYK", "1", "I;16", "I", "RGBA", "LA", "PA", "HSV", "YCbCr")


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """The same speckled picture everywhere: each byte is a hash of its position."""
    if mode in ("I;16", "I"):
        values = (np.arange(width * height, dtype=np.uint32) * np.uint32(2654435761) >> 23).reshape(height, width)
        return Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.int32))
    values = (np.arange(width * height * 4, dtype=np.uint32) * np.uint32(2654435761) >> 24).astype(np.uint8)
    picture = Image.fromarray(values.reshape(height, width, 4))
    return picture if mode == "RGBA" else picture.convert("LA").convert(mode) if "A" in mode else _opaque(picture, mode)


def _opaque(picture: Image.Image, mode: str) -> Image.Image:
    return picture.convert("RGB").convert(mode)


def _pictures() -> list[tuple[int, int, str]]:
    draw = random.Random(11)
    sizes = [(draw.randint(1, 6 * TILE), draw.randint(1, 6 * TILE)) for _ in range(300)]
    multiples = [(columns * TILE, rows * TILE) for columns in range(1, 6) for rows in range(1, 6)]
    grids = ((1, 1), (2, 2), (4, 1))
    near = [(columns * TILE + x, rows * TILE + y) for columns, rows in grids for x in (-1, 1) for y in (-1, 1)]
    extremes = [(1, 1), (1, 5000), (5000, 1), (2, 471), (470, 1), (TILE, 4 * TILE + 1), (3000, 2000)]
    ties = [(side, ratio * side) for side in (20, 60, 90) for ratio in (1, 2, 3, 4)]
    ties += [(height, width) for width, height in ties]
    modes = [(width, height, mode) for mode in MODES for width, height in ((30, 40), (131, 77), (250, 60))]
    return [(*size, "RGB") for size in sizes + multiples + near + extremes + ties] + modes


PICTURES = _pictures()


def digest(pixels: np.ndarray) -> str:
    """Of the bits of float32 pixels, so that -0.0 is not 0.0."""
    return hashlib.sha256(np.ascontiguousarray(pixels, "<f4").tobytes()).hexdigest()[:16]


def _fuzz(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    alphabets = [
        [*" \t\n\r\u00a0\u3000a1."],
        [*"'sStTrReEvVmMlLdDſ’K "],
        ["<|image|>", "<|eot_id|>", "<|begin_of_text|>", "<|", "|>", "eot_id", "\r\n", " "],
        [chr(code) for code in (*range(32, 0x250), *range(0x5D0, 0x700), *range(0x900, 0xE80, 3))],
        [chr(code) for code in (*range(0x3041, 0x3100), *range(0x4E00, 0x9F00, 97), *range(0x1F300, 0x1FAFF, 5))],
        ["\u200d", "\ufe0f", "\u0301", "␛", "␟", "\U0010fffd", "👩", "🏽", "e", "\x00", "\x7f"],
    ]
    return ["".join(draw.choices(draw.choice(alphabets), k=draw.randint(1, 60))) for _ in range(count)]


TEXTS = [
    "",
    " ",
    "The quick brown fox jumps over the lazy dog.",
    "I'll say IT'S what they'd've DON'T; we're 'Tis.",
    "Die Größe der Straße beträgt 12345678,90 €.",
    "Съешь же ещё этих мягких французских булок",
    "いろはにほへと ちりぬるを 我が世誰ぞ 常ならむ",
    "سلام دنیا، حالت چطور است؟",
    "नमस्ते दुनिया १२३४५",
    "👩‍👩‍👧‍👦 🇩🇪🏳️‍🌈 e\u0301\u0302",
    "line\r\nline\n\n\nline\r\r\n \n\t end  ",
    "def f(x):\n    if x:\n        return {'a': [1, 22, 333, 4444]}\n\n\n# ---- 1_000 ----\n",
    " " * 200 + "x" + "\n" * 150 + "\t" * 99,
    "3.14159265358979323846264338327950288",
    "a<|image|>b<|eot_id|><|reserved_special_token_2|><|no_such_token|>",
    "x" * 3000,
    *_fuzz(200, seed=3),
]


def conversations() -> list[list[dict[str, Any]]]:
    """Conversations of every kind that Meta's format can say, some of them with names of special tokens in the text."""
    picture, other = noise(40, 30), noise(9, 70)
    image, second = {"type": "image", "image": picture}, {"type": "image", "image": other}
    found: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": [image, _text("What is this?")]}],
        [{"role": "user", "content": [_text("Compare"), image, _text("with"), second]}],
        [{"role": "user", "content": [image, second, _text("Both?")]}],
        [{"role": "user", "content": [_text("one"), _text("two")]}, {"role": "assistant", "content": "three"}],
        [{"role": "user", "content": [image]}, *_turns("A cat.", "Which?"), {"role": "user", "content": [second]}],
        [{"role": "system", "content": "Be brief."}, *_turns("Hi", "Hello")],
        [*_turns("call it", "{}")[::-1], {"role": "ipython", "content": '{"answer": 42}'}],
        [{"role": "user", "content": "run"}, {"role": "tool", "content": "done"}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": [image, _text("<|image|> and"), _text("<|eot_id|>")]}],
    ]
    return found + [[{"role": "user", "content": text}] for text in TEXTS[:80]]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _turns(answer: str, question: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
