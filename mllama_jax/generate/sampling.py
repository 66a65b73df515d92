"""How the next token is chosen: settings for each row, and pure functions on logits."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mllama_jax.errors import InputError

INT32 = 2**31 - 1
STOPS_AT_MOST = 16
LOGPROBS_AT_MOST = 20


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Settings of one row. The defaults take the likeliest token each time.

    Attributes:
        max_new_tokens: how many tokens to make at most.
        min_new_tokens: no stop token before so many.
        temperature: 0 takes the likeliest token and draws no random number.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probabilities reach p.
        min_p: keep tokens at least so likely beside the likeliest one.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens in prompt and answer.
        presence_penalty: is taken off the logits of tokens in the answer.
        frequency_penalty: is taken off once for each time that a token is in the answer.
        logit_bias: is added to the logits of the token ids it names.
        stop: texts that end the answer, which leaves them out.
        stop_ids: tokens that end the answer; None takes the model's own.
        seed: of the row's random numbers, which no other row influences.
        n: how many answers to make of one prompt; the i-th draws with seed + i.
        logprobs: how many of the likeliest tokens to report at each place.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None
    seed: int = 0
    n: int = 1
    logprobs: int = 0

    def __post_init__(self) -> None:
        for field, low, high in (
            ("max_new_tokens", 1, INT32),
            ("min_new_tokens", 0, INT32),
            ("top_k", 0, INT32),
            ("seed", 0, 2**32 - 1),
            ("n", 1, 128),
            ("logprobs", 0, LOGPROBS_AT_MOST),
        ):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise InputError(f"{field} must be an integer, got {value!r}")
            _within(field, int(value), low, high)
        for field, low, high in (
            ("temperature", 0, None),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 0, None),
            ("presence_penalty", -2, 2),
            ("frequency_penalty", -2, 2),
        ):
            _finite(field, getattr(self, field))
            _within(field, getattr(self, field), low, high)
        for field in ("top_p", "repetition_penalty"):
            if getattr(self, field) == 0:
                raise InputError(f"{field} must be above 0, got 0")
        if self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"min_new_tokens must be at most max_new_tokens, got {self.min_new_tokens} and {self.max_new_tokens}"
            )
        if self.n > 1 and self.temperature == 0:
            raise InputError(f"n={self.n} answers at temperature 0 would all be the same; set a temperature")
        self._check_bias()
        self._check_stops()

    def check_ids(self, vocab: int) -> None:
        """Raises InputError for an id that is none of so many."""
        for field, ids in (("stop_ids", self.stop_ids or ()), ("logit_bias", self.logit_bias)):
            if (beyond := max(ids, default=0)) >= vocab:
                raise InputError(f"{field} must name ids below {vocab}, got {beyond}")

    def _check_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise InputError(f"logit_bias must map token ids to numbers, got {type(self.logit_bias).__name__}")
        for token, bias in self.logit_bias.items():
            if not _is_token(token):
                raise InputError(f"logit_bias must have token ids for keys, got {token!r}")
            _finite(f"logit_bias[{token}]", bias)

    def _check_stops(self) -> None:
        if not isinstance(self.stop, list | tuple) or not all(isinstance(text, str) for text in self.stop):
            raise InputError(f"stop must be a list of texts, got {self.stop!r}")
        if len(self.stop) > STOPS_AT_MOST:
            raise InputError(f"stop must be at most {STOPS_AT_MOST} texts, got {len(self.stop)}")
        if not all(self.stop):
            raise InputError("stop must have no empty text, got ''")
        object.__setattr__(self, "stop", tuple(self.stop))
        if self.stop_ids is not None:
            if not isinstance(self.stop_ids, list | tuple) or not all(map(_is_token, self.stop_ids)):
                raise InputError(f"stop_ids must be a list of token ids, got {self.stop_ids!r}")
            if len(self.stop_ids) > STOPS_AT_MOST:
                raise InputError(f"stop_ids must be at most {STOPS_AT_MOST} token ids, got {len(self.stop_ids)}")
            object.__setattr__(self, "stop_ids", tuple(self.stop_ids))

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> SamplingParams:
        """From settings by name; InputError for a name that is none."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise InputError(f"{unknown[0]} is not a setting; known are {', '.join(known)}")
        return cls(**settings)

    def each(self) -> Sequence[SamplingParams]:
        """The settings of each of the n answers."""
        return [dataclasses.replace(self, n=1, seed=(self.seed + i) % 2**32) for i in range(self.n)]

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


