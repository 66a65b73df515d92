"""What `mllama bench` times: a model of random weights, on one device or spread over several."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mllama_jax.config import QUANTIZATIONS, MllamaConfig, VisionConfig
from mllama_jax.generate import decode
from mllama_jax.generate.answer import Answer
from mllama_jax.generate.decoding import blocks
from mllama_jax.generate.sampling import SamplingParams, Settings
from mllama_jax.model.cache import CrossCache, KVCache
from mllama_jax.model.mllama import MllamaModel, Params, abstract_parameters
from mllama_jax.model.quantize import GROUP, count, lay_out
from mllama_jax.model.vision import TILES
from mllama_jax.sharding.fit_table import shallow
from mllama_jax.sharding.mesh import Chip, make_mesh
from mllama_jax.sharding.resolve import device_bytes, resolve
from mllama_jax.sharding.roofline import decode_weights
from mllama_jax.sharding.rules import Rules, mesh_axes, preset_rules

DISPATCHES = 4  # of decode steps, one right behind the other as in an answer

# ---- Floors -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Floor:
    """What a device must do at least: bytes read once, and operations of the decoder's weights and of the rest."""

    read: int
    weight_flops: float
    flops: float

    def limit(self, chip: Chip, dtype: str) -> tuple[float, str]:
        """Milliseconds, and which of bandwidth and compute asks for them. int8 products run at twice the rate."""
        rate = 2 if dtype.startswith("int8") else 1
        seconds = {
            "bandwidth": self.read / chip.bandwidth,
            "compute": (self.weight_flops / rate + self.flops) / chip.flops,
        }
        binds = max(seconds, key=lambda name: seconds[name])
        return 1e3 * seconds[binds], binds


