"""The toy weights in transformers' own model, by a conversion that shares nothing with `mllama_jax.convert`.

Runs under transformers 4.54 and 5.x. Needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama import modeling_mllama

from tests.parity import Array, Case, spans
from tests.toy import GLOBAL_BLOCKS, LOCAL_BLOCKS, MAX_TILES, TAPS

if transformers.__version__ >= "5":
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil as ImageProcessor
else:
    from transformers.models.mllama.image_processing_mllama import MllamaImageProcessor as ImageProcessor

RATIOS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))  # (height, width) of ids 1 to 8
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
State = dict[str, Array]


def build(params: Mapping[str, Any], weights: Mapping[str, Array]) -> MllamaForConditionalGeneration:
    """transformers' model with all of `weights`, and nothing but these, loaded."""
    model = MllamaForConditionalGeneration(config(params, weights))
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in state(params, weights).items()})
    return model.eval()


def config(params: Mapping[str, Any], weights: Mapping[str, Array]) -> MllamaConfig:
    width = weights["vision_model.vision_encoder.class_embedding"].size
    layers, crossed, vocab = params["n_layers"], params["vision_num_cross_attention_layers"], params["vocab_size"]
    ids = {"bos_token_id": vocab - 256, "eos_token_id": vocab - 255, "pad_token_id": vocab - 252}
    text = {
        "vocab_size": vocab,
        "hidden_size": params["dim"],
        "num_hidden_layers": layers + crossed,
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params["n_kv_heads"],
        "intermediate_size": len(weights["text_model.layers.0.feed_forward.w1.weight"]),
        "cross_attention_layers": _cross_layers(params),
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params["rope_theta"],
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": LOCAL_BLOCKS,
        "num_global_layers": GLOBAL_BLOCKS,
        "attention_heads": 16,
        "image_size": params["vision_chunk_size"],
        "intermediate_layers_indices": list(TAPS),
        "vision_output_dim": width * (1 + len(TAPS)),
    }
    return MllamaConfig(text_config=text | ids, vision_config=vision, image_token_index=vocab)


def _cross_layers(params: Mapping[str, Any]) -> list[int]:
    """Where the cross-attention layers of the toy stand among all: before every fourth self-attention layer."""
    return [5 * i + 3 for i in range(params["vision_num_cross_attention_layers"])]


# ---- Weights ------------------------------------------------------------------------------------------------------


def state(params: Mapping[str, Any], weights: Mapping[str, Array]) -> State:
    """The weights under transformers' names and in its shapes."""
    text = {name.removeprefix("text_model."): a for name, a in weights.items() if name.startswith("text_model.")}
    encoder = "vision_model.vision_encoder."
    vision = {name.removeprefix(encoder): array for name, array in weights.items() if name.startswith(encoder)}
    projection = "vision_model.vision_projection."
    return {
        **_under("model.vision_model", _vision_state(vision)),
        **_under("model.language_model", _text_state(text, params)),
        "model.multi_modal_projector.weight": weights[projection + "weight"],
        "model.multi_modal_projector.bias": weights[projection + "bias"],
        "lm_head.weight": text["output.weight"],
    }


def _under(prefix: str, arrays: Mapping[str, Array]) -> State:
    return {f"{prefix}.{name}": array for name, array in arrays.items()}


def _vision_state(meta: Mapping[str, Array]) -> State:
    width = meta["class_embedding"].size
    arrays = {
        "class_embedding": meta["class_embedding"],
        "patch_embedding.weight": meta["conv1._linear.weight"].reshape(width, 3, 14, 14),
        "gated_positional_embedding.embedding": meta["positional_embedding"],
        "gated_positional_embedding.gate": meta["gated_positional_embedding_gate"],
        "gated_positional_embedding.tile_embedding.weight": _by_ratio(meta["gated_positional_embedding"]),
    }
    for where in ("pre", "post"):
        arrays[f"{where}_tile_positional_embedding.embedding.weight"] = _by_ratio(
            meta[f"{where}_tile_pos_embed.embedding"]
        )
        arrays[f"{where}_tile_positional_embedding.gate"] = meta[f"{where}_tile_pos_embed.gate"]
        for part in ("weight", "bias"):
            arrays[f"layernorm_{where}.{part}"] = meta[f"ln_{where}.{part}"]
    modules = {f"attn.w{letter}": f"self_attn.{letter}_proj" for letter in "qkvo"}
    modules |= {
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
    }
    for name, array in meta.items():
        tower, found, rest = name.partition(".resblocks.")
        if found:
            number, _, parameter = rest.partition(".")
            module, _, part = parameter.rpartition(".")
            target = f"{modules[module]}.{part}" if module else parameter
            arrays[f"{tower}.layers.{number}.{target}"] = array
    return arrays