def _is_token(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and 0 <= int(value) <= INT32


def _finite(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not abs(value) < 1e30:  # pyright: ignore[reportOperatorIssue]
        raise InputError(f"{field} must be a finite number, got {value!r}")


def _within(field: str, value: float, low: float | None, high: float | None) -> None:
    if low is not None and value < low:
        raise InputError(f"{field} must be at least {low}, got {value!r}")
    if high is not None and value > high:
        raise InputError(f"{field} must be at most {high}, got {value!r}")


@struct.dataclass
class Settings:
    """The settings of all rows as arrays [B]; `stops` is int32 [B, STOPS_AT_MOST], filled up with -1.

    `bias` float32 [B, V] and `in_prompt` bool [B, V] are None where no row has a bias or a penalty, so that decoding
    does not read them.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    seed: jax.Array
    least: jax.Array
    limit: jax.Array
    stops: jax.Array
    bias: jax.Array | None
    in_prompt: jax.Array | None

    @classmethod
    def of(
        cls, rows: Sequence[SamplingParams], prompts: Sequence[Sequence[int]], stops: Sequence[int], vocab: int
    ) -> Settings:
        """`prompts` are the rows' token ids, `stops` the stop tokens of rows that name none."""

        def column(field: str, dtype: type) -> Any:
            return np.array([getattr(row, field) for row in rows], dtype)

        lists = [tuple(stops) if row.stop_ids is None else row.stop_ids for row in rows]
        for row in rows:
            row.check_ids(vocab)
        table: Any = np.full((len(rows), STOPS_AT_MOST), -1, np.int32)
        for line, ids in zip(table, lists, strict=True):
            line[: len(ids)] = ids
        bias: Any = None
        if any(row.logit_bias for row in rows):
            bias = np.zeros((len(rows), vocab), np.float32)
            for line, row in zip(bias, rows, strict=True):
                line[list(row.logit_bias)] = list(row.logit_bias.values())
        in_prompt: Any = None
        if any(row.penalised for row in rows):
            in_prompt = np.zeros((len(rows), vocab), bool)
            for line, prompt in zip(in_prompt, prompts, strict=True):
                line[[token for token in prompt if token < vocab]] = True
        settings = cls(
            temperature=column("temperature", np.float32),
            top_k=column("top_k", np.int32),
            top_p=column("top_p", np.float32),
            min_p=column("min_p", np.float32),
            repetition=column("repetition_penalty", np.float32),
            presence=column("presence_penalty", np.float32),
            frequency=column("frequency_penalty", np.float32),
            seed=column("seed", np.uint32),
            least=column("min_new_tokens", np.int32),
            limit=column("max_new_tokens", np.int32),
            stops=table,
            bias=bias,
            in_prompt=in_prompt,
        )
        return jax.device_put(settings)


def sample(logits: jax.Array, settings: Settings, made: jax.Array, counts: jax.Array | None) -> jax.Array:
    """Choose a token for each row.

    Args:
        logits: float32 [B, V].
        made: int32 [B], how many tokens each row has made; with its seed it determines the row's random numbers.
        counts: int32 [B, V], how often each token is in the answer so far; None where no row has a penalty.

    Returns:
        int32 [B].
    """
    logits = adjusted(logits, settings, made, counts)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn() -> jax.Array:
        scaled = logits / jnp.maximum(settings.temperature, 1e-6)[:, None]
        keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(settings.seed, made)
        masked = jnp.where(kept(scaled, settings), scaled, -jnp.inf)
        masked = jax.lax.optimization_barrier(masked)  # one kernel with the random bits compiles thrice as long on TPUs
        chosen = jax.vmap(jax.random.categorical)(keys, masked)
        return jnp.where(settings.temperature > 0, chosen.astype(jnp.int32), greedy)

    return jax.lax.cond(jnp.any(settings.temperature > 0), drawn, lambda: greedy)


def adjusted(logits: jax.Array, settings: Settings, made: jax.Array, counts: jax.Array | None) -> jax.Array:
    """Logits [B, V] after bias and penalties, without stop tokens where a row may not end yet."""
    rows = jnp.arange(len(logits))[:, None]
    if settings.bias is not None:
        logits = logits + settings.bias
    if settings.in_prompt is not None and counts is not None:
        repetition = settings.repetition[:, None]
        repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits = jnp.where(settings.in_prompt | (counts > 0), repeated, logits)
        logits = logits - settings.presence[:, None] * (counts > 0) - settings.frequency[:, None] * counts
    early = jnp.where((made < settings.least)[:, None], settings.stops, -1)
    return logits.at[rows, jnp.where(early < 0, logits.shape[-1], early)].set(-jnp.inf, mode="drop")


def kept(logits: jax.Array, settings: Settings) -> jax.Array:
    """Which of the logits [B, V], over temperature, top-k, then top-p, then min-p keep: bool [B, V], never none.

    As transformers' processors do; of equal logits at a border top-p, too, keeps all.
    """
    likeliest = logits == logits.max(axis=-1, keepdims=True)
    top_k = (settings.top_k[:, None] == 0) | at_least(logits, jnp.ones_like(logits), settings.top_k)
    probabilities = jax.nn.softmax(jnp.where(top_k, logits, -jnp.inf), axis=-1)
    top_p = (settings.top_p[:, None] >= 1) | at_least(logits, probabilities, settings.top_p)
    min_p = probabilities >= settings.min_p[:, None] * probabilities.max(axis=-1, keepdims=True)
    return top_k & (top_p & min_p | likeliest)


def at_least(values: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """Where `values` [B, V] reach the largest value from which on the `weights` add up to the row's `target` [B].

    It is searched for in the values' bits, four at a time, for a sort takes a TPU's compiler longer than ten layers do.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    keys = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))  # in the order of the values
    digits = jnp.arange(1, 16, dtype=jnp.uint32)

    def step(i: jax.Array, found: jax.Array) -> jax.Array:
        shift = (28 - 4 * i).astype(jnp.uint32)
        tried = found | digits << shift  # B 15
        sums = jnp.where(keys[:, None] >= tried[..., None], weights[:, None], 0).sum(axis=-1)
        digit = (sums >= target[:, None]).sum(axis=-1, keepdims=True)  # the sums fall
        return found | digit.astype(jnp.uint32) << shift

    return keys >= jax.lax.fori_loop(0, 8, step, jnp.zeros((len(values), 1), jnp.uint32))
