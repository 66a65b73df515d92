"""What a Llama 3.2 Vision model is made of: frozen, hashable configurations and the released sizes.

A configuration is read from Hugging Face's ``config.json`` (`from_hf`) or from Meta's ``params.json`` (`from_meta`).
Every key found there is used, known to say nothing about inference, or refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mllama_jax.errors import InputError

# The aspect ratios (height, width in tiles) behind the ids 1..8; id 0 is an absent image.
ASPECT_RATIOS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision encoder. `width` is D of the encoder, `tile` the side of a tile in pixels."""

    tile: int = 560
    patch: int = 14
    max_tiles: int = 4
    width: int = 1280
    layers: int = 32
    global_layers: int = 8
    heads: int = 16
    hidden: int = 5120
    taps: tuple[int, ...] = (3, 7, 15, 23, 30)
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def tokens(self) -> int:
        """Tokens a tile: one per patch and the class token."""
        return (self.tile // self.patch) ** 2 + 1

    @property
    def padded_tokens(self) -> int:
        """Tokens a tile inside the encoder, a multiple of 8."""
        return self.tokens + -self.tokens % 8

    @property
    def output_width(self) -> int:
        return self.width * (1 + len(self.taps))


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the rotary wavelengths (``apply_scaling`` in llama-models)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text decoder. `layers` counts self- and cross-attention layers, `cross_layers` are the latter's indices."""

    vocab: int = 128256
    extra_embeddings: int = 8
    width: int = 4096
    layers: int = 40
    cross_layers: tuple[int, ...] = (3, 8, 13, 18, 23, 28, 33, 38)
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    hidden: int = 14336
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = RopeScaling()
    context: int = 131072
    tied: bool = False

    @property
    def self_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.layers) if i not in self.cross_layers)