def _by_ratio(table: Array) -> Array:
    """Meta's [4, 4, n, D], rows and columns of tiles -> [9, 4 * n * D], one row for each aspect ratio id."""
    rows = np.zeros((len(RATIOS) + 1, MAX_TILES, *table.shape[2:]), np.float32)
    for i, (h, w) in enumerate(RATIOS, 1):
        rows[i, : h * w] = table[:h, :w].reshape(h * w, *table.shape[2:])
    return rows.reshape(len(rows), -1)


def _text_state(meta: Mapping[str, Array], params: Mapping[str, Any]) -> State:
    cross = _cross_layers(params)
    selves = [i for i in range(params["n_layers"] + len(cross)) if i not in cross]
    arrays = {
        "embed_tokens.weight": np.concatenate([meta["tok_embeddings.weight"], meta["learnable_embedding.weight"]]),
        "norm.weight": meta["norm.weight"],
    }
    modules = {
        **{f"attention.w{letter}": f"{letter}_proj" for letter in "qkvo"},
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for i, layer in enumerate(selves):
        for source, target in modules.items():
            array = meta[f"layers.{i}.{source}.weight"]
            if target in ("q_proj", "k_proj"):
                array = _halves(array, params["dim"] // params["n_heads"])
            target = f"self_attn.{target}" if source.startswith("attention.") else target
            arrays[f"layers.{layer}.{target}.weight"] = array
    modules |= {"attention.q_norm": "q_norm", "attention.k_norm": "k_norm"}
    for i, layer in enumerate(cross):
        for source, target in modules.items():
            target = f"cross_attn.{target}" if source.startswith("attention.") else target
            arrays[f"layers.{layer}.{target}.weight"] = meta[f"cross_attention_layers.{i}.{source}.weight"]
        for source, target in (("gate_attn", "cross_attn_attn_gate"), ("gate_ffwd", "cross_attn_mlp_gate")):
            arrays[f"layers.{layer}.{target}"] = meta[f"cross_attention_layers.{i}.{source}"]
    return arrays


def _halves(projection: Array, head_dim: int) -> Array:
    """Reorder each head's rows from rotary pairs side by side to first members, then second ones."""
    pairs = projection.reshape(-1, head_dim // 2, 2, projection.shape[1])
    return pairs.swapaxes(1, 2).reshape(projection.shape)


# ---- Running ------------------------------------------------------------------------------------------------------


def tap_inputs(model: MllamaForConditionalGeneration) -> None:
    """Let the projector see the inputs of the tapped vision blocks, as in Meta's code and transformers up to 4.54.

    From 4.56 on `hidden_states` begins with the first block's output, and the same indices name a block later.
    """
    encoder = model.model.vision_model.transformer

    def prepend_input(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        output.hidden_states = (
            kwargs["hidden_states"] if "hidden_states" in kwargs else args[0],
            *output.hidden_states,
        )

    encoder.register_forward_hook(prepend_input, with_kwargs=True)


def mask_rows(model: MllamaForConditionalGeneration) -> None:
    """Zero both branches of cross-attention for tokens that may see no image; transformers zeroes the MLP's only."""
    for layer in model.model.language_model.layers:
        if isinstance(layer, modeling_mllama.MllamaCrossAttentionDecoderLayer):
            _mask_rows_of(layer)


def _mask_rows_of(layer: modeling_mllama.MllamaCrossAttentionDecoderLayer) -> None:
    masks = []

    def remember(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        masks[:] = [kwargs["full_text_row_masked_out_mask"][:, 0]]

    def mask(module: torch.nn.Module, args: tuple, output: tuple) -> tuple:
        return output[0] * masks[0], *output[1:]

    layer.register_forward_pre_hook(remember, with_kwargs=True)
    layer.cross_attn.register_forward_hook(mask)


def preprocess(images: list[list[Image.Image]], tile: int) -> dict[str, Any]:
    processor = ImageProcessor(size={"height": tile, "width": tile}, max_image_tiles=MAX_TILES, **CLIP)
    return dict(processor(images, return_tensors="pt"))


@torch.no_grad()
def features(model: MllamaForConditionalGeneration, case: Case) -> Array:
    """Projected vision features [images that are present, C, N, D]."""
    rows = [[image] for row in case.images for image in row]  # transformers 4 takes no rows without images
    inputs = preprocess(rows, case.tile)
    tower = {name: inputs[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    states = model.model.vision_model(**tower).last_hidden_state
    return model.model.multi_modal_projector(states)[:, 0].numpy()


@torch.no_grad()
def logits(model: MllamaForConditionalGeneration, case: Case) -> Array:
    """Logits [B, T, V] of a case whose rows are equally long."""
    inputs, tokens = preprocess(case.images, case.tile), np.stack(case.tokens)
    tiles = inputs.pop("num_tiles")
    sees = torch.zeros(*tokens.shape, inputs["pixel_values"].shape[1], MAX_TILES)
    for b, row in enumerate(tokens):
        for i, (start, end) in enumerate(spans(row, case.params["vocab_size"])):
            sees[b, start : end if end >= 0 else None, i, : tiles[b][i]] = 1
    return model(input_ids=torch.from_numpy(tokens), cross_attention_mask=sees, **inputs).logits.numpy()
