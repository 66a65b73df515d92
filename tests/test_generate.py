"""Generation: ragged batches, sampling, stopping, buckets, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.stats import chisquare

import mllama_jax
from mllama_jax import Mllama, SamplingParams
from mllama_jax.errors import InputError
from mllama_jax.generate import decode
from mllama_jax.generate.batch import bucket
from mllama_jax.generate.sampling import Settings, kept, sample
from mllama_jax.model import attention as model_attention
from mllama_jax.processing.chat import ChatTemplate

IMAGE = 768
Draw = Callable[..., Image.Image]


def rows(picture: Draw) -> tuple[list[list[int]], list[list[Image.Image]]]:
    """Text only, one picture, two apart, two together after text."""
    tokens = [
        [512, 5, 6, 7],
        [512, IMAGE, 9, 10, 11, 12],
        [512, IMAGE, 3, IMAGE, 4],
        [512, 20, 21, IMAGE, IMAGE, 22, 23],
    ]
    images = [[], [picture(1)], [picture(2, 50, 50), picture(3, 200, 40)], [picture(4, 30, 130), picture(5, 56, 56)]]
    return tokens, images


def test_rows_of_a_batch_are_what_they_are_alone(small: Mllama, picture: Draw) -> None:
    tokens, images = rows(picture)
    together = small.generate_tokens(tokens, images, max_new_tokens=12, stop_ids=())
    order = [2, 0, 3, 1]
    shuffled = small.generate_tokens(
        [tokens[i] for i in order], [images[i] for i in order], max_new_tokens=12, stop_ids=()
    )
    assert [together[i] for i in order] == shuffled
    for row, pictures, made in zip(tokens, images, together, strict=True):
        assert small.generate_tokens([row], [pictures], max_new_tokens=12, stop_ids=()) == [made]


def test_any_neighbours_in_any_order(small: Mllama, picture: Draw) -> None:
    """Rows of random kinds, each with its own settings, answer as they do alone, to the last digits of logprobs."""
    rng = np.random.default_rng(0)
    conversations, params = [], []
    for n in range(8):
        shown = [picture(10 * n + i, *rng.integers(20, 180, 2)) for i in range(n % 4)]
        content: list[dict[str, Any]] = [{"type": "image", "image": each} for each in shown]
        content.insert(int(rng.integers(len(shown) + 1)), {"type": "text", "text": "What is this? " * (1 + n % 3)})
        conversations.append([{"role": "user", "content": content}])
        temperature = float(n % 2)
        params.append(
            SamplingParams(max_new_tokens=4 + 3 * n, temperature=temperature, top_p=0.95, seed=n, stop_ids=())
        )
    alone = [small.generate([each], [own])[0] for each, own in zip(conversations, params, strict=True)]
    for size in (2, 5, 8):
        chosen = rng.permutation(8)[:size]
        together = small.generate([conversations[i] for i in chosen], [params[i] for i in chosen])
        for i, completion in zip(chosen, together, strict=True):
            assert completion.tokens == alone[i].tokens
            np.testing.assert_allclose(completion.logprobs, alone[i].logprobs, atol=1e-5)


def test_decoding_through_the_cache_is_reading_it_all_again(small: Mllama, picture: Draw) -> None:
    tokens, images = rows(picture)
    for row, pictures in zip(tokens, images, strict=True):
        (made,) = small.generate_tokens([row], [pictures], max_new_tokens=8, stop_ids=())
        logits = small.logits([row + made], [pictures])[0]
        assert logits[len(row) - 1 : -1].argmax(-1).tolist() == made


def test_sampled_rows_depend_on_their_seed_alone(small: Mllama, picture: Draw) -> None:
    tokens, images = rows(picture)
    settings: dict[str, Any] = {"max_new_tokens": 16, "temperature": 1.5, "stop_ids": ()}
    first = small.generate_tokens(tokens, images, seed=1, **settings)
    assert first == small.generate_tokens(tokens, images, seed=1, **settings)
    assert first != small.generate_tokens(tokens, images, seed=2, **settings)
    assert small.generate_tokens(tokens[2:3], images[2:3], seed=1, **settings) == first[2:3]


def test_a_stop_token_ends_its_row_and_no_other(small: Mllama, picture: Draw) -> None:
    tokens, images = rows(picture)
    free = small.generate_tokens(tokens, images, max_new_tokens=40, stop_ids=())
    stop = free[1][5]
    stopped = small.generate_tokens(tokens, images, max_new_tokens=40, stop_ids=(stop,))
    for full, cut in zip(free, stopped, strict=True):
        end = full.index(stop) + 1 if stop in full else len(full)
        assert cut == full[:end]


def prefilled(small: Mllama) -> tuple[decode.State, Settings]:
    settings = settings_of(1, max_new_tokens=4)
    tokens, lengths = jnp.full((1, 16), 5), jnp.array([3])
    cache = small.model.empty_cache(1, 64)
    state, _ = decode.prefill(small.model, small.params, tokens, lengths, cache, None, settings, top=0)
    return state, settings


def test_decode_leaves_early(small: Mllama) -> None:
    """Once every row is done no further step is run: the block says how many columns it made."""
    state, settings = prefilled(small)
    _, _, columns = decode.decode(small.model, small.params, state, None, settings, steps=32, top=0)
    assert int(columns) == 3


def test_the_cache_is_updated_in_place(small: Mllama) -> None:
    state, settings = prefilled(small)
    compiled = decode.decoder("cpu").lower(small.model, small.params, state, None, settings, steps=32, top=0).compile()
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= cache
    decode.decode(small.model, small.params, state, None, settings, steps=32, top=0)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))


def test_a_second_prompt_of_similar_length_compiles_nothing(small: Mllama, picture: Draw) -> None:
    small.generate_tokens([[512, IMAGE, *range(20)]], [[picture(1, 50, 50)]], max_new_tokens=8)
    programs: Any = (decode.encode, decode.keys_values, decode.prefill, decode.decoder("cpu"))
    before = [program._cache_size() for program in programs]
    small.generate_tokens([[512, IMAGE, *range(22)]], [[picture(2, 40, 56)]], max_new_tokens=9)
    assert [program._cache_size() for program in programs] == before


def test_buckets() -> None:
    sizes = [bucket(n) for n in range(1, 200)]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert sorted(set(sizes)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert bucket(5, 16) == 16


def test_greedy_draws_no_random_number(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def categorical(key: jax.Array, logits: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: drawn.append(1))
        return jnp.argmax(logits)

    monkeypatch.setattr(jax.random, "categorical", categorical)
    logits = jnp.array([[0.0, 3.0, 1.0], [2.0, 0.0, 2.5]])
    for seed in (0, 1):
        settings = Settings.of([SamplingParams(seed=seed)] * 2, [[], []], (), 3)
        assert sample(logits, settings, jnp.zeros(2, jnp.int32), None).tolist() == [1, 2]
    jax.effects_barrier()
    assert not drawn
    warm = Settings.of([SamplingParams(temperature=1.0)] * 2, [[], []], (), 3)
    sample(logits, warm, jnp.zeros(2, jnp.int32), None).block_until_ready()
    jax.effects_barrier()
    assert drawn


def settings_of(n: int, vocab: int = 5, **values: Any) -> Settings:
    return Settings.of([SamplingParams(seed=seed, **values) for seed in range(n)], [[]] * n, (), vocab)


@pytest.mark.parametrize(
    ("values", "kept_tokens"),
    [
        ({"temperature": 0.7}, 8),
        ({"temperature": 1.3, "top_k": 5}, 5),
        ({"temperature": 1.0, "top_p": 0.8}, 4),
        ({"temperature": 1.0, "min_p": 0.2}, 4),
        ({"temperature": 2.0, "top_k": 6, "top_p": 0.9, "min_p": 0.3}, 5),
    ],
)
def test_samples_follow_the_distribution(values: dict[str, float], kept_tokens: int) -> None:
    """Pearson's chi-square over 20,000 draws."""
    n, logits = 20000, np.array([1.0, 0.0, -1.0, 2.0, 0.5, -0.5, 1.5, -2.0])
    probabilities = np.exp(logits / values["temperature"])
    probabilities[np.argsort(-logits)[kept_tokens:]] = 0
    drawn = sample(
        jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, 8)),
        settings_of(n, 8, **values),
        jnp.zeros(n, jnp.int32),
        None,
    )
    counts = np.bincount(np.asarray(drawn), minlength=8)
    assert not counts[probabilities == 0].any()
    expected = (n * probabilities / probabilities.sum())[probabilities > 0]
    assert chisquare(counts[probabilities > 0], expected).pvalue > 0.001


