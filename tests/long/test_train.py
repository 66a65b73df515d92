"""One training step for every part of a model: gradients, losses, and that what is frozen stays what it was."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from mllama_jax.convert.apply import insert, paths
from mllama_jax.errors import InputError
from mllama_jax.model.layers import REMAT
from mllama_jax.model.mllama import MllamaModel, Params, call
from mllama_jax.model.quantize import QUANTIZERS, product, quantize_parameters, widen
from mllama_jax.train import loss as losses
from mllama_jax.train.batch import IGNORED, Batch, Row, Shape, make_batch, stacked
from mllama_jax.train.loss import preference, supervised
from mllama_jax.train.parts import Lora, Part, init_lora, merge, split
from mllama_jax.train.step import TrainState, train_step
from tests.conftest import TINY

LORA = Lora(rank=3, alpha=6.0)
MODEL = MllamaModel(TINY)
IMAGE = TINY.image_token


def rows(seed: int = 0) -> Batch:
    """Four rows: a picture, two of them, none, and one that is empty."""
    rng = np.random.default_rng(seed)

    def row(*tokens: int) -> tuple[Row, list[Image.Image]]:
        pictures = [
            Image.fromarray(rng.integers(0, 256, (int(rng.integers(30, 140)), 60, 3), np.uint8))
            for token in tokens
            if token == IMAGE
        ]
        labels = [t if t != IMAGE and i > 2 else IGNORED for i, t in enumerate([*tokens[1:], 9])]
        return Row(list(tokens), labels, []), pictures

    made = [
        row(512, IMAGE, 3, 4, 5, 6, 7),
        row(512, 8, IMAGE, 9, IMAGE, 10, 11, 12, 13, 14, 15),
        row(512, 16, 17, 18, 19, 20),
        None,
    ]
    return make_batch(made, Shape(16, 2), TINY)


def parts(params: Params, part: Part) -> tuple[Params, Params]:
    trained, frozen = split(params, TINY, part)
    if part == "lora":
        trained = init_lora(TINY, LORA, jax.random.key(0))
        trained = jax.tree.map(lambda leaf: leaf + 0.01, trained)  # else b, and so the gradient of a, is zero
    return jax.tree.map(jnp.array, trained), frozen


def part_loss(model: MllamaModel, trained: Params, frozen: Params, batch: Batch) -> Any:
    return supervised(model, merge(trained, frozen, LORA), batch)


@pytest.mark.parametrize("part", ["adapter", "lora", "full"])
def test_only_the_part_is_trained(tiny_params: Params, part: Part) -> None:
    trained, frozen = parts(tiny_params, part)
    before, kept = jax.device_get((trained, frozen))
    optimizer = optax.adam(1e-2)
    step = train_step(functools.partial(part_loss, MODEL), optimizer)
    state, values = TrainState.of(trained, optimizer), []
    for _ in range(4):
        state, report = step(state, frozen, stacked([rows()]))
        values.append(float(report.loss))
    assert values[-1] < values[0] - 0.05
    jax.tree.map(np.testing.assert_array_equal, frozen, kept)
    names = set(paths(before))
    moments: Any = state.optimizer
    assert set(paths(moments[0].mu)) == names == set(paths(state.params))
    moved = {path for path, leaf in paths(state.params).items() if not np.array_equal(leaf, paths(before)[path])}
    assert moved == names
    cross = {f"layers_{i}" for i in TINY.text.cross_layers}
    if part == "adapter":
        assert {path[1] if path[0] == "text" else path[0] for path in names} == {"vision", "projector", *cross}
    if part == "full":
        assert not frozen


def test_a_new_lora_changes_nothing_and_a_trained_one_what_its_product_says(tiny_params: Params) -> None:
    def encode(params: Params) -> jax.Array:
        return call(MODEL, params, "encode", np.ones((1, 4, 3, 56, 56), np.float32), np.array([6]))

    plain = encode(tiny_params)
    lora = Lora(rank=2, alpha=3.0, targets="^(vision|projector)/")
    pairs = init_lora(TINY, lora, jax.random.key(1))
    same = encode(merge(pairs, tiny_params, lora))
    np.testing.assert_array_equal(plain, same)
    pairs = jax.tree.map(lambda leaf: leaf + 0.1, pairs)
    flat, merged = paths(pairs), paths(tiny_params)
    for path in {path[:-1] for path in flat}:
        a, b = flat[(*path, "lora_a")], flat[(*path, "lora_b")]
        change = jnp.einsum("cri,c...r->c...i", a, b) if a.ndim == 3 else jnp.tensordot(b, a, 1)
        merged[(*path, "kernel")] = merged[(*path, "kernel")] + 1.5 * change
    tree: Params = {}
    for path, leaf in merged.items():
        insert(tree, path, leaf)
    beside = encode(merge(pairs, tiny_params, lora))
    into = encode(tree)
    assert float(jnp.abs(beside - plain).max()) > 1e-2
    np.testing.assert_allclose(beside, into, atol=1e-4)


@pytest.mark.parametrize("part", ["adapter", "full"])
@pytest.mark.parametrize("remat", ["layer", "dots"])
def test_remat_changes_no_gradient(tiny_params: Params, part: Part, remat: str) -> None:
    trained, frozen = parts(tiny_params, part)

    def gradient(model: MllamaModel) -> Any:
        return jax.jit(jax.grad(lambda t: part_loss(model, t, frozen, rows())[0]))(trained)

    kept, again = gradient(MODEL), gradient(MllamaModel(TINY, remat=REMAT[remat]))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), kept, again)


def test_accumulated_gradients_are_those_of_one_batch(tiny_params: Params) -> None:
    trained, frozen = parts(tiny_params, "adapter")
    optimizer = optax.sgd(1.0)
    step = train_step(functools.partial(part_loss, MODEL), optimizer)
    one, two = rows(1), rows(2)
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), one, two)
    apart, report = step(TrainState.of(jax.tree.map(jnp.array, trained), optimizer), frozen, stacked([one, two]))
    together, whole = step(TrainState.of(jax.tree.map(jnp.array, trained), optimizer), frozen, stacked([both]))
    np.testing.assert_allclose(report.loss, whole.loss, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), apart.params, together.params)


def test_rows_do_not_see_each_other(tiny_params: Params) -> None:
    """Alone, and padded to a longer shape with more pictures, each has the gradient that is its part of the batch's."""
    batch = rows()

    @jax.jit
    def gradient(batch: Batch) -> Params:
        return jax.grad(lambda params: supervised(MODEL, params, batch)[0])(tiny_params)

    def alone(b: int) -> Batch:
        def padded(array: Any, axis: int, n: int, fill: int = 0) -> np.ndarray:
            more = [(0, n if i == axis else 0) for i in range(array.ndim)]
            return np.pad(array, more, constant_values=fill)

        row, pictures = slice(b, b + 1), slice(2 * b, 2 * b + 2)
        return Batch(
            padded(batch.tokens[row], 1, 7),
            padded(batch.labels[row], 1, 7, IGNORED),
            padded(batch.pixels[pictures], 0, 1),
            padded(batch.ratio_ids[pictures], 0, 1),
            padded(batch.spans[row], 1, batch.pixels.shape[1]),
        )

    apart = jax.tree.map(lambda *each: sum(each), *(gradient(alone(b)) for b in range(3)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), apart, gradient(batch))


