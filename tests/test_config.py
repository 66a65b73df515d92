"""Configurations: released sizes, both generations of Hugging Face's keys, and what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from mllama_jax import MllamaConfig
from mllama_jax.config import PRESETS, RopeScaling
from mllama_jax.convert.export import hf_config
from mllama_jax.errors import InputError
from mllama_jax.model.mllama import MllamaModel, abstract_parameters, call

COUNTS = {"11b": 10.643, "11b-instruct": 10.670, "90b": 88.593, "90b-instruct": 88.593, "guard-3-11b": 10.670}


@pytest.mark.parametrize(("preset", "billions"), COUNTS.items())
def test_parameter_counts(preset: str, billions: float) -> None:
    leaves = jax.tree.leaves(abstract_parameters(PRESETS[preset]))
    assert round(sum(math.prod(leaf.shape) for leaf in leaves) / 1e9, 3) == billions


def test_the_90b_traces_at_full_size() -> None:
    config = PRESETS["90b-instruct"]
    model = MllamaModel(config, jnp.dtype("bfloat16"))
    assert config.vision is not None
    vision = config.vision

    def answer(params: dict, pixels: jax.Array, tokens: jax.Array) -> jax.Array:
        features = call(model, params, "encode", pixels, jnp.full(2, 6))
        cross = call(model, params, "keys_values", features, jnp.zeros((2, 4, 2), jnp.int32))
        cache = model.empty_cache(2, 64)
        x, _ = call(model, params, "__call__", tokens, jnp.broadcast_to(jnp.arange(32), (2, 32)), cache, cross)
        return call(model, params, "logits", x)

    params = nn.unbox(abstract_parameters(config))
    pixels = jax.ShapeDtypeStruct((2, 4, 3, vision.tile, vision.tile), jnp.float32)
    logits = jax.eval_shape(answer, params, pixels, jax.ShapeDtypeStruct((2, 32), jnp.int32))
    assert (logits.shape, logits.dtype) == ((2, 32, 128256), jnp.float32)


# What config.json of the 11B Instruct says where it is not a default, as transformers 4.45 wrote it.
OLD: dict[str, Any] = {
    "architectures": ["MllamaForConditionalGeneration"],
    "image_token_index": 128256,
    "model_type": "mllama",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "text_config": {
        "_name_or_path": "",
        "add_cross_attention": False,
        "bos_token_id": 128000,
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
        "dropout": 0,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "model_type": "mllama_text_model",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "pad_token_id": 128004,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
    },
    "vision_config": {
        "attention_heads": 16,
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "image_size": 560,
        "intermediate_layers_indices": [3, 7, 15, 23, 30],
        "intermediate_size": 5120,
        "max_num_tiles": 4,
        "model_type": "mllama_vision_model",
        "norm_eps": 1e-05,
        "num_channels": 3,
        "num_global_layers": 8,
        "num_hidden_layers": 32,
        "patch_size": 14,
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        "vision_output_dim": 7680,
    },
}


def newer() -> dict[str, Any]:
    """The same as transformers 5 writes it."""
    config = copy.deepcopy(OLD)
    config["dtype"] = config.pop("torch_dtype")
    text = config["text_config"]
    text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    text["dtype"] = text.pop("torch_dtype")
    return config


@pytest.mark.parametrize("config", [OLD, newer()], ids=["4.45", "5"])
def test_both_generations_of_keys(config: dict[str, Any]) -> None:
    assert MllamaConfig.from_hf(config) == PRESETS["11b-instruct"]


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_written_reads_the_same(preset: str) -> None:
    assert MllamaConfig.from_hf(hf_config(PRESETS[preset], "bfloat16")) == PRESETS[preset]


LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": OLD["text_config"]["rope_scaling"] | {"factor": 32.0},
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
}


def test_text_only_llama_is_the_same_decoder_without_cross_layers() -> None:
    config = MllamaConfig.from_hf(LLAMA)
    assert config.vision is None
    assert (config.text.cross_layers, config.text.tied, config.text.extra_embeddings) == ((), True, 0)
    assert config.text.rope_scaling == RopeScaling(factor=32.0)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_parameters(config)))
    assert round(count / 1e9, 3) == 1.236  # Llama 3.2 1B


@pytest.mark.parametrize("generation", [{"eos_token_id": None}, {}])
def test_a_missing_stop_token_is_the_models(generation: dict[str, Any]) -> None:
    assert MllamaConfig.from_hf(OLD, generation).stops == (128001, 128008, 128009)
    assert MllamaConfig.from_hf(LLAMA | {"eos_token_id": None}).stops == (128001,)


def test_a_bad_id_is_blamed_on_its_file() -> None:
    with pytest.raises(InputError, match=r"^generation_config.json: 'eos_token_id' must be a token id below 128256"):
        MllamaConfig.from_hf(OLD, {"eos_token_id": 128257})


def changed(where: str, **values: Any) -> dict[str, Any]:
    config = copy.deepcopy(OLD)
    (config[where] if where else config).update(values)
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen2_vl"}, "model_type must be 'mllama' or 'llama' (text only), got 'qwen2_vl'"),
        ({}, "model_type must be 'mllama' or 'llama' (text only), got None"),
        (changed("text_config", sliding_window=4096), "text_config: unknown keys ['sliding_window']"),
        (changed("text_config", hidden_act="gelu"), "hidden_act='gelu' is not supported; expected 'silu'"),
        (changed("text_config", hidden_size=-1), "'hidden_size' must be a positive integer below 2**31, got -1"),
        (
            changed("text_config", hidden_size="4096"),
            "'hidden_size' must be a positive integer below 2**31, got '4096'",
        ),
        (changed("text_config", rms_norm_eps=float("nan")), "'rms_norm_eps' must be a positive number, got nan"),
        (changed("text_config", num_key_value_heads=7), "32 attention heads do not divide into 7 key/value heads"),
        (
            changed("text_config", cross_attention_layers=[3, 40]),
            "'cross_attention_layers' must list different indices below 40",
        ),
        (changed("text_config", cross_attention_layers=None), "must list different indices below 40, got None"),
        (changed("text_config", rope_scaling="llama3"), "'rope_scaling' must be an object, got 'llama3'"),
        (changed("text_config", rope_theta="x"), "'rope_theta' must be a positive number, got 'x'"),
        (changed("text_config", rope_theta=10**400), "'rope_theta' must be a positive number"),
        (changed("text_config", head_dim="64"), "'head_dim' must be a positive integer below 2**31, got '64'"),
        (
            changed("text_config", eos_token_id="</s>"),
            "config.json: text_config: 'eos_token_id' must be a token id below 128256",
        ),
        (changed("vision_config", intermediate_layers_indices=None), "must list different indices below 32, got None"),
        (changed("text_config", rope_scaling={"rope_type": "yarn"}), "rope type 'yarn' is not supported"),
        (changed("vision_config", hidden_act="quick_gelu"), "hidden_act='quick_gelu' is not supported"),
        (changed("vision_config", image_size=555), "tiles of 555 pixels must divide into patches of 14"),
        (changed("vision_config", vision_output_dim=1280), "vision_output_dim must be 7680 (5 taps), got 1280"),
        (changed("vision_config", supported_aspect_ratios=[[1, 1]]), "supported_aspect_ratios must be"),
        (changed("vision_config", max_num_tiles=6), "max_num_tiles must be 4, got 6"),
        (changed("", image_token_index=5), "image_token_index=5 must be the vocabulary size 128256"),
        (changed("", tie_word_embeddings=True), "tie_word_embeddings=True is not supported"),
        (changed("", vision_config=[]), "'vision_config' must be an object, got list"),
    ],
)
def test_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        MllamaConfig.from_hf(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