# ---- What is measured ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function of a model, its parameters and more, compiled beside others."""

    params: Params
    compiled: Future[tuple[jax.stages.Compiled, float]]

    def __call__(self, *args: Any, **more: Any) -> Any:
        return self.compiled.result()[0](self.params, *args, **more)

    @property
    def seconds(self) -> float:
        """What lowering and compiling it took."""
        return self.compiled.result()[1]

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes of a device: of its arguments, and of what it needs beside."""
        memory: Any = self.compiled.result()[0].memory_analysis()
        beside = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return memory.argument_size_in_bytes, beside


@dataclasses.dataclass(frozen=True)
class Job:
    """A function to time.

    Attributes:
        phases: the floors of what it does one after the other, each with how often it does that.
        programs: that it calls.
        times: how often it does all this.
    """

    run: Callable[[], Any]
    phases: tuple[tuple[int, Floor], ...]
    programs: tuple[Program, ...]
    times: int = 1

    def limit(self, chip: Chip, dtype: str) -> tuple[float, str]:
        """Milliseconds of all phases, and what limits the longest."""
        limits = [(times * each.limit(chip, dtype)[0], each.limit(chip, dtype)[1]) for times, each in self.phases]
        return sum(milliseconds for milliseconds, _ in limits), max(limits)[1]

    @property
    def read(self) -> int:
        """Bytes."""
        return sum(times * each.read for times, each in self.phases)

    @property
    def operations(self) -> float:
        return sum(times * (each.weight_flops + each.flops) for times, each in self.phases)


@dataclasses.dataclass(frozen=True)
class Bench:
    """A model with random parameters; every method gives a job, whose programs a thread compiles meanwhile.

    Attributes:
        one_graph: whether decode runs as one graph on a GPU, as `generate` has it; a profile sees nothing in that.
    """

    model: MllamaModel
    params: Params
    one_graph: bool = True
    compilers: ThreadPoolExecutor = dataclasses.field(default_factory=lambda: ThreadPoolExecutor(8))

    @classmethod
    def of(cls, config: MllamaConfig, dtype: str, devices: int = 1, cache: str | None = None) -> Bench:
        """Random weights, the decoder's kernels in `dtype`, by the preset `serve` where devices are several."""
        model, tree = abstract(config, dtype, devices, cache)
        params = jax.tree_util.tree_map_with_path(_parameter, tree)
        return cls(model, lay_out(params, model.constrain.platform))

    @property
    def devices(self) -> int:
        return self.model.constrain.mesh.size if isinstance(self.model.constrain, Rules) else 1

    @property
    def _vision(self) -> VisionConfig:
        assert self.model.config.vision is not None
        return self.model.config.vision

    def decode(self, rows: int, context: int, pictures: bool) -> Job:
        """Dispatches of decode steps, of which the last fills the cache; each begins where the first did."""
        text, vision = self.model.config.text, self.model.config.vision if pictures else None
        position = jnp.full(rows, context - decode.STEPS, jnp.int32)
        token = jnp.arange(rows, dtype=jnp.int32)
        settings = self._settings(rows)

        def start(cache: Any) -> decode.State:
            return decode.State(cache, token + 0, position + 0, jnp.zeros_like(token), jnp.zeros(rows, bool), None)

        def fill() -> tuple[tuple[KVCache, ...], CrossCache | None]:
            cache = jax.tree.map(normal, decode.new_cache(self.model, rows, context))
            if vision is None:
                return cache, None
            positions = vision.max_tiles * vision.padded_tokens
            one = jax.eval_shape(lambda: self.model.empty_layer(rows, positions))
            one = one.placed(self._place, "image_seq")
            layers = tuple(jax.tree.map(normal, one) for _ in text.cross_layers)
            spans = jnp.broadcast_to(jnp.array([0, 2**30], jnp.int32), (rows, vision.max_tiles, 2))
            return cache, CrossCache(layers, spans, vision.tokens)

        weights, full = self._decode_weights(vision is not None), fill()
        read = device_bytes((weights, full))
        cache, cross = full = jax.tree.map(_like, full)  # the memory is needed while this is timed, not before
        run_steps = decode.decoder(self.model.constrain.platform, at_once=self.one_graph)
        among = decode.peers_of(self.model, rows)
        program = self._program(run_steps, start(cache), cross, settings, among, steps=decode.STEPS, top=0)
        filled: list[Any] = []

        def run() -> Any:
            (cache, cross), tokens = filled.pop() if filled else fill(), []
            for _ in range(DISPATCHES):
                after, _, _ = program(start(cache), cross, settings, among, steps=decode.STEPS)
                cache = after.cache
                tokens.append(after.token)
            filled.append((cache, cross))
            return tokens

        keys = context * len(text.self_layers)
        if cross is not None:
            keys += cross.layers[0].length * len(text.cross_layers)
        numbers = sum(map(count, jax.tree.leaves(weights)))
        flops = 4 * rows * text.heads * text.head_dim * keys
        floor = Floor(read, 2 * rows * numbers / self.devices, flops / self.devices)
        return Job(run, ((1, floor),), (program,), DISPATCHES * decode.STEPS)

    def encode(self, images: int) -> Job:
        """The vision tower and the projector on pictures of all tiles."""
        vision = self._vision
        pixels = jax.random.normal(jax.random.key(0), (images, vision.max_tiles, 3, vision.tile, vision.tile))
        ids = jnp.full(images, next(i for i, tiles in enumerate(TILES) if tiles == vision.max_tiles), jnp.int32)
        tower = {name: self.params[name] for name in ("vision", "projector")}
        positions = images * vision.max_tiles * vision.padded_tokens
        kernels = [x for path, x in jax.tree_util.tree_leaves_with_path(tower) if path[-1].key == "kernel"]
        attention = 4 * positions * vision.max_tiles * vision.padded_tokens * vision.width
        flops = 2 * positions * sum(x.size for x in kernels) + attention * (vision.layers + vision.global_layers)
        program = self._program(decode.encode, pixels, ids)
        floor = Floor(device_bytes(tower), 0, flops / self.devices)
        return Job(lambda: program(pixels, ids), ((1, floor),), (program,))

    def first_token(self, tokens: int, encoder: Job | None) -> Job:
        """From pixels, where one is to be encoded, and token ids to the first new token, as `generate` does it."""
        text, picture = self.model.config.text, encoder is not None
        ids, lengths, settings = *self._prompt(tokens), self._settings(1)

        def new_cache() -> Any:
            return decode.new_cache(self.model, 1, tokens + decode.STEPS)

        cross = None
        if picture:
            shape = (1, self._vision.max_tiles, self._vision.tokens, text.width)
            cross = self._seen(jnp.zeros(shape, self.model.dtype))
        program = self._program(decode.prefill, ids, lengths, new_cache(), cross, settings, top=0)

        def run() -> Any:
            cross = None if encoder is None else self._seen(encoder.run())
            return program(ids, lengths, new_cache(), cross, settings)[1]

        weights = self._decode_weights(picture)
        head = count(self.params["text"].get("head", {"kernel": self.params["text"]["embedding"]})["kernel"])
        numbers = sum(map(count, jax.tree.leaves(weights))) - head
        inner = 4 * text.heads * text.head_dim
        weight_flops = 2 * tokens * numbers + 2 * head
        flops = inner * tokens * (tokens + 1) / 2 * len(text.self_layers)
        if picture:
            seen, kv = self._vision.max_tiles * self._vision.tokens, 2 * text.kv_heads * text.head_dim * text.width
            flops += inner * tokens * seen * len(text.cross_layers)
            weight_flops += 2 * seen * kv * len(text.cross_layers)
        own = Floor(device_bytes(weights), weight_flops / self.devices, flops / self.devices)
        if encoder is None:
            return Job(run, ((1, own),), (program,))
        return Job(run, (*encoder.phases, (1, own)), (*encoder.programs, program))

    def answer(self, tokens: int, new: int, encoder: Job) -> Job:
        """A whole answer of `new` tokens to a picture and `tokens`, as `generate` makes it: its host's work too."""
        (ids, lengths), first = self._prompt(tokens), self.first_token(tokens, encoder)
        step = self.decode(1, tokens + new, True)

        def run() -> list[int]:
            cross = self._seen(encoder.run())
            cache = decode.new_cache(self.model, 1, tokens + new)
            answer = Answer(SamplingParams(max_new_tokens=new, stop_ids=()), (), None)
            rows = np.asarray(ids), np.asarray(lengths)
            for made, (columns, *_) in blocks(self.model, self.params, [answer], [[]], rows, cache, cross):
                answer.push(made, 0, columns)
            return answer.tokens

        (_, floor), *_ = step.phases
        return Job(run, (*first.phases, (new - 1, floor)), (*first.programs, *step.programs))

    def _prompt(self, tokens: int) -> tuple[jax.Array, jax.Array]:
        """A row of random tokens, and how many these are."""
        ids = jax.random.randint(jax.random.key(1), (1, tokens), 0, self.model.config.text.vocab)
        return ids, jnp.full(1, tokens, jnp.int32)

    def _seen(self, features: jax.Array) -> CrossCache:
        """What a picture of all tiles leaves in the image cache, for every position to see."""
        tiles = jnp.arange(self._vision.max_tiles, dtype=jnp.int32)[None]
        spans = jnp.broadcast_to(jnp.array([0, 2**30], jnp.int32), (1, self._vision.max_tiles, 2))
        return decode.keys_values(self.model, self.params, features, tiles, spans)

    def _program(self, function: Any, *args: Any, **more: Any) -> Program:
        start = time.monotonic()
        lowered = function.lower(self.model, self.params, *args, **more)
        lowering = time.monotonic() - start

        def compile() -> tuple[jax.stages.Compiled, float]:
            start = time.monotonic()
            compiled = lowered.compile()
            return compiled, lowering + time.monotonic() - start

        return Program(self.params, self.compilers.submit(compile))

    def _place(self, x: Any, *names: str) -> jax.ShapeDtypeStruct:
        rules = self.model.constrain
        place = rules.sharding(*names) if isinstance(rules, Rules) else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    def _decode_weights(self, pictures: bool) -> Params:
        return decode_weights(self.params, self.model.config.text, pictures=pictures)

    def logits(self) -> tuple[np.ndarray, np.ndarray]:
        """Logits of two rows of 16 tokens with a picture each, float32 [2, 16, V], and by a decode step the
        log-probabilities of what follows one more token [2, V]."""
        text, vision = self.model.config.text, self.model.config.vision
        tokens, cross = jax.random.randint(jax.random.key(1), (2, 16), 0, text.vocab), None
        if vision is not None:
            features = self.encode(2).run()
            tiles = jnp.arange(2 * vision.max_tiles, dtype=jnp.int32).reshape(2, -1)
            spans = jnp.broadcast_to(jnp.array([0, 2**30], jnp.int32), (*tiles.shape, 2))
            cross = decode.keys_values(self.model, self.params, features, tiles, spans)
        read = decode.all_logits(self.model, self.params, tokens, cross)
        cache, settings = decode.new_cache(self.model, 2, 16 + decode.STEPS), self._settings(2)
        lengths = jnp.full(2, 16, jnp.int32)
        state, _ = decode.prefill(self.model, self.params, tokens, lengths, cache, cross, settings, top=0)
        state = dataclasses.replace(state, token=tokens[:, 0])
        _, made, _ = decode.decode(self.model, self.params, state, cross, settings, steps=1, top=text.vocab)
        read, ranks, step = decode.on_host((read, made.top_tokens[:, 0], made.top_logprobs[:, 0]))
        return read, np.take_along_axis(step, ranks.argsort(axis=-1), axis=-1)

    def _settings(self, rows: int) -> Settings:
        endless = SamplingParams(max_new_tokens=2**30, stop_ids=())
        return Settings.of([endless] * rows, [[]] * rows, (), self.model.config.text.vocab)