@dataclasses.dataclass(frozen=True)
class MllamaConfig:
    """The whole model; `vision` is None for a text-only Llama 3.1 or 3.2 decoder."""

    text: TextConfig = TextConfig()
    vision: VisionConfig | None = VisionConfig()
    bos: int = 128000
    pad: int = 128004
    stops: tuple[int, ...] = (128001, 128008, 128009)

    @property
    def image_token(self) -> int:
        """The id that embeds `<|image|>`: the first of the extra embedding rows."""
        return self.text.vocab

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> MllamaConfig:
        """Read Hugging Face's config.json (`config`) and, where there is one, generation_config.json (`generation`)."""
        return _from_hf(dict(config), dict(generation or {}))

    @classmethod
    def from_meta(cls, params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> MllamaConfig:
        """Read Meta's params.json (`params`); what it leaves out follows from the tensors' whole `shapes`, by name."""
        return _from_meta(dict(params), shapes)


_90B = TextConfig(width=8192, heads=64, hidden=28672, layers=100, cross_layers=tuple(range(3, 100, 5)))

DTYPES = ("bfloat16", "float32", "float16")  # that a model computes in
QUANTIZATIONS = ("int8", "int4", "int8-layers", "int4-layers")  # of the decoder's kernels, its head's too or not
CACHES = ("int8",)  # of keys and values

PRESETS = {
    "11b": MllamaConfig(vision=VisionConfig(tile=448)),
    "11b-instruct": MllamaConfig(),
    "90b": MllamaConfig(text=_90B),
    "90b-instruct": MllamaConfig(text=_90B),
    "guard-3-11b": MllamaConfig(),
}


# ---- Hugging Face -------------------------------------------------------------------------------------------------

# Keys that transformers writes and that change nothing in this model's inference.
_IRRELEVANT = frozenset(
    """
    _attn_implementation_autoset _name_or_path architectures add_cross_attention attn_implementation
    bad_words_ids begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label
    initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_scores prefix pretraining_tp problem_type pruned_heads remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers_version
    typical_p use_bfloat16 use_cache image_token_index
    """.split()  # noqa: SIM905
)


class _Keys:
    """A JSON object whose keys must all be taken: what is left in the end is refused by name."""

    def __init__(self, where: str, values: dict[str, Any]):
        self.where, self.values, self.left = where, dict(values), set(values) - _IRRELEVANT

    def take(self, key: str, *default: Any) -> Any:
        self.left.discard(key)
        if key in self.values:
            return self.values[key]
        if default:
            return default[0]
        raise InputError(f"{self.where}: key '{key}' is missing; is this the config of a Llama 3.2 Vision model?")

    def integer(self, key: str, *default: int) -> int:
        value = self.take(key, *default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise InputError(f"{self.where}: '{key}' must be a positive integer below 2**31, got {value!r}")
        return value

    def number(self, key: str, *default: float) -> float:
        value = self.take(key, *default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise InputError(f"{self.where}: '{key}' must be a positive number, got {value!r}")
        return float(value)

    def indices(self, key: str, below: int, *default: list[int]) -> tuple[int, ...]:
        """A list of different integers from 0 to `below`, in rising order."""
        value = self.take(key, *default)
        fits = isinstance(value, list) and all(type(i) is int and 0 <= i < below for i in value)
        if not fits or len(set(value)) != len(value):
            raise InputError(f"{self.where}: '{key}' must list different indices below {below}, got {value!r}")
        return tuple(sorted(value))

    def object(self, key: str) -> dict[str, Any]:
        """A JSON object; an empty one where there is none."""
        value = self.take(key, None)
        if value is not None and not isinstance(value, dict):
            raise InputError(f"{self.where}: '{key}' must be an object, got {value!r}")
        return dict(value or {})

    def expect(self, key: str, *allowed: Any) -> None:
        """Where `key` is present it must be one of `allowed`: other values belong to a model this is not."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            raise InputError(
                f"{self.where}: {key}={value!r} is not supported; expected {' or '.join(map(repr, allowed))}"
            )

    def close(self) -> None:
        if self.left:
            raise InputError(
                f"{self.where}: unknown keys {sorted(self.left)}; their meaning for this model is not known"
            )


def _from_hf(config: dict[str, Any], generation: dict[str, Any]) -> MllamaConfig:
    top = _Keys("config.json", config)
    kind = top.take("model_type", None)
    if kind == "llama":
        text, vision = _hf_text(top, multimodal=False), None
    elif kind == "mllama":
        nested = {name: top.take(name) for name in ("text_config", "vision_config")}
        for name, value in nested.items():
            if not isinstance(value, dict):
                raise InputError(f"config.json: '{name}' must be an object, got {type(value).__name__}")
        text_keys = _Keys("config.json: text_config", nested["text_config"])
        text_keys.expect("model_type", "mllama_text_model")
        text = _hf_text(text_keys, multimodal=True)
        text_keys.close()
        vision = _hf_vision(nested["vision_config"])
        image_token = config.get("image_token_index", text.vocab)
        if image_token != text.vocab:
            raise InputError(f"config.json: image_token_index={image_token} must be the vocabulary size {text.vocab}")
        top.expect("tie_word_embeddings", False)
        for key in _SPECIAL:
            top.take(key, None)
    else:
        raise InputError(f"config.json: model_type must be 'mllama' or 'llama' (text only), got {kind!r}")
    top.close()
    nested_text = config.get("text_config") or {}
    sources = {"config.json: text_config": nested_text, "config.json": config, "generation_config.json": generation}
    ids: dict[str, tuple[str, Any]] = {}
    for where, source in sources.items():  # the later, the more it counts
        ids |= {key: (where, source[key]) for key in _SPECIAL if source.get(key) is not None}
    return MllamaConfig(
        text,
        vision,
        bos=_special(ids, "bos_token_id", 128000, text)[0],
        pad=_special(ids, "pad_token_id", 128004, text)[0],
        stops=_special(ids, "eos_token_id", 128001, text),
    )


_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def _special(ids: Mapping[str, tuple[str, Any]], key: str, default: int, text: TextConfig) -> tuple[int, ...]:
    """The token ids under `key`, one or a list; `ids` has with each where it was found."""
    where, value = ids.get(key, ("", default))
    values = value if isinstance(value, list) else [value]
    if not values or not all(type(i) is int and (i == default or -1 <= i <= text.vocab) for i in values):
        raise InputError(f"{where}: '{key}' must be a token id below {text.vocab} or a list of them, got {value!r}")
    return tuple(values)


def _hf_text(keys: _Keys, multimodal: bool) -> TextConfig:
    rope = keys.object("rope_scaling") | keys.object("rope_parameters")
    rope.setdefault("rope_theta", keys.take("rope_theta", 500000.0))
    width, heads, layers = (
        keys.integer("hidden_size"),
        keys.integer("num_attention_heads"),
        keys.integer("num_hidden_layers"),
    )
    cross = keys.indices("cross_attention_layers", layers) if multimodal else ()
    kv_heads = keys.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise InputError(f"{keys.where}: {heads} attention heads do not divide into {kv_heads} key/value heads")
    keys.expect("hidden_act", "silu")
    keys.expect("attention_bias", False)
    keys.expect("mlp_bias", False)
    keys.expect("attention_dropout", 0.0, 0)
    keys.expect("dropout", 0.0, 0)
    for key in _SPECIAL:
        keys.take(key, None)
    if keys.values.get("head_dim") is None:
        keys.values["head_dim"] = width // heads
    return TextConfig(
        vocab=keys.integer("vocab_size"),
        extra_embeddings=8 if multimodal else 0,
        width=width,
        layers=layers,
        cross_layers=cross,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=keys.integer("head_dim"),
        hidden=keys.integer("intermediate_size"),
        norm_eps=keys.number("rms_norm_eps", 1e-5),
        rope_theta=_Keys(keys.where, rope).number("rope_theta"),
        rope_scaling=_rope_scaling(keys.where, rope),
        context=keys.integer("max_position_embeddings", 131072),
        tied=bool(keys.take("tie_word_embeddings", False)),
    )


def _rope_scaling(where: str, rope: dict[str, Any]) -> RopeScaling | None:
    keys = _Keys(f"{where}: rope", rope)
    keys.take("rope_theta", None)
    keys.take("type", None)
    kind = keys.take("rope_type", rope.get("type", "default"))
    if kind == "default":
        keys.close()
        return None
    if kind != "llama3":
        raise InputError(f"{where}: rope type {kind!r} is not supported; expected 'llama3' or 'default'")
    scaling = RopeScaling(
        factor=keys.number("factor"),
        low_freq_factor=keys.number("low_freq_factor"),
        high_freq_factor=keys.number("high_freq_factor"),
        original_context=keys.integer("original_max_position_embeddings"),
    )
    keys.close()
    return scaling


def _hf_vision(values: dict[str, Any]) -> VisionConfig:
    keys = _Keys("config.json: vision_config", values)
    keys.expect("model_type", "mllama_vision_model")
    keys.expect("hidden_act", "gelu")
    keys.expect("num_channels", 3)
    keys.expect("attention_dropout", 0.0, 0)
    ratios = keys.take("supported_aspect_ratios", None)
    if ratios is not None and ratios != [list(ratio) for ratio in ASPECT_RATIOS]:
        raise InputError(
            f"{keys.where}: supported_aspect_ratios must be {[list(r) for r in ASPECT_RATIOS]}, got {ratios}"
        )
    vision = VisionConfig(
        tile=keys.integer("image_size", 448),
        patch=keys.integer("patch_size", 14),
        max_tiles=keys.integer("max_num_tiles", 4),
        width=keys.integer("hidden_size", 1280),
        layers=keys.integer("num_hidden_layers", 32),
        global_layers=keys.integer("num_global_layers", 8),
        heads=keys.integer("attention_heads", keys.integer("num_attention_heads", 16)),
        hidden=keys.integer("intermediate_size", 5120),
        taps=keys.indices("intermediate_layers_indices", keys.integer("num_hidden_layers", 32), [3, 7, 15, 23, 30]),
        norm_eps=keys.number("norm_eps", 1e-5),
    )
    output = keys.take("vision_output_dim", vision.output_width)
    if output != vision.output_width:
        raise InputError(
            f"{keys.where}: vision_output_dim must be {vision.output_width} ({len(vision.taps)} taps), got {output}"
        )
    _check_vision(keys.where, vision)
    keys.close()
    return vision


def _check_vision(where: str, vision: VisionConfig) -> None:
    if vision.tile % vision.patch or vision.width % vision.heads:
        raise InputError(
            f"{where}: tiles of {vision.tile} pixels must divide into patches of {vision.patch}, "
            f"and width {vision.width} into {vision.heads} heads"
        )
    if vision.max_tiles != 4:
        raise InputError(f"{where}: max_num_tiles must be 4, got {vision.max_tiles}")


# ---- Meta ---------------------------------------------------------------------------------------------------------


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """How many blocks `prefix0`, `prefix1`, ... there are among the tensor names."""
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})


def _from_meta(params: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> MllamaConfig:
    keys = _Keys("params.json", params)
    width, heads, layers = keys.integer("dim"), keys.integer("n_heads"), keys.integer("n_layers")
    crossed = keys.take("vision_num_cross_attention_layers", None)
    if not isinstance(crossed, int) or not 0 < crossed <= layers:
        raise InputError(
            f"params.json: vision_num_cross_attention_layers must lie in 1..{layers}, got {crossed!r}; "
            "a text-only release is read in Hugging Face's layout"
        )
    vocab = keys.integer("vocab_size")
    if keys.values.get("ffn_dim_multiplier") is None:
        keys.values["ffn_dim_multiplier"] = 1.0
    hidden = int(keys.number("ffn_dim_multiplier") * int(2 * 4 * width / 3))
    if width % heads or heads % keys.integer("n_kv_heads", heads):
        raise InputError(f"params.json: dim {width} must divide into n_heads {heads}, and these into n_kv_heads")
    multiple = keys.integer("multiple_of", 256)
    text = TextConfig(
        vocab=vocab,
        extra_embeddings=8,
        width=width,
        layers=layers + crossed,
        cross_layers=fusion_schedule(layers, crossed),
        heads=heads,
        kv_heads=keys.integer("n_kv_heads", heads),
        head_dim=width // heads,
        hidden=multiple * -(-hidden // multiple),
        norm_eps=keys.number("norm_eps", 1e-5),
        rope_theta=keys.number("rope_theta", 500000.0),
        rope_scaling=RopeScaling() if keys.take("use_scaled_rope", False) else None,
    )
    override = _Keys("params.json: vision", keys.object("vision"))
    encoder = "vision_model.vision_encoder."
    try:
        patch_in = shapes[encoder + "conv1._linear.weight"]
        c_fc = shapes[encoder + "transformer.resblocks.0.mlp.c_fc.weight"]
    except KeyError as missing:
        raise InputError(f"params.json: tensor {missing}, which gives the vision tower's size, is missing") from None
    patch = math.isqrt(patch_in[1] // 3)
    layers_seen = _count(shapes, encoder + "transformer.resblocks.")
    vision = VisionConfig(
        tile=keys.integer("vision_chunk_size"),
        patch=patch,
        max_tiles=keys.integer("vision_max_num_chunks", 4),
        width=patch_in[0],
        layers=layers_seen,
        global_layers=_count(shapes, encoder + "global_transformer.resblocks."),
        heads=override.integer("heads", 16),
        hidden=c_fc[0],
        taps=override.indices("taps", layers_seen, [3, 7, 15, 23, 30]),
    )
    _check_vision("params.json", vision)
    override.close()
    keys.take("model", None)
    keys.close()
    first_special = vocab - 256  # Llama 3's 256 special tokens end the vocabulary
    return MllamaConfig(
        text, vision, bos=first_special, pad=first_special + 4, stops=tuple(first_special + i for i in (1, 8, 9))
    )


def fusion_schedule(layers: int, crossed: int) -> tuple[int, ...]:
    """Where the cross-attention layers stand, counting both kinds (``_init_fusion_schedule`` in llama-models)."""
    before = list(range(layers))[::-1][:: math.ceil(layers / crossed)][:crossed][::-1]
    return tuple(position + earlier for earlier, position in enumerate(before))
