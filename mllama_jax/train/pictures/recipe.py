"""How the checkpoint that ships is made, in the three stages that README lists.

A small Llama 3.2 Vision with everything the large ones have (several tiles, gated global layers, tapped features and
cross-attention layers), trained from nothing on pictures drawn as it goes.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from mllama_jax.config import MllamaConfig, TextConfig, VisionConfig
from mllama_jax.convert.export import write_hf
from mllama_jax.loading import load
from mllama_jax.model.mllama import MllamaModel, Params, init_parameters
from mllama_jax.train.batch import IGNORED, Batch, stacked
from mllama_jax.train.loss import cross_entropy, encode, log_likelihoods
from mllama_jax.train.pictures import tokenizer
from mllama_jax.train.pictures.batches import PictureBatch, batches
from mllama_jax.train.pictures.labels import CLASSES
from mllama_jax.train.pictures.stream import FAMILIES
from mllama_jax.train.step import TrainState, tie_tiles, train_step

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
WARM_UP = 0.02  # of the time
AHEAD = 8  # steps that may wait for the device
GATE = 0.7  # what gates start from: zero, as when an adapter joins a finished decoder, would keep the pictures out
PATCHES = 0.5  # how much the patches' labels weigh beside the answers
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


def loss(model: MllamaModel, params: Params, _: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The answers' cross-entropy and, to teach the encoder where to look, that of what lies at each patch.

    `params` holds the model's and, under "patches", a linear reading of all that `labels` knows off the features, which
    is left behind after training.
    """
    assert isinstance(batch, PictureBatch)
    features = encode(model, params["model"], batch)
    logits = features[:, :, 1:].astype(jnp.float32) @ params["patches"]
    read = jnp.split(logits, np.cumsum([*CLASSES.values()])[:-1], axis=-1)
    seen = sum(cross_entropy(logits, batch.patches[..., i]) for i, logits in enumerate(read))
    tiles = features.reshape(-1, *features.shape[2:])[batch.tiles]
    answers = -log_likelihoods(model, params["model"], batch, tiles).sum() / jnp.maximum(
        1, (batch.labels != IGNORED).sum()
    )
    return answers + PATCHES * seen, jnp.ones(())


def train(
    out: Path, begin: Path | None, rows: Mapping[str, int], minutes: float, peak: float, seed: int, workers: int
) -> None:
    """Train on so many rows of each family a step, for so many minutes, and leave a checkpoint in `out`.

    Training begins with nothing or with the checkpoint `begin`; the reading of patches and Adam's moments begin anew.

    The learning rate follows the clock, a short way up and then a cosine down to nothing: however fast the machine is,
    the training is finished when its time is.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.write(out)
    template = resources.files("mllama_jax.processing").joinpath("chat_template.jinja")
    (out / "chat_template.jinja").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    adam = optax.inject_hyperparams(optax.adamw)(learning_rate=0.0, b2=0.98, weight_decay=0.02)
    tie = optax.stateless(lambda gradients, _: tie_tiles(gradients))  # pyright: ignore[reportArgumentType]
    optimizer = optax.chain(tie, optax.clip_by_global_norm(1.0), adam)
    params = {
        "model": load(begin, dtype="float32").params if begin else jax.jit(start)(jax.random.key(seed)),
        "patches": jnp.zeros((CONFIG.text.width, sum(CLASSES.values()))),
    }
    state: Any = TrainState.of(params, optimizer)
    step = train_step(functools.partial(loss, MllamaModel(CONFIG, jnp.dtype("bfloat16"))), optimizer)
    losses: list[jax.Array] = []
    started = elapsed = 0.0  # the first step compiles: the clock starts behind it
    for batch in (progress := tqdm(batches(seed, rows, CONFIG, out, workers), mininterval=10)):
        state.optimizer[-1].hyperparams["learning_rate"] = jnp.float32(peak * rate(elapsed / (60 * minutes)))
        state, report = step(state, {}, stacked([batch]))
        losses.append(report.loss)
        losses[-min(len(losses), AHEAD)].block_until_ready()
        started = started or time.monotonic()
        elapsed = time.monotonic() - started
        if len(losses) % 500 == 0:
            progress.write(f"step {len(losses)}: loss {np.mean(np.array(losses[-500:])):.4f}")
        if elapsed > 60 * minutes:
            break
    write_hf(out, state.params["model"], CONFIG, np.dtype(jnp.bfloat16))
    print(f"{len(losses)} steps in {elapsed:.0f} s")


def rate(done: float) -> float:
    """The learning rate, as part of its peak, when so much of the time is over (0 to 1)."""
    return min(done / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))


def _share(text: str) -> tuple[str, int]:
    family, _, count = text.partition("=")
    if family not in FAMILIES or not count.isdigit():
        raise argparse.ArgumentTypeError(f"expected FAMILY=N with a family of {', '.join(FAMILIES)}, got {text!r}")
    return family, int(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--begin", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--rows", type=_share, nargs="+", required=True, metavar="FAMILY=N", help="what a batch holds")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to train, behind the first step")
    parser.add_argument("--peak", type=float, default=2e-3, help="the highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=16, help="processes that draw pictures")
    args = parser.parse_args()
    train(args.out, args.begin, dict(args.rows), args.minutes, args.peak, args.seed, args.workers)


if __name__ == "__main__":
    main()