def abstract(config: MllamaConfig, dtype: str, devices: int, cache: str | None = None) -> tuple[MllamaModel, Params]:
    """A model in bfloat16 and what its parameters are, the decoder's kernels in `dtype`, and on which devices."""
    wide, quantize = jnp.dtype("bfloat16"), dtype if dtype in QUANTIZATIONS else None
    if devices == 1:
        tree = nn.unbox(abstract_parameters(config, wide, quantize))
        return MllamaModel(config, wide, cache=cache), tree
    rules = preset_rules("serve", config, make_mesh(mesh_axes("serve", config, devices), jax.devices()[:devices]))
    return MllamaModel(config, wide, rules, cache=cache), resolve(config, rules, wide, quantize)


def spread_error(config: MllamaConfig, dtype: str, devices: int, cache: str | None = None) -> float:
    """How far logits of a few layers, one of each kind, are from those of one device, of the largest.

    Both have the same random weights and read two rows of 16 tokens with a picture each, and one more each in a step.
    """
    config = shallow(config, min(config.text.cross_layers, default=0) + 1)
    if config.vision is not None:
        taps = len(config.vision.taps)
        few = dataclasses.replace(config.vision, layers=taps + 1, taps=tuple(range(taps)), global_layers=1)
        config = dataclasses.replace(config, vision=few)
    alone = Bench.of(config, dtype, cache=cache)
    model, tree = abstract(config, dtype, devices, cache)
    params = jax.device_put(alone.params, jax.tree.map(lambda leaf: leaf.sharding, tree))
    together = Bench(model, lay_out(params, model.constrain.platform))
    pairs = zip(alone.logits(), together.logits(), strict=True)
    return max(float(np.abs(several - one).max() / np.abs(one).max()) for one, several in pairs)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if x.committed else None)


