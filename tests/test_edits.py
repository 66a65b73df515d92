"""A vision model's decoder alone, another decoder under the adapter, and LoRA adapters merged, while converting."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mllama_jax
from mllama_jax import Mllama, MllamaConfig
from mllama_jax.convert.export import write_hf
from mllama_jax.convert.run import convert
from mllama_jax.convert.table import Layout
from tests.archives import fault
from tests.conftest import SMALL
from tests.test_convert import assert_same, random_params, renamed

DECODER = dataclasses.replace(SMALL.text, layers=4, cross_layers=(), extra_embeddings=0)
TEXT = MllamaConfig(DECODER, None, SMALL.bos, SMALL.pad, SMALL.stops)
TOKENS = [[512, 5, 6, 7, 300, 20]]


@pytest.fixture(scope="module")
def text_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text")
    write_hf(directory, random_params(TEXT, 7), TEXT, np.dtype("float32"))
    return directory


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_text_only_is_a_plain_llama(small: Mllama, small_directory: Path, tmp_path: Path, to: Layout) -> None:
    convert(small_directory, tmp_path / "text", to=to, text_only=True)
    config = json.loads((tmp_path / "text/config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("llama", 4)
    assert not (tmp_path / "text/preprocessor_config.json").exists()
    model = mllama_jax.load(tmp_path / "text", dtype="float32")
    assert model.config == TEXT
    # Without a picture the adapter's layers do nothing.
    np.testing.assert_array_equal(model.logits(TOKENS, [[]]), small.logits(TOKENS, [[]]))


def test_text_from_another_model(small: Mllama, small_directory: Path, text_directory: Path, tmp_path: Path) -> None:
    convert(small_directory, tmp_path / "both", to="orbax", text_from=text_directory)
    text, both = mllama_jax.load(text_directory, dtype="float32"), mllama_jax.load(tmp_path / "both", dtype="float32")
    np.testing.assert_array_equal(both.logits(TOKENS, [[]]), text.logits(TOKENS, [[]]))
    for part in ("vision", "projector"):
        assert_same(both.params[part], small.params[part])
    for layer in SMALL.text.cross_layers:
        assert_same(both.params["text"][f"layers_{layer}"], small.params["text"][f"layers_{layer}"])
    vocab = SMALL.text.vocab
    assert np.array_equal(both.params["text"]["embedding"][vocab:], small.params["text"]["embedding"][vocab:])
    # and out again: the decoder that was put in, as it was
    convert(tmp_path / "both", tmp_path / "out", to="hf", text_only=True)
    before, after = (load_file(path / "model.safetensors") for path in (text_directory, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_decoders_that_do_not_fit(small_directory: Path, text_directory: Path, tmp_path: Path) -> None:
    wide = dataclasses.replace(TEXT, text=dataclasses.replace(DECODER, hidden=128))
    write_hf(tmp_path / "wide", random_params(wide), wide, np.dtype("float32"))
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (small_directory, {"text_from": tmp_path / "wide"}, "hidden: expected 96 as in the vision model, got 128"),
        (small_directory, {"text_from": small_directory}, "expected a text-only model to put into a vision model"),
        (text_directory, {"text_from": text_directory}, "expected a text-only model to put into a vision model"),
        (text_directory, {"text_only": True}, "--text-only: the source is text-only already"),
    ]
    for source, settings, message in cases:
        assert message in fault(functools.partial(convert, source, tmp_path / "target", to="hf", **settings))
    write_hf(tmp_path / "half", random_params(TEXT), TEXT, np.dtype("float16"))
    half = tmp_path / "half"
    message = fault(lambda: convert(small_directory, tmp_path / "target", to="hf", text_from=half))
    assert "got several; name the --dtype" in message
    assert not (tmp_path / "target").exists()


# ---- LoRA ---------------------------------------------------------------------------------------------------------

MODULES = (
    "language_model.model.layers.0.self_attn.q_proj",
    "language_model.model.layers.0.self_attn.v_proj",
    "language_model.model.layers.1.cross_attn.k_proj",
    "language_model.model.layers.2.mlp.up_proj",
    "language_model.model.layers.2.self_attn.o_proj",
    "vision_model.transformer.layers.1.self_attn.k_proj",
    "vision_model.global_transformer.layers.0.mlp.fc2",
    "language_model.lm_head",
    "multi_modal_projector",
)
SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none"}


def adapter(directory: Path, base: dict[str, np.ndarray], names: tuple[str, ...], **changes: object) -> Path:
    """A random adapter of rank 4 as PEFT saves it."""
    rng, directory = np.random.default_rng(0), directory / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(SETTINGS | changes))
    weights = {}
    for name in names:
        out, width = base[f"{name}.weight"].shape
        key = f"base_model.model.{renamed(name + '.') if changes.get('new') else name + '.'}"
        weights[f"{key}lora_A.weight"] = rng.standard_normal((4, width)).astype(np.float32)
        weights[f"{key}lora_B.weight"] = rng.standard_normal((out, 4)).astype(np.float32)
    save_file(weights, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, {}),
        ({"new": True}, {}),  # names since transformers 4.52
        ({"use_rslora": True}, dict.fromkeys(MODULES, 3.0)),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 2}}, {MODULES[0]: 0.5}),
    ],
    ids=["plain", "new names", "rank-stabilised", "patterns"],
)
@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_lora_is_added(small_directory: Path, tmp_path: Path, to: Layout, changes: dict, scale: dict) -> None:
    base = load_file(small_directory / "model.safetensors")
    directory = adapter(tmp_path, base, MODULES, **changes)
    lora = load_file(directory / "adapter_model.safetensors")
    convert(small_directory, tmp_path / "merged", to=to, lora=directory)
    if to == "orbax":
        convert(tmp_path / "merged", tmp_path / "hf", to="hf")
    merged = load_file(tmp_path / ("hf" if to == "orbax" else "merged") / "model.safetensors")
    for name, tensor in merged.items():
        expected, module = base[name].astype(np.float64), name.removesuffix(".weight")
        if module in MODULES:
            key = f"base_model.model.{renamed(module + '.') if 'new' in changes else module + '.'}"
            a, b = (lora[f"{key}lora_{half}.weight"].astype(np.float64) for half in "AB")
            expected = expected + scale.get(module, 1.5) * (b @ a)
            assert np.abs(expected - base[name]).max() > 1
        np.testing.assert_allclose(tensor, expected, rtol=1e-6, atol=1e-6)


def test_adapters_that_cannot_be_merged(small_directory: Path, tmp_path: Path) -> None:
    base = load_file(small_directory / "model.safetensors")

    def message(directory: Path) -> str:
        return fault(lambda: convert(small_directory, tmp_path / "target", to="hf", lora=directory))

    for i, (changes, expected) in enumerate(
        (
            ({"use_dora": True}, "use_dora=True cannot be merged; expected False"),
            ({"bias": "all"}, "bias='all' cannot be merged; expected 'none'"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head'] cannot be merged"),
            ({"peft_type": "IA3"}, "peft_type: expected 'LORA', got 'IA3'"),
            ({"lora_alpha": "8"}, "lora_alpha: expected a number, got '8'"),
        )
    ):
        (tmp_path / str(i)).mkdir()
        assert expected in message(adapter(tmp_path / str(i), base, MODULES[:1], **changes))
    directory = adapter(tmp_path, base, MODULES[:1])
    file = directory / "adapter_model.safetensors"
    key, a, b = f"base_model.model.{MODULES[0]}", np.ones((4, 64), np.float32), np.ones((64, 4), np.float32)
    for tensors, expected in (
        ({f"{key}.lora_A.weight": a}, "expected lora_A [rank, in] and lora_B [out, rank]"),
        ({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b[:, :2]}, "expected lora_A [rank, in] and lora_B"),
        ({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b[:8]}, "expected a change of [64, 64], got [8, 64]"),
        ({f"{key}.lora_embedding_A": a}, "cannot be merged; expected matrices lora_A and lora_B only"),
        (
            {
                "base_model.model.model.layers.9.x.lora_A.weight": a,
                "base_model.model.model.layers.9.x.lora_B.weight": b,
            },
            "adapts model.layers.9.x.weight, which this model has not; is it another model's adapter?",
        ),
    ):
        save_file(tensors, file)
        assert expected in message(directory)
    assert not (tmp_path / "target").exists()
