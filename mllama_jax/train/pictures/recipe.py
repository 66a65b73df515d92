"""How the checkpoint that ships is made: by three runs of `mllama train`, one after the other.

`python -m mllama_jax.train.pictures.recipe FOLDER` lays out what they need.

A small Llama 3.2 Vision with everything the large ones have (several tiles, gated global layers, tapped features and
cross-attention layers), trained from nothing on pictures drawn as it goes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mllama_jax.config import MllamaConfig, TextConfig, VisionConfig
from mllama_jax.convert.export import write_hf
from mllama_jax.errors import InputError
from mllama_jax.model.mllama import Params, init_parameters
from mllama_jax.train.pictures import tokenizer
from mllama_jax.train.pictures.example import Example, conversation
from mllama_jax.train.pictures.stream import FAMILIES, held_out
from mllama_jax.train.step import tie_tiles

STAGES = ("first", "second", "third")
CONFIG = MllamaConfig(
    text=TextConfig(
        vocab=tokenizer.VOCAB,
        width=128,
        layers=9,
        cross_layers=(1, 4, 7),
        heads=4,
        kv_heads=2,
        head_dim=32,
        hidden=352,
        context=2048,
    ),
    vision=VisionConfig(tile=112, width=128, layers=6, global_layers=2, heads=4, hidden=512, taps=(1, 3)),
    bos=tokenizer.MERGED,
    pad=tokenizer.MERGED + 4,
    stops=tuple(tokenizer.MERGED + i for i in (1, 8, 9)),
)
GATE = 0.7  # what gates start from: zero, as when an adapter joins a finished decoder, would keep the pictures out
BRANCH = 0.3  # what the branches' last maps start from, beside a residual stream of size 1
POSITION = 0.5  # the size of position embeddings at the start, beside patches of size 1


def start(key: jax.Array, config: MllamaConfig = CONFIG) -> Params:
    """Random parameters with open gates, plain positions, quiet branches, and tables that Meta's layout can hold."""

    def adjust(path: tuple, leaf: jax.Array) -> jax.Array:
        if path[-1].key.endswith("gate"):
            return jnp.full_like(leaf, GATE)
        if path[-1].key in ("position", "tiles", "table"):
            return leaf * (POSITION / leaf.std())
        if path[-1].key == "embedding":
            return leaf / leaf.std()
        if path[-2].key in ("out", "down") and path[-1].key == "kernel":
            return leaf * BRANCH
        return leaf

    return tie_tiles(jax.tree_util.tree_map_with_path(adjust, init_parameters(config, key)), average=True)


def lay_out(folder: Path, held: int = 64) -> None:
    """Write random weights (`start`), the recipes of the three stages, and held-out chats, `held` of each family."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: expected a new or empty directory; choose another")
    params = jax.device_get(jax.jit(start)(jax.random.key(0)))
    write_hf(folder / "start", params, CONFIG, np.dtype(jnp.bfloat16))
    tokenizer.write(folder / "start")
    template = resources.files("mllama_jax.processing").joinpath("chat_template.jinja")
    (folder / "start/chat_template.jinja").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    for stage in STAGES:
        shutil.copy(Path(__file__).with_name(f"{stage}.toml"), folder)
    (folder / "pictures").mkdir()
    chats = {
        family: [_chat(folder, example, i) for i, example in enumerate(held_out(family, held))] for family in FAMILIES
    }
    (folder / "scenes.jsonl").write_text("".join(chats["scenes"]))
    (folder / "held_out.jsonl").write_text("".join(itertools.chain(*chats.values())))


def _chat(folder: Path, example: Example, i: int) -> str:
    """A line of chats, its pictures saved beside it."""
    names = [f"pictures/{example.family}-{i}-{place}.png" for place in range(len(example.images))]
    for image, name in zip(example.images, names, strict=True):
        image.save(folder / name)
    messages = conversation(example)
    parts = [part for part in messages[0]["content"] if part["type"] == "image"]
    for part, name in zip(parts, names, strict=True):
        part["image"] = name
    return json.dumps({"messages": messages}) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    try:
        lay_out(parser.parse_args().folder)
    except InputError as error:
        sys.exit(f"recipe: {error}")


if __name__ == "__main__":
    main()
