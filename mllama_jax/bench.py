"""`mllama bench`: how fast a model runs on this machine, each figure beside the floor that the hardware sets.

Weights are random and made on the device, so no checkpoint is needed and any size that fits can be measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllama_jax.errors import InputError

if TYPE_CHECKING:
    import jax

    from mllama_jax.config import MllamaConfig
    from mllama_jax.model.mllama import Params
    from mllama_jax.sharding.mesh import Chip

DTYPES = ("bfloat16", "int8")
PROMPT = 128  # tokens behind the picture in the first-token figure


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measurement, in milliseconds.

    Attributes:
        name: what was measured; a decode figure is of one step, which makes a token for every row.
        median, low, high: of the repetitions, after a warm-up.
        floor: below what it cannot be by the chip's datasheet; None where the chip is not known.
        binds: which of "bandwidth" and "compute" sets the floor.
        peer: the same of `--versus`.
    """

    name: str
    dtype: str
    median: float
    low: float
    high: float
    floor: float | None
    binds: str | None
    peer: float | None = None


def add_parser(commands: Any) -> None:
    """Add `bench` to the subcommands of a parser."""
    parser = commands.add_parser("bench", help="time decode, first token, image encoding and prefill on random weights")
    parser.add_argument("model", nargs="?", default="11b-instruct", help="a preset, or a directory for its config")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="of the decoder's weights")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32], help="batch sizes of decode")
    parser.add_argument("--images", nargs="+", type=int, default=[1, 8], help="pictures encoded at once")
    parser.add_argument("--context", type=int, default=1024, help="positions of a row in decode")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of a long prompt")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--versus", choices=["transformers"], help="the peer, on the same device just before")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the figures over their floors")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from mllama_jax.generate.decode import STEPS
    from mllama_jax.planner import config_of

    for name in ("rows", "images"):
        if bad := [n for n in getattr(args, name) if n < 1]:
            raise InputError(f"--{name} must be at least 1, got {bad[0]}")
    for name, least in (("context", STEPS + 1), ("prompt", 1), ("repeat", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.plot is not None and args.plot.suffix != ".png":
        raise InputError(f"--plot must name a .png file, got {args.plot}")
    config = config_of(args.model)
    peers = peer_figures(args) if args.versus else {}  # first: JAX keeps the memory that it once had
    from mllama_jax.check import environment

    where, found = environment() | {"model": args.model, "versus": args.versus}, []
    if not args.json:
        print("\n".join(f"{name:<12} {value}" for name, value in where.items()) + "\n\n" + HEADER)
    for dtype in args.dtype:
        for figure in figures(config, dtype, args):
            peer = peers.get(figure.name) if dtype == "bfloat16" else None
            found.append(dataclasses.replace(figure, peer=peer))
            if not args.json:
                print(line(found[-1]), flush=True)
    if args.plot is not None:
        draw(f"{args.model} on {where['devices']}", found, args.plot)
    if args.json:
        print(json.dumps({**where, "figures": [dataclasses.asdict(each) for each in found]}))


HEADER = f"{'ms':<44}{'dtype':<10}{'median':>9}{'low':>9}{'high':>9}{'floor':>9}{'x floor':>8}{'peer':>9}{'ratio':>7}"


def line(figure: Figure) -> str:
    """A figure as a line under HEADER."""
    text = f"{figure.name:<44}{figure.dtype:<10}{figure.median:9.2f}{figure.low:9.2f}{figure.high:9.2f}"
    if figure.floor is not None:
        text += f"{figure.floor:9.2f}{figure.median / figure.floor:8.2f}"
    if figure.peer is not None:
        text += f"{figure.peer:{9 if figure.floor is not None else 26}.2f}{figure.peer / figure.median:7.1f}"
    return text


def figures(config: MllamaConfig, dtype: str, args: argparse.Namespace) -> Iterator[Figure]:
    """Every figure of a model whose decoder has weights of this dtype, as it is measured."""
    import jax.numpy as jnp

    from mllama_jax.generate.decode import STEPS
    from mllama_jax.model.mllama import MllamaModel

    bench = Bench(MllamaModel(config, jnp.dtype("bfloat16")), random_parameters(config, dtype), chip())

    def figure(name: str, run: Callable[[], Any], floor: Floor, each: int = 1) -> Figure:
        times = [1e3 * seconds / each for seconds in measure(run, args.repeat)]
        limit = (None, None) if bench.chip is None else floor.limit(bench.chip, dtype)
        return Figure(name, dtype, statistics.median(times), min(times), max(times), *limit)

    for rows in args.rows:
        yield figure(f"decode, {rows} rows with a picture", *bench.decode(rows, args.context, True), STEPS)
    yield figure("decode, 1 row of text", *bench.decode(1, args.context, False), STEPS)
    if config.vision is not None:
        for images in args.images:
            yield figure(f"encode, {images} pictures", *bench.encode(images))
        yield figure(f"first token, a picture and {PROMPT} tokens", *bench.first_token(PROMPT, True))
        yield figure(f"prefill, a picture and {args.prompt} tokens", *bench.first_token(args.prompt, True))
    yield figure(f"prefill, {args.prompt} tokens of text", *bench.first_token(args.prompt, False))


def measure(run: Callable[[], Any], repeat: int) -> list[float]:
    """Seconds of each of `repeat` runs, to the last result on the device, after two to compile and warm up."""
    import jax

    times = []
    for _ in range(repeat + 2):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return times[2:]


def chip() -> Chip | None:
    """What the datasheet says of this machine's device; None where it is not known."""
    import jax

    from mllama_jax.sharding.mesh import CHIPS

    return next((chip for chip in CHIPS.values() if jax.devices()[0].device_kind in chip.kinds), None)


# ---- Floors -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Floor:
    """What must be done at least: bytes read once, and operations of the decoder's weights and of the rest."""

    read: int
    weight_flops: float
    flops: float

    def limit(self, chip: Chip, dtype: str) -> tuple[float, str]:
        """Milliseconds, and which of bandwidth and compute asks for them. int8 products run at twice the rate."""
        rate = 2 if dtype == "int8" else 1
        seconds = {
            "bandwidth": self.read / chip.bandwidth,
            "compute": (self.weight_flops / rate + self.flops) / chip.flops,
        }
        binds = max(seconds, key=lambda name: seconds[name])
        return 1e3 * seconds[binds], binds


def nbytes(tree: Any) -> int:
    import jax

    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


# ---- What is measured ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bench:
    """A model with random parameters; every method gives a function to time and the floor of what it does."""

    model: Any
    params: Params
    chip: Chip | None

    def decode(self, rows: int, context: int, pictures: bool) -> tuple[Callable[[], Any], Floor]:
        """A dispatch of decode steps, of which the last fills the cache."""
        import jax
        import jax.numpy as jnp

        from mllama_jax.generate import decode
        from mllama_jax.model.cache import CrossCache

        text, vision = self.model.config.text, self.model.config.vision
        cache = jax.tree.map(normal, decode.new_cache(self.model, rows, context))
        cross = None
        if pictures and vision is not None:
            one = jax.eval_shape(lambda: self.model.empty_layer(rows, vision.max_tiles * vision.padded_tokens))
            layers = tuple(jax.tree.map(normal, one) for _ in text.cross_layers)
            spans = jnp.broadcast_to(jnp.array([0, 2**30], jnp.int32), (rows, vision.max_tiles, 2))
            cross = CrossCache(layers, spans, vision.tokens)
        weights = self._decode_weights(cross is not None)
        settings = self._settings(rows)
        position = jnp.full(rows, context - decode.STEPS, jnp.int32)
        token = jnp.arange(rows, dtype=jnp.int32)
        state: list[Any] = [decode.State(cache, token, position, token, jnp.zeros(rows, bool), None)]

        def dispatch() -> Any:
            start = state.pop().replace(
                position=position + 0, made=jnp.zeros(rows, jnp.int32), done=jnp.zeros(rows, bool)
            )
            after, block, _ = decode.decode(self.model, self.params, start, cross, settings, steps=decode.STEPS, top=0)
            state.append(after)
            return block

        keys = context * len(text.self_layers)
        if cross is not None:
            keys += cross.layers[0].length * len(text.cross_layers)
        size = sum(leaf.size for leaf in jax.tree.leaves(weights))
        read = nbytes(weights) + nbytes(cache) + nbytes(cross)
        return dispatch, Floor(read, 2 * rows * size, 4 * rows * text.heads * text.head_dim * keys)

    def encode(self, images: int) -> tuple[Callable[[], Any], Floor]:
        """The vision tower and the projector on pictures of all tiles."""
        import jax
        import jax.numpy as jnp

        from mllama_jax.generate import decode

        vision = self.model.config.vision
        pixels = jax.random.normal(jax.random.key(0), (images, vision.max_tiles, 3, vision.tile, vision.tile))
        ids = jnp.full(images, next(i for i, tiles in enumerate(_tiles()) if tiles == vision.max_tiles), jnp.int32)
        tower = {name: self.params[name] for name in ("vision", "projector")}
        positions = images * vision.max_tiles * vision.padded_tokens
        kernels = [x for path, x in jax.tree_util.tree_leaves_with_path(tower) if path[-1].key == "kernel"]
        attention = 4 * positions * vision.max_tiles * vision.padded_tokens * vision.width
        flops = 2 * positions * sum(x.size for x in kernels) + attention * (vision.layers + vision.global_layers)
        return lambda: decode.encode(self.model, self.params, pixels, ids), Floor(nbytes(tower), 0, flops)

    def first_token(self, tokens: int, picture: bool) -> tuple[Callable[[], Any], Floor]:
        """From pixels and token ids to the first new token, in the dispatches that `generate` makes."""
        import jax
        import jax.numpy as jnp

        from mllama_jax.generate import decode

        text, vision = self.model.config.text, self.model.config.vision
        ids = jax.random.randint(jax.random.key(1), (1, tokens), 0, text.vocab)
        settings, lengths = self._settings(1), jnp.full(1, tokens, jnp.int32)
        encode, floor = self.encode(1) if picture else (lambda: None, Floor(0, 0, 0))

        def run() -> Any:
            cross = None
            if picture:
                tiles = jnp.arange(vision.max_tiles, dtype=jnp.int32)[None]
                spans = jnp.broadcast_to(jnp.array([0, 2**30], jnp.int32), (1, vision.max_tiles, 2))
                cross = decode.keys_values(self.model, self.params, encode(), tiles, spans)
            cache = decode.new_cache(self.model, 1, tokens + decode.STEPS)
            return decode.prefill(self.model, self.params, ids, lengths, cache, cross, settings, top=0)[1]

        weights = self._decode_weights(picture)
        head = self.params["text"].get("head", {"kernel": self.params["text"]["embedding"]})["kernel"].size
        size = sum(leaf.size for leaf in jax.tree.leaves(weights)) - head
        inner = 4 * text.heads * text.head_dim
        weight_flops = 2 * tokens * size + 2 * head
        flops = inner * tokens * (tokens + 1) / 2 * len(text.self_layers)
        if picture:
            seen, kv = vision.max_tiles * vision.tokens, 2 * text.kv_heads * text.head_dim * text.width
            flops += inner * tokens * seen * len(text.cross_layers)
            weight_flops += 2 * seen * kv * len(text.cross_layers)
        read = nbytes(weights) + floor.read
        return run, Floor(read, weight_flops, flops + floor.flops)

    def _decode_weights(self, pictures: bool) -> Params:
        from mllama_jax.sharding.roofline import decode_weights

        return decode_weights(self.params, self.model.config.text, pictures=pictures)

    def _settings(self, rows: int) -> Any:
        from mllama_jax.generate.sampling import SamplingParams, Settings

        endless = SamplingParams(max_new_tokens=2**30, stop_ids=())
        return Settings.of([endless] * rows, [[]] * rows, (), self.model.config.text.vocab)


def _tiles() -> tuple[int, ...]:
    from mllama_jax.model.vision import TILES

    return TILES


def random_parameters(config: MllamaConfig, dtype: str) -> Params:
    """Random parameters in bfloat16, the decoder's kernels in `dtype`, made on the device one by one."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from mllama_jax.model.mllama import abstract_parameters

    tree = nn.unbox(abstract_parameters(config, jnp.dtype("bfloat16"), quantize="int8" if dtype == "int8" else None))
    return jax.tree.map(normal, tree)


def normal(like: Any) -> jax.Array:
    """Random numbers of such a shape and dtype, of about the size that weights of that width have."""
    import jax
    import jax.numpy as jnp

    shape, dtype = tuple(like.shape), jnp.dtype(like.dtype)

    def make(key: jax.Array) -> jax.Array:
        if dtype == jnp.int8:
            return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), jnp.int8)
        if dtype == jnp.float32:  # the scales of int8 kernels
            return jnp.full(shape, 2e-4, jnp.float32)
        return jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5

    return _jitted(make, shape, dtype)(jax.random.key(sum(shape), impl="unsafe_rbg"))


_made: dict[Any, Callable] = {}


def _jitted(make: Callable, *key: Any) -> Callable:
    import jax

    return _made.setdefault(key, jax.jit(make))


# ---- The peer, and the drawing ------------------------------------------------------------------------------------


def peer_figures(args: argparse.Namespace) -> dict[str, float]:
    """The figures of transformers, by name, measured in a process of its own so that its memory is free afterwards."""
    command = [sys.executable, "-m", "mllama_jax.bench_peer", "--context", args.context, "--prompt", args.prompt]
    command += ["--rows", *args.rows, "--images", *args.images]
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"--versus transformers: it ended with code {done.returncode}: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def draw(title: str, figures: list[Figure], path: Path) -> None:
    """Draw every figure as a bar, its floor as a line in it."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'mllama-jax[plan]'") from None
    canvas = Canvas(figsize=(9, 1 + 0.4 * len(figures)), layout="constrained")
    axes = canvas.subplots()
    names = [f"{figure.name}, {figure.dtype}" for figure in figures]
    axes.bar_label(
        axes.barh(names, [figure.median for figure in figures], color="tab:blue", label="measured"), fmt="%.2f"
    )
    for i, figure in enumerate(figures):
        if figure.floor is not None:
            axes.plot([figure.floor] * 2, [i - 0.4, i + 0.4], color="black", label="floor" if i == 0 else None)
        if figure.peer is not None:
            axes.plot(figure.peer, i, "o", color="tab:red", label="transformers" if i == 0 else None)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="ms", title=title)
    axes.legend()
    try:
        canvas.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}; choose another place") from None
