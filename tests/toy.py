"""A toy Llama 3.2 Vision in Meta's release layout, from NumPy alone: the weights and pictures that tests share.

Widths, tile, text depth and vocabulary are small; the vision tower keeps the real depth (32 + 8 blocks), heads (16) and
taps. Every tensor has a random generator of its own, keyed by its name, so weights depend neither on the order in which
they are made nor on which others exist.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray
Shapes = dict[str, tuple[int, ...]]

PATCH = 14
MAX_TILES = 4
LOCAL_BLOCKS, GLOBAL_BLOCKS = 32, 8
TAPS = (3, 7, 15, 23, 30)
STOPS = (1, 8, 9)  # offsets into the 256 special ids that end the vocabulary


def toy_params(tile: int = 84, kv_heads: int = 2, **changes: Any) -> dict[str, Any]:
    """Meta's params.json of the toy: tiles of `tile` pixels, `kv_heads` key/value heads for 8 query heads."""
    params = {
        "dim": 128,
        "n_layers": 8,
        "n_heads": 8,
        "n_kv_heads": kv_heads,
        "vocab_size": 512,
        "ffn_dim_multiplier": 1.3,
        "multiple_of": 32,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
        "vision_chunk_size": tile,
        "vision_max_num_chunks": MAX_TILES,
        "vision_num_cross_attention_layers": 2,
    }
    return params | changes


def toy_shapes(params: Mapping[str, Any], width: int = 64) -> Shapes:
    """Meta's tensor names and shapes for `params` and a vision encoder of the given `width`."""
    return _vision_shapes(params, width) | _text_shapes(params)


def _vision_shapes(params: Mapping[str, Any], width: int) -> Shapes:
    tokens = (params["vision_chunk_size"] // PATCH) ** 2 + 1
    norm = {"weight": (width,), "bias": (width,)}
    block = {
        **{f"attn.w{name}.weight": (width, width) for name in "qkvo"},
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
        **_under("ln_1", norm),
        **_under("ln_2", norm),
    }
    gated = block | {"gate_attn": (1,), "gate_ffn": (1,)}
    tile_embedding = {"embedding": (MAX_TILES, MAX_TILES, 1, width), "gate": (1,)}
    encoder = {
        "conv1._linear.weight": (width, 3 * PATCH * PATCH),
        "class_embedding": (width,),
        "positional_embedding": (tokens, width),
        "gated_positional_embedding": (MAX_TILES, MAX_TILES, tokens, width),
        "gated_positional_embedding_gate": (1,),
        **_under("pre_tile_pos_embed", tile_embedding),
        **_under("post_tile_pos_embed", tile_embedding),
        **_under("ln_pre", norm),
        **_under("ln_post", norm),
    }
    for i in range(LOCAL_BLOCKS):
        encoder |= _under(f"transformer.resblocks.{i}", block)
    for i in range(GLOBAL_BLOCKS):
        encoder |= _under(f"global_transformer.resblocks.{i}", gated)
    projection = {"weight": (params["dim"], width * (1 + len(TAPS))), "bias": (params["dim"],)}
    return _under("vision_model.vision_encoder", encoder) | _under("vision_model.vision_projection", projection)


def _text_shapes(params: Mapping[str, Any]) -> Shapes:
    width, vocab, multiple = params["dim"], params["vocab_size"], params["multiple_of"]
    hidden = multiple * -(-int(params["ffn_dim_multiplier"] * int(8 * width / 3)) // multiple)
    head_dim = width // params["n_heads"]
    kv_width = params["n_kv_heads"] * head_dim
    block = {
        "attention.wq.weight": (width, width),
        "attention.wk.weight": (kv_width, width),
        "attention.wv.weight": (kv_width, width),
        "attention.wo.weight": (width, width),
        "feed_forward.w1.weight": (hidden, width),
        "feed_forward.w2.weight": (width, hidden),
        "feed_forward.w3.weight": (hidden, width),
        "attention_norm.weight": (width,),
        "ffn_norm.weight": (width,),
    }
    cross = block | {
        "attention.q_norm.weight": (head_dim,),
        "attention.k_norm.weight": (head_dim,),
        "gate_attn": (1,),
        "gate_ffwd": (1,),
    }
    text = {
        "tok_embeddings.weight": (vocab, width),
        "learnable_embedding.weight": (8, width),
        "norm.weight": (width,),
        "output.weight": (vocab, width),
    }
    for i in range(params["n_layers"]):
        text |= _under(f"layers.{i}", block)
    for i in range(params["vision_num_cross_attention_layers"]):
        text |= _under(f"cross_attention_layers.{i}", cross)
    return _under("text_model", text)


def _under(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def toy_weights(params: Mapping[str, Any], width: int = 64, seed: int = 0) -> dict[str, Array]:
    """Float32 weights by Meta's names. Activations keep unit scale, every gate is open, greedy decoding never stops."""
    weights = {name: _tensor(name, shape, seed) for name, shape in toy_shapes(params, width).items()}
    # A stop id's logit is 0, far below the largest of 512 of unit variance.
    weights["text_model.output.weight"][[params["vocab_size"] - 256 + i for i in STOPS]] = 0
    return weights


def _tensor(name: str, shape: tuple[int, ...], seed: int) -> Array:
    normal = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    if shape == (1,):  # a gate, before its tanh
        values = 0.4 + 0.1 * normal
    elif name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_pre.weight", "ln_post.weight")):
        values = 1 + 0.1 * normal
    elif len(shape) == 1:
        values = 0.1 * normal
    elif "_embeddings" in name or "learnable" in name:  # as large as what layers add, so that each token tells
        values = normal
    else:
        values = normal / math.sqrt(shape[-1])
    return values.astype(np.float32)


def write_meta_release(
    directory: Path, params: Mapping[str, Any], weights: Mapping[str, Array], shards: int = 1
) -> Path:
    """Write consolidated.NN.pth and params.json as Meta releases them, split over `shards` model-parallel ranks."""
    from mllama_jax.convert.pth import write_pth  # here, not above: old transformers' environment has no JAX
    from mllama_jax.convert.sources import meta_split

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "params.json").write_text(json.dumps(dict(params)))
    for rank in range(shards):
        part = {}
        for name, whole in weights.items():
            dim = meta_split(name)
            part[name] = whole if dim is None else np.split(whole, shards, dim)[rank]
        write_pth(directory / f"consolidated.{rank:02d}.pth", part)
    return directory


def toy_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of coloured 8-pixel squares under pixel noise."""
    rng = np.random.default_rng([seed, width, height])
    squares = rng.random((-(-height // 8), -(-width // 8), 3)).repeat(8, 0).repeat(8, 1)[:height, :width]
    return Image.fromarray((squares * 200 + rng.random((height, width, 3)) * 55).astype(np.uint8))