def test_draws_of_one_row_are_independent() -> None:
    """The numbers of following steps and of neighbouring seeds: pairs of draws are as frequent as chance has them."""
    n = 20000
    for seeds, steps in ((np.zeros(n), np.arange(n)), (np.arange(n), np.zeros(n))):
        settings = settings_of(1, 4, temperature=1.0)
        rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape[1:])), settings).replace(
            seed=jnp.asarray(seeds, jnp.uint32)
        )
        drawn = np.asarray(sample(jnp.zeros((n, 4)), rows, jnp.asarray(steps, jnp.int32), None))
        pairs = np.bincount(4 * drawn[::2] + drawn[1::2], minlength=16)
        assert chisquare(pairs).pvalue > 0.001


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"top_k": 2}, [0, 1, 0, 1]),
        ({"top_p": 0.5}, [0, 1, 0, 0]),
        ({"top_p": 0.6}, [0, 1, 0, 1]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"top_k": 3, "top_p": 0.6}, [0, 1, 0, 1]),
        ({"top_k": 3, "top_p": 0.9}, [1, 1, 0, 1]),
        ({"top_k": 9}, [1, 1, 1, 1]),
        ({}, [1, 1, 1, 1]),
    ],
)
def test_what_top_k_and_top_p_keep(values: dict, expected: list[int]) -> None:
    logits = jnp.log(jnp.array([[0.15, 0.5, 0.05, 0.3]]))
    assert kept(logits, settings_of(1, temperature=1.0, **values)).astype(int).tolist() == [expected]


