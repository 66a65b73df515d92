"""What a step of LoRA costs on this machine, random weights; `--versus peft` does the same with transformers and PEFT.

    python -m mllama_jax.train.measure 11b-instruct --versus peft

Every row has a picture of all tiles; rank 16 on every map of the decoder, layers done again in the backward pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

from mllama_jax import bench
from mllama_jax.config import PRESETS
from mllama_jax.errors import InputError

if TYPE_CHECKING:
    from mllama_jax.config import MllamaConfig
    from mllama_jax.train.batch import Batch
    from mllama_jax.train.recipe import Recipe

STEPS = 5  # timed, after one to warm up


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a step.

    Attributes:
        seconds: the median.
        tokens_per_second: of text.
        flops: of the chip's datasheet rate, counted without what is done again; None where it is not known.
        peak: bytes, the most that the device had in use; None where it does not tell.
        compiling: seconds.
    """

    seconds: float
    tokens_per_second: float
    flops: float | None
    peak: int | None
    compiling: float | None = None


def main() -> None:
    from mllama_jax.model.layers import REMAT
    from mllama_jax.planner import config_of
    from mllama_jax.train.recipe import Recipe

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="11b-instruct", help="a preset, or a directory for its config")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--remat", choices=REMAT, default="layer", help="as in a recipe")
    parser.add_argument("--versus", choices=["peft"], help="the peer, on the same device just before")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    config = config_of(args.model)
    if config.vision is None:
        raise InputError(f"{args.model}: expected a model that sees, got one of text only; choose another")
    if args.versus and config != PRESETS["11b-instruct"]:
        raise InputError(f"--versus peft: expected the shapes of 11b-instruct, got {args.model}; leave it out")
    lora = Recipe(model="", data="", part="lora", steps=1000, samples=args.rows, length=args.length, remat=args.remat)
    found: dict[str, Cost] = {}
    if args.versus:  # first: JAX keeps the memory that it once had
        theirs = bench.ask_peer("lora", "--rows", args.rows, "--prompt", args.length)
        rate = args.rows * args.length / theirs["seconds"]
        share = share_of_chip(config, lora, theirs["seconds"])
        found["transformers and PEFT"] = Cost(theirs["seconds"], rate, share, int(theirs["peak"]))
    found[f"ours, remat {args.remat}"] = cost(config, lora)
    if args.json:
        from mllama_jax.check import environment

        told = {name: dataclasses.asdict(each) for name, each in found.items()}
        print(json.dumps({**environment(), "model": args.model, "rows": args.rows, "length": args.length, **told}))
        return
    for name, each in found.items():
        share = "" if each.flops is None else f", {each.flops:.1%} of the datasheet's rate"
        peak = "" if each.peak is None else f", {each.peak / 2**30:.1f} GiB at most"
        compiling = "" if each.compiling is None else f", compiled in {each.compiling:.0f} s"
        print(f"{name}: {each.seconds:.3f} s a step, {each.tokens_per_second:.0f} tokens/s{share}{peak}{compiling}")


def cost(config: MllamaConfig, recipe: Recipe) -> Cost:
    """Make random weights and a batch, compile a step, and time it."""
    import jax
    import jax.numpy as jnp

    from mllama_jax.bench_model import Bench
    from mllama_jax.model.layers import REMAT
    from mllama_jax.train.objective import Frozen, optimizer_of, part_loss
    from mllama_jax.train.parts import init_lora
    from mllama_jax.train.step import TrainState, train_step

    held = Bench.of(config, recipe.dtype)
    model = dataclasses.replace(held.model, remat=REMAT[recipe.remat])
    frozen, optimizer = Frozen(held.params), optimizer_of(recipe)
    batch = jax.device_put(random_batch(config, recipe))
    state = TrainState.of(jax.jit(functools.partial(init_lora, config, recipe.lora))(jax.random.key(0)), optimizer)
    start = time.perf_counter()
    lowered: Any = train_step(functools.partial(part_loss, recipe, model), optimizer)
    step = lowered.lower(state, frozen, batch).compile()
    compiling, times = time.perf_counter() - start, []
    for _ in range(1 + STEPS):
        start = time.perf_counter()
        state, report = step(state, frozen, batch)
        if not jnp.isfinite(report.loss):
            raise InputError(f"the loss is {float(report.loss)}; figures would mean nothing, try `mllama check`")
        times.append(time.perf_counter() - start)
    seconds, memory = statistics.median(times[1:]), jax.local_devices()[0].memory_stats() or {}
    share = share_of_chip(config, recipe, seconds)
    rate = recipe.samples * recipe.length / seconds
    return Cost(seconds, rate, share, memory.get("peak_bytes_in_use"), compiling)


def random_batch(config: MllamaConfig, recipe: Recipe) -> Batch:
    """Rows of random tokens, all of them labels, with a picture of all tiles each; stacked as a step's one batch."""
    import numpy as np

    from mllama_jax.model.vision import TILES
    from mllama_jax.train.batch import Batch, stacked

    draw, vision = np.random.default_rng(0), config.vision
    assert vision is not None
    shape, tiles = (recipe.samples, recipe.length), (recipe.samples, vision.max_tiles)
    tokens, labels = (draw.integers(0, config.text.vocab, shape).astype(np.int32) for _ in range(2))
    pixels = draw.integers(0, 256, (*tiles, 3, vision.tile, vision.tile), np.uint8)
    whole = np.full(recipe.samples, next(i for i, n in enumerate(TILES) if n == vision.max_tiles), np.int32)
    spans = np.broadcast_to(np.array([0, 2**30], np.int32), (*tiles, 2))
    return stacked([Batch(tokens, labels, pixels, whole, spans)])


def share_of_chip(config: MllamaConfig, recipe: Recipe, seconds: float) -> float | None:
    """Operations a second of such steps, beside what the datasheet promises."""
    from mllama_jax.train.flops import step_flops

    known = bench.chip()
    return known and step_flops(config, recipe, random_batch(config, recipe)) / seconds / known.flops


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"measure: {error}")
