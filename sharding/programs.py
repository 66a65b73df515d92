"""The programs that serve a model, lowered on abstract parameters and caches, and compiled for a TPU nobody has."""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from mllama_jax.config import MllamaConfig
from mllama_jax.generate import decode
from mllama_jax.generate.sampling import SamplingParams, Settings
from mllama_jax.model.cache import CrossCache, KVCache
from mllama_jax.model.mllama import MllamaModel, Params
from mllama_jax.sharding.hlo import Collective, Program
from mllama_jax.sharding.libtpu import SMALL_TILES
from mllama_jax.sharding.resolve import check_axis, resolve
from mllama_jax.sharding.rules import Rules


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is served at once: `slots` rows of up to `context` positions, each with `images` pictures of all tiles."""

    slots: int
    context: int
    images: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program, for one device.

    Attributes:
        arguments, temporaries, code: bytes; results lie in the arguments' place where `aliased`, else they are counted
            as temporaries.
        collectives: how often each runs: in decode for one token, in prefill for the whole prompt.
        text: the optimised HLO.
        seconds: what compiling took.
    """

    arguments: int
    temporaries: int
    code: int
    aliased: int
    collectives: Counter[Collective]
    text: str = dataclasses.field(repr=False)
    seconds: float


class DoesNotFit(Exception):
    """The compiler says that a program needs more memory than a device has.

    Attributes:
        needed: so many bytes.
        alone: of temporaries alone; else arguments are counted.
    """

    def __init__(self, needed: float, alone: bool = False):
        super().__init__(needed)
        self.needed, self.alone = needed, alone

    @classmethod
    def said(cls, message: str) -> DoesNotFit | None:
        """What an error of the compiler says of memory, if anything."""
        whole = re.search(r"Used ([\d.]+)([GMK]) of [\d.]+[GMK] hbm", message)
        alone = re.search(r"required for HLO temporaries \(([\d.]+)([GMK])\) exceeds available HBM", message)
        found = whole or alone
        return found and cls(float(found[1]) * 2.0 ** {"K": 10, "M": 20, "G": 30}[found[2]], alone=whole is None)

    def temporaries(self, arguments: int) -> int:
        """Bytes that are needed beside so many of arguments."""
        return int(self.needed) if self.alone else max(0, int(self.needed) - arguments)


class Programs:
    """A model's programs under `rules`, in abstract arrays."""

    def __init__(
        self,
        config: MllamaConfig,
        rules: Rules,
        dtype: str = "bfloat16",
        quantize: str | None = None,
        cache: str | None = None,
    ):
        self.config, self.rules = config, rules
        self.model = MllamaModel(config, jnp.dtype(dtype), rules, cache=cache)
        self.params = resolve(config, rules, jnp.dtype(dtype), quantize)

    def decode(self, load: Workload) -> jax.stages.Lowered:
        """A dispatch of decode steps of all slots."""
        return decode.decoder(self.model.constrain.platform).lower(
            self.model, *self.decode_arguments(load), self._settings(load.slots), steps=decode.STEPS, top=0
        )

    def decode_arguments(self, load: Workload) -> tuple[Params, decode.State, CrossCache | None]:
        """What a dispatch of decode steps takes: parameters, where each row stands, and image caches."""
        row = self._array((load.slots,), jnp.int32, "batch")
        cache, done = self.cache(load.slots, load.context), self._array((load.slots,), bool, "batch")
        state = decode.State(cache, row, row, row, done, None)
        return self.params, state, self.cross(load.slots, load.images)

    def prefill(self, load: Workload) -> jax.stages.Lowered:
        """Reading as few whole prompts of `context` tokens as the mesh allows: one for each part of the batch."""
        rows = self.rules.parts("batch")
        row = self._array((rows,), jnp.int32, "batch")
        tokens = self._array((rows, load.context), jnp.int32, "batch")
        cache, cross = self.cache(rows, load.context), self.cross(rows, load.images)
        return decode.prefill.lower(self.model, self.params, tokens, row, cache, cross, self._settings(rows), top=0)

    def encode(self) -> jax.stages.Lowered:
        """Encoding as few pictures as the mesh allows."""
        vision = self.config.vision
        assert vision is not None
        images = self.rules.parts("images")
        pixels = self._array((images, vision.max_tiles, 3, vision.tile, vision.tile), jnp.float32, "images")
        return decode.encode.lower(self.model, self.params, pixels, self._array((images,), jnp.int32, "images"))

    def cache(self, rows: int, length: int) -> tuple[KVCache, ...]:
        return tuple(self._layer(rows, length, "cache") for _ in self.config.text.self_layers)

    def cross(self, rows: int, images: int) -> CrossCache | None:
        vision, text = self.config.vision, self.config.text
        if vision is None or not images:
            return None
        tiles = images * vision.max_tiles
        layers = tuple(self._layer(rows, tiles * vision.padded_tokens, "image_seq") for _ in text.cross_layers)
        return CrossCache(layers, self._array((rows, tiles, 2), jnp.int32, "batch"), vision.tokens)

    def _layer(self, rows: int, length: int, positions: str) -> KVCache:
        """A layer's keys and values; `positions` is what these are called on a mesh."""
        layer = jax.eval_shape(lambda: self.model.empty_layer(rows, length))
        return layer.placed(lambda x, *names: self._array(x.shape, x.dtype, *names), positions)

    def _settings(self, rows: int) -> Settings:
        shapes = jax.eval_shape(
            lambda: Settings.of([SamplingParams()] * rows, [[]] * rows, self.config.stops, self.config.text.vocab)
        )
        return jax.tree.map(lambda x: self._array(x.shape, x.dtype, "batch"), shapes)

    def _array(self, shape: tuple[int, ...], dtype: Any, *names: str) -> Any:
        """An abstract array, where the program takes a real one."""
        for size, name in zip(shape, names, strict=False):
            check_axis(size, name, self.rules)
        return jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=self.rules.sharding(*names))


@contextmanager
def _uncached() -> Iterator[None]:
    """Without JAX's cache of compiled programs, which cannot read those of absent devices and writes no dump."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # it asks once whether it is enabled
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        reset_cache()


def compile_program(lowered: jax.stages.Lowered, options: Mapping[str, Any] = SMALL_TILES) -> Compiled:
    """Compile for the devices that a program was lowered for: a TPU's, as the options are. Raises DoesNotFit."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as dump:  # `as_text` fails on large programs and on TPU7x (libtpu 0.0.52)
        told = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True, **options}
        try:
            with _uncached():
                compiled = lowered.compile(compiler_options=told)
        except jax.errors.JaxRuntimeError as error:
            if said := DoesNotFit.said(str(error)):
                raise said from None
            raise
        seconds = time.monotonic() - start
        (file,) = Path(dump).glob("*after_optimizations.txt")
        text = file.read_text()
    memory: Any = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes + results,
        code=memory.generated_code_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        collectives=Program(text).collectives(),
        text=text,
        seconds=seconds,
    )