def test_what_is_kept_is_what_a_sort_finds() -> None:
    """Many rows of a real vocabulary's size, each with its settings; ties at the border are kept together."""
    rng, vocab = np.random.default_rng(0), 8_000
    logits = (rng.normal(size=(16, vocab)) * rng.uniform(0.1, 8, (16, 1))).astype(np.float32)
    logits[::3] = np.round(logits[::3], 1)
    top_k = np.where(rng.random(16) < 0.3, 0, rng.integers(1, 300, 16))
    params = [
        SamplingParams(temperature=1.0, top_k=int(k), top_p=float(p))
        for k, p in zip(top_k, rng.uniform(0.05, 1, 16), strict=True)
    ]
    found = np.asarray(kept(jnp.asarray(logits), Settings.of(params, [[]] * 16, (), vocab)))
    for line, row, each in zip(logits, found, params, strict=True):
        exact = line.astype(np.float64)
        falling = np.sort(exact)[::-1]
        if each.top_k:
            exact = np.where(exact >= falling[each.top_k - 1], exact, -np.inf)
        mass = np.exp(exact - falling[0]) / np.exp(exact - falling[0]).sum()
        above = np.array([mass[mass > one].sum() for one in np.unique(mass)])[np.unique(mass, return_inverse=True)[1]]
        sure = np.abs(above - each.top_p) > 1e-6  # of sums in float32
        np.testing.assert_array_equal(row[sure], ((above < each.top_p) & (mass > 0))[sure])
        assert sure.mean() > 0.99


