"""Chats with pictures, and recipes beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Line = dict[str, Any]


def line(i: int, answer: str | None = None, words: int = 3) -> Line:
    """A chat about a picture; every third one is about none."""
    parts: list[Line] = [{"type": "text", "text": f"What is in picture {i}?"}]
    said = answer or " ".join(f"word{(i * 7 + n) % 10}" for n in range(words))
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": said}]
    if i % 3 == 2:
        return {"messages": messages}
    parts.insert(0, {"type": "image"})
    return {"messages": messages, "images": [f"{i % 4}.png"]}


def write(directory: Path, lines: list[Any], model: Path, name: str = "chats.jsonl", **settings: Any) -> Path:
    """A recipe beside its chats and their pictures."""
    directory.mkdir(exist_ok=True)
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (40 + 30 * i, 60, 3), np.uint8)
        Image.fromarray(pixels).save(directory / f"{i}.png")
    (directory / name).write_text("".join(each if isinstance(each, str) else json.dumps(each) + "\n" for each in lines))
    lora = settings.pop("lora", {"rank": 2, "alpha": 4.0} if settings.get("part", "lora") == "lora" else {})
    settings = {
        "model": str(model), "data": name, "part": "lora", "steps": 8, "samples": 3, "length": 128, "save_every": 3,
        "learning_rate": 3e-3, "dtype": "float32",
    } | settings  # fmt: skip
    table = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    table += ["[lora]", *(f"{key} = {json.dumps(value)}" for key, value in lora.items())] if lora else []
    (directory / "recipe.toml").write_text("\n".join(table) + "\n")
    return directory / "recipe.toml"