def _parameter(path: tuple[Any, ...], like: Any) -> jax.Array:
    """A parameter; the scales of int4 kernels, unlike those of norms, have an axis of groups."""
    grouped = path[-1].key == "scale" and like.ndim > 1
    return normal(like, (like.shape[-1] * GROUP) ** -0.5 / 4.6 if grouped else None)  # 4.6: of -8 ... 7 the deviation


def normal(like: Any, scale: float | None = None) -> jax.Array:
    """Random numbers of such a shape and dtype, of about the size that weights of that width have; or all `scale`."""
    shape, dtype = tuple(like.shape), jnp.dtype(like.dtype)

    def make(key: jax.Array) -> jax.Array:
        if dtype.itemsize == 1:  # int8, and the packed integers of int4
            return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), dtype)
        if dtype == jnp.float32:  # the scales of int8 numbers
            return jnp.full(shape, 2e-4, jnp.float32)
        if scale is not None:
            return jnp.full(shape, scale, dtype)
        return jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5

    place = getattr(like, "sharding", None)
    return _jitted(make, shape, dtype, scale, place)(jax.random.key(sum(shape), impl="unsafe_rbg"))


_made: dict[Any, Callable] = {}


def _jitted(make: Callable, *key: Any) -> Callable:
    return _made.setdefault(key, jax.jit(make, out_shardings=key[-1]))