def test_streamed_pieces_add_up(small: Mllama, picture: Draw) -> None:
    conversation = [
        {"role": "user", "content": [{"type": "image", "image": picture(1)}, {"type": "text", "text": "What is it?"}]}
    ]
    settings: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0, "stop_ids": ()}
    (whole,) = small.generate([conversation], **settings)
    pieces = list(small.stream(conversation, **settings))
    assert "".join(pieces) == whole.text
    assert len(whole.tokens) == len(whole.logprobs) == 40
    assert whole.finish_reason == "length"
    assert len(pieces) > 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -0.1, "temperature must be at least 0, got -0.1"),
        ("temperature", float("nan"), "temperature must be a finite number, got nan"),
        ("temperature", "hot", "temperature must be a finite number, got 'hot'"),
        ("top_p", 0.0, "top_p must be above 0, got 0"),
        ("top_p", float("inf"), "top_p must be a finite number, got inf"),
        ("top_k", -1, "top_k must be at least 0, got -1"),
        ("top_k", 1.5, "top_k must be an integer, got 1.5"),
        ("max_new_tokens", 0, "max_new_tokens must be at least 1, got 0"),
        ("seed", -1, "seed must be at least 0, got -1"),
        ("seed", 2**32, "seed must be at most 4294967295"),
    ],
)
def test_bad_settings(field: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingParams(**{field: value})


def test_bad_rows(small: Mllama, picture: Draw) -> None:
    one = picture(1)
    for tokens, images, message in (
        ([], [], "no rows"),
        ([[]], [[]], "row 0: no tokens"),
        ([[512, 5]], [], "1 rows of tokens but 0 rows of images"),
        ([[512, 5]], [[one]], "row 0: 0 image tokens but 1 pictures"),
        ([[512], [512, IMAGE, IMAGE]], [[], [one]], "row 1: 2 image tokens but 1 pictures"),
        ([[512, 769]], [[]], "row 0: token 769 is outside the vocabulary of 769 ids"),
        ([[512, -1]], [[]], "row 0: token -1 is outside"),
        ([[512] * 500], [[]], "row 0: 500 prompt tokens and 20 new ones exceed the context of 512"),
    ):
        with pytest.raises(InputError, match=message):
            small.generate_tokens(tokens, images, max_new_tokens=20)


def test_what_is_no_list_is_refused_by_name(small: Mllama, picture: Draw) -> None:
    hello: Any = [{"role": "user", "content": "Hello"}]
    text: Any = "a.png"
    shown: Any = [{"role": "user", "content": [{"type": "image", "image": picture(1)}]}]
    nothing: Any = None
    for call, message in (
        (lambda: small.generate(nothing), "conversations: expected a list, got NoneType"),
        (lambda: small.generate(hello), "conversation: expected a list of messages, got dict"),
        (lambda: small.generate([hello], [nothing]), "params must be a list, one SamplingParams for each"),
        (lambda: small.generate([hello], tools=text), "tools: expected a list of JSON schemas, got str"),
        (lambda: small.generate_tokens(nothing, [[]]), "tokens: expected a list, got NoneType"),
        (lambda: small.generate_tokens([[512]], nothing), "images: expected a list, got NoneType"),
        (lambda: small.logits([[512]], [nothing]), r"images\[0\]: expected a list, got NoneType"),
        (lambda: small.encode_images([[text]]), "row 0: images must be PIL images, got str"),
        (lambda: small.look(shown, nothing), "answer: expected text, got NoneType"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_tools_reach_the_template(small: Mllama) -> None:
    hello, tools = [{"role": "user", "content": "Hello"}], [{"name": "weather"}]
    model = dataclasses.replace(small, template=ChatTemplate("{{ tools | tojson }}"))
    assert small.tokenizer is not None
    written = [512, *small.tokenizer.encode('[{"name": "weather"}]', specials=False)]
    assert model.prompt(hello, tools).tokens == written
    settings: Any = {"tools": tools, "max_new_tokens": 3, "stop_ids": ()}
    (completion,) = model.generate([hello], **settings)
    assert completion.prompt_tokens == len(written)
    assert "".join(model.stream(hello, **settings)) == completion.text
    assert "".join(model.chat(tools=tools).say("Hello", max_new_tokens=3, stop_ids=())) == completion.text


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_stays_near(
    small: Mllama, small_directory: Path, picture: Draw, dtype: str, tolerance: float
) -> None:
    tokens, images = [[512, IMAGE, 9, 10, 11, 12]], [[picture(1)]]
    exact = small.logits(tokens, images)
    half = mllama_jax.load(small_directory, dtype=dtype).logits(tokens, images)
    assert half.dtype == np.float32
    assert np.linalg.norm(half - exact) <= tolerance * np.linalg.norm(exact)


def test_prompts_in_chunks_and_attention_in_blocks_change_nothing(
    small_directory: Path, picture: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of which one ends in each chunk; blocks of one and of a few queries, in the vision tower too."""
    tokens = [[512, IMAGE, *range(20)], [512, *range(5)], [512, 3, IMAGE, *range(40, 53)], [512, *range(100, 131)]]
    images = [[picture(1)], [], [picture(2, 200, 40)], []]
    whole = mllama_jax.load(small_directory, dtype="float32")
    features, logits = whole.encode_images(images), whole.logits(tokens, images)
    made = whole.generate_tokens(tokens, images, max_new_tokens=6, stop_ids=())
    jax.clear_caches()
    monkeypatch.setattr(decode, "CHUNK", 8)
    monkeypatch.setattr(model_attention, "SCORES_AT_ONCE", 2500)
    traced = []
    monkeypatch.setattr(jax.lax, "map", lambda *args, original=jax.lax.map: traced.append(1) or original(*args))
    try:
        np.testing.assert_allclose(whole.encode_images(images), features, atol=1e-5)
        np.testing.assert_allclose(whole.logits(tokens, images), logits, atol=1e-5)
        assert whole.generate_tokens(tokens, images, max_new_tokens=6, stop_ids=()) == made
        assert traced
    finally:
        jax.clear_caches()
