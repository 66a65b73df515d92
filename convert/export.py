"""Our parameters as checkpoint directories in Hugging Face's or Meta's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mllama_jax.config import ASPECT_RATIOS, MllamaConfig, RopeScaling, TextConfig, VisionConfig, fusion_schedule
from mllama_jax.convert.apply import from_tree, tensors
from mllama_jax.convert.pth import write_pth
from mllama_jax.convert.safetensors import write_safetensors
from mllama_jax.errors import InputError
from mllama_jax.model.mllama import Params


def write_hf(directory: Path, params: Params, config: MllamaConfig, dtype: np.dtype) -> None:
    """Write config.json, generation_config.json, preprocessor_config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    made = tensors(from_tree(params, dtype), config, "hf")
    write_safetensors(directory / "model.safetensors", made, {"format": "pt"})
    for name, content in hf_files(config, dtype.name).items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


def write_meta(directory: Path, params: Params, config: MllamaConfig, dtype: np.dtype, shards: int = 1) -> None:
    """Write params.json and consolidated.00.pth, ... split over `shards` model-parallel files."""
    if shards not in (1, 2, 4, 8):
        raise InputError(f"shards must be 1, 2, 4 or 8, got {shards}")
    content = json.dumps(meta_params(config), indent=1)
    directory.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        part = tensors(from_tree(params, dtype), config, "meta", shard=shard, shards=shards)
        write_pth(directory / f"consolidated.{shard:02d}.pth", part)
    (directory / "params.json").write_text(content + "\n")


def hf_files(config: MllamaConfig, dtype: str) -> dict[str, dict[str, Any]]:
    """The JSON files of Hugging Face's layout, by name."""
    files = {"config.json": hf_config(config, dtype), "generation_config.json": hf_generation_config(config)}
    if config.vision is not None:
        files["preprocessor_config.json"] = hf_preprocessor_config(config.vision)
    return files


def hf_config(config: MllamaConfig, dtype: str) -> dict[str, Any]:
    """config.json with the keys that transformers read before and after 4.52."""
    ids = {"bos_token_id": config.bos, "eos_token_id": list(config.stops), "pad_token_id": config.pad}
    if config.vision is None:
        head = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": dtype}
        return head | _hf_text(config.text) | ids
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "torch_dtype": dtype,
        "image_token_index": config.image_token,
        "text_config": {"model_type": "mllama_text_model"} | _hf_text(config.text) | ids,
        "vision_config": _hf_vision(config.vision),
    }


def _hf_text(c: TextConfig) -> dict[str, Any]:
    rope = None
    if c.rope_scaling is not None:
        rope = {
            "rope_type": "llama3",
            "factor": c.rope_scaling.factor,
            "low_freq_factor": c.rope_scaling.low_freq_factor,
            "high_freq_factor": c.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": c.rope_scaling.original_context,
        }
    text = {
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "intermediate_size": c.hidden,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": rope,
        "max_position_embeddings": c.context,
        "tie_word_embeddings": c.tied,
    }
    if c.cross_layers:
        text["cross_attention_layers"] = list(c.cross_layers)
    if c.head_dim * c.heads != c.width:
        text["head_dim"] = c.head_dim
    return text


def _hf_vision(c: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": "mllama_vision_model",
        "hidden_size": c.width,
        "image_size": c.tile,
        "patch_size": c.patch,
        "num_channels": 3,
        "max_num_tiles": c.max_tiles,
        "num_hidden_layers": c.layers,
        "num_global_layers": c.global_layers,
        "attention_heads": c.heads,
        "intermediate_size": c.hidden,
        "hidden_act": "gelu",
        "intermediate_layers_indices": list(c.taps),
        "vision_output_dim": c.output_width,
        "norm_eps": c.norm_eps,
        "supported_aspect_ratios": [list(ratio) for ratio in ASPECT_RATIOS],
    }


def hf_generation_config(config: MllamaConfig) -> dict[str, Any]:
    ids = {"bos_token_id": config.bos, "eos_token_id": list(config.stops), "pad_token_id": config.pad}
    return ids | {"do_sample": False}


def hf_preprocessor_config(c: VisionConfig) -> dict[str, Any]:
    return {
        "image_processor_type": "MllamaImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_image_tiles": c.max_tiles,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": c.tile, "width": c.tile},
    }


def meta_params(config: MllamaConfig) -> dict[str, Any]:
    """params.json; the `vision` object is there only where heads or taps differ from those of the release."""
    c, v = config.text, config.vision
    if v is None:
        raise InputError("Meta's layout is that of the vision models; write a text-only model in Hugging Face's")
    params: dict[str, Any] = {
        "dim": c.width,
        "n_layers": len(c.self_layers),
        "n_heads": c.heads,
        "n_kv_heads": c.kv_heads,
        "vocab_size": c.vocab,
        # hidden = multiple_of * ceil(int(ffn_dim_multiplier * int(8 / 3 * dim)) / multiple_of)
        "ffn_dim_multiplier": c.hidden / int(8 * c.width / 3),
        "multiple_of": 2,
        "norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "use_scaled_rope": c.rope_scaling is not None,
        "vision_chunk_size": v.tile,
        "vision_max_num_chunks": v.max_tiles,
        "vision_num_cross_attention_layers": len(c.cross_layers),
    }
    if (v.heads, v.taps) != (VisionConfig.heads, VisionConfig.taps):
        params["vision"] = {"heads": v.heads, "taps": list(v.taps)}
    if fusion_schedule(len(c.self_layers), len(c.cross_layers)) != c.cross_layers:
        raise InputError(f"Meta's layout spreads cross-attention layers evenly; it cannot hold {list(c.cross_layers)}")
    expressible = {
        "rope_scaling": (c.rope_scaling, RopeScaling() if c.rope_scaling else None),
        "hidden": (c.hidden, c.hidden + c.hidden % 2),
        "tied": (c.tied, False),
        "head_dim": (c.head_dim, c.width // c.heads),
        "vision norm_eps": (v.norm_eps, VisionConfig.norm_eps),
    }
    for field, (ours, theirs) in expressible.items():
        if ours != theirs:
            raise InputError(f"Meta's layout cannot hold {field} {ours}; it would be read as {theirs}")
    return params