def test_the_loss_is_cross_entropy_of_labels_alone(tiny_params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against NumPy, in value and, by the softmax's known gradient, in what reaches the logits."""
    batch = rows()
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 4 * TINY.text.vocab * 4)  # four blocks of positions
    value, count = supervised(MODEL, tiny_params, batch)
    logits = _logits(tiny_params, batch)
    logp = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    wanted, n = 0.0, 0
    for b, t in zip(*np.nonzero(batch.labels != IGNORED), strict=True):
        wanted, n = wanted - logp[b, t, batch.labels[b, t]], n + 1
    assert int(count) == n
    np.testing.assert_allclose(value, wanted, rtol=1e-4)
    # d loss / d head = sum over positions of (softmax - one hot) x
    x = _states(tiny_params, batch)
    error = np.exp(logp)
    for b, t in zip(*np.nonzero(batch.labels != IGNORED), strict=True):
        error[b, t, batch.labels[b, t]] -= 1
    error[batch.labels == IGNORED] = 0
    head = jax.jit(jax.grad(lambda params: supervised(MODEL, params, batch)[0]))(tiny_params)["text"]["head"]["kernel"]
    np.testing.assert_allclose(head, np.einsum("btv,btd->vd", error, x), atol=1e-4)


def _states(params: Params, batch: Batch) -> np.ndarray:
    features = losses.encode(MODEL, params, batch)
    tiles = losses.own_tiles(features, len(batch.tokens))
    cross = call(MODEL, params, "keys_values", tiles, batch.spans)
    positions = np.broadcast_to(np.arange(batch.tokens.shape[1]), batch.tokens.shape)
    cache = MODEL.empty_cache(len(batch.tokens), batch.tokens.shape[1])
    x, _ = call(MODEL, params, "__call__", batch.tokens, positions, cache, cross)
    return np.asarray(x)


def _logits(params: Params, batch: Batch) -> np.ndarray:
    return np.asarray(call(MODEL, params, "logits", jnp.asarray(_states(params, batch))), np.float64)


def test_preferences_are_those_of_the_paper(tiny_params: Params) -> None:
    """Value against NumPy; the gradient is beta sigmoid(-beta margin) times that of the pair's log-likelihoods."""
    batch, beta = rows(), 0.3
    reference = jax.tree.map(lambda leaf: leaf * 1.05, tiny_params)

    def likelihoods(params: Params) -> jax.Array:
        tiles = losses.own_tiles(losses.encode(MODEL, params, batch), len(batch.tokens))
        return losses.log_likelihoods(MODEL, params, batch, tiles).sum(1)

    loss = functools.partial(preference, MODEL, batch=batch, reference=reference, beta=beta)
    (value, count), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(tiny_params)
    own, theirs = (np.asarray(jax.jit(likelihoods)(params)) for params in (tiny_params, reference))
    margin = (own - theirs)[::2] - (own - theirs)[1::2]
    assert float(count) == 2
    np.testing.assert_allclose(value, np.log1p(np.exp(-beta * margin)).sum(), rtol=1e-4)
    weight = -beta / (1 + np.exp(beta * margin))
    signs = np.stack([weight, -weight], axis=1).ravel()
    wanted = jax.jit(jax.grad(lambda params: (likelihoods(params) * signs).sum()))(tiny_params)

    def close(ours: np.ndarray, wanted: np.ndarray) -> None:
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())

    jax.tree.map(close, gradient, wanted)


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_lora_learns_over_quantised_kernels(quantize: str, tiny_params: Params) -> None:
    frozen = quantize_parameters(jax.tree.map(jnp.asarray, tiny_params), quantize, QUANTIZERS[quantize])
    trained, optimizer = init_lora(TINY, LORA, jax.random.key(0)), optax.adam(1e-2)
    step, state, values = (
        train_step(functools.partial(part_loss, MODEL), optimizer),
        TrainState.of(trained, optimizer),
        [],
    )
    kept = jax.device_get(frozen)
    for _ in range(8):
        state, report = step(state, frozen, stacked([rows()]))
        values.append(float(report.loss))
    assert values[-1] < values[0] - 0.05
    jax.tree.map(np.testing.assert_array_equal, frozen, kept)


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_the_gradient_through_a_quantised_kernel_is_that_of_its_numbers(quantize: str) -> None:
    x, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in ((1, (2, 5, 256)), (2, (2, 12, 256))))
    values, scale = QUANTIZERS[quantize](kernel)
    weights = jax.random.normal(jax.random.key(3), (2, 5, 2, 12))
    ours = jax.grad(lambda x: jnp.sum(product("btd,cfd->btcf", x, values, scale) * weights))(x)
    wanted = jnp.einsum("btcf,cfd->btd", weights, widen(values, scale, jnp.dtype("float32")), precision="highest")
    np.testing.assert_allclose(ours, wanted, atol=1e-4)


def test_what_no_lora_can_be() -> None:
    with pytest.raises(InputError, match=r"lora.targets: 'nothing' matches none of \d+ linear maps"):
        init_lora(TINY, Lora(targets="nothing"), jax.random.key(0))
    with pytest.raises(InputError, match=r"lora.rank: expected at least 1, got 0"):
        Lora(rank=0)
    with pytest.raises(InputError, match=r"lora.targets: expected a regular expression, got '\('"):
        Lora(targets="(")
