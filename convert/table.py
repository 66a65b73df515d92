"""One row a tensor: what it is called in each PyTorch layout, where it lies in ours, and how the axes map.

A layout is an einops pattern from one source tensor to one part of ours, read left to right when loading and right to
left when writing. Where ours fuses several tensors, `stack` or `concat` says how the parts meet. The table is a
function of a configuration because layer numbers and head counts are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from mllama_jax.config import MllamaConfig, TextConfig, VisionConfig
from mllama_jax.model.quantize import is_quantized

Layout = Literal["hf", "meta", "orbax"]


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors of one layout that make one of ours.

    Attributes:
        names: one name a part.
        pattern: einops pattern from a source tensor to a part; one for all parts or one each.
        stack: the new axis on which several parts are stacked.
        concat: the parts' lengths along axis 0, where they are concatenated.
        grid: Meta's 4 x 4 table over tile coordinates, where ours has a row for each aspect ratio id.
    """

    names: tuple[str, ...]
    pattern: str | tuple[str, ...]
    stack: int | None = None
    concat: tuple[int, ...] = ()
    grid: bool = False

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.pattern,) * len(self.names) if isinstance(self.pattern, str) else self.pattern


@dataclasses.dataclass(frozen=True)
class Row:
    """`target` is the path in the parameter tree; `sizes` names the axis lengths that the patterns cannot infer."""

    target: tuple[str, ...]
    hf: Source
    meta: Source
    sizes: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        """The parameter's name in our own layout."""
        return ".".join(self.target)

    def source(self, layout: Layout) -> Source:
        return {"hf": self.hf, "meta": self.meta, "orbax": Source((self.name,), "... -> ...")}[layout]


_NOWHERE = Source((), "...")


def _same(target: str, hf: str, meta: str, pattern: str, **sizes: int) -> Row:
    """A row whose single tensor has the same axes in both layouts."""
    return Row(_path(target), Source((hf,), pattern), Source((meta,), pattern), tuple(sizes.items()))


def _path(target: str) -> tuple[str, ...]:
    return tuple(target.split("/"))


def table(config: MllamaConfig, quantize: str | None = None) -> list[Row]:
    """Every row of `config`'s parameter tree; names are Hugging Face's from before transformers 4.52, and Meta's.

    With `quantize` also the scales of the decoder's kernels, which our own layout alone holds.
    """
    rows = list(_text(config.text, "language_model." if config.vision else ""))
    if config.vision is not None:
        rows += _vision(config.vision)
        ours, hf, meta = "projector/linear", "multi_modal_projector", "vision_model.vision_projection"
        rows.append(_same(f"{ours}/kernel", f"{hf}.weight", f"{meta}.weight", "d e -> d e"))
        rows.append(_same(f"{ours}/bias", f"{hf}.bias", f"{meta}.bias", "d -> d"))
    if quantize:
        kernels = [row.target for row in rows if is_quantized(row.target, quantize)]
        rows += [Row((*target[:-1], "scale"), _NOWHERE, _NOWHERE) for target in kernels]
    return rows


def _text(c: TextConfig, prefix: str) -> Iterator[Row]:
    embeddings = ("text_model.tok_embeddings.weight", "text_model.learnable_embedding.weight")
    lengths = (c.vocab, c.extra_embeddings)
    yield Row(
        _path("text/embedding"),
        Source((f"{prefix}model.embed_tokens.weight",), "v d -> v d"),
        Source(embeddings, "v d -> v d", concat=lengths),
    )
    yield _same("text/final_norm/scale", f"{prefix}model.norm.weight", "text_model.norm.weight", "d -> d")
    if not c.tied:
        yield _same("text/head/kernel", f"{prefix}lm_head.weight", "text_model.output.weight", "v d -> v d")
    for i in range(c.layers):
        hf = f"{prefix}model.layers.{i}."
        if i in c.cross_layers:
            yield from _cross_layer(
                c, f"text/layers_{i}", hf, f"text_model.cross_attention_layers.{c.cross_layers.index(i)}."
            )
        else:
            yield from _self_layer(c, f"text/layers_{i}", hf, f"text_model.layers.{c.self_layers.index(i)}.")


def _self_layer(c: TextConfig, ours: str, hf: str, meta: str) -> Iterator[Row]:
    heads = (("k", c.kv_heads), ("h", c.head_dim), ("two", 2))
    # Meta rotates neighbouring pairs, Hugging Face and we the two halves of a head.
    yield Row(
        _path(f"{ours}/attention/q/kernel"),
        Source((f"{hf}self_attn.q_proj.weight",), "(k g h) d -> k g h d"),
        Source((f"{meta}attention.wq.weight",), "(k g p two) d -> k g (two p) d"),
        (*heads, ("g", c.heads // c.kv_heads)),
    )
    yield Row(
        _path(f"{ours}/attention/kv/kernel"),
        Source((f"{hf}self_attn.k_proj.weight", f"{hf}self_attn.v_proj.weight"), "(k h) d -> k h d", stack=0),
        Source(
            (f"{meta}attention.wk.weight", f"{meta}attention.wv.weight"),
            ("(k p two) d -> k (two p) d", "(k h) d -> k h d"),
            stack=0,
        ),
        heads,
    )
    yield from _layer_rest(ours, hf, meta, "self_attn")


def _cross_layer(c: TextConfig, ours: str, hf: str, meta: str) -> Iterator[Row]:
    heads = (("k", c.kv_heads), ("h", c.head_dim))
    yield Row(
        _path(f"{ours}/attention/q/kernel"),
        Source((f"{hf}cross_attn.q_proj.weight",), "(k g h) d -> k g h d"),
        Source((f"{meta}attention.wq.weight",), "(k g h) d -> k g h d"),
        (*heads, ("g", c.heads // c.kv_heads)),
    )
    yield Row(
        _path(f"{ours}/attention/kv/kernel"),
        Source((f"{hf}cross_attn.k_proj.weight", f"{hf}cross_attn.v_proj.weight"), "(k h) d -> k h d", stack=0),
        Source((f"{meta}attention.wk.weight", f"{meta}attention.wv.weight"), "(k h) d -> k h d", stack=0),
        heads,
    )
    for name in ("q_norm", "k_norm"):
        yield _same(
            f"{ours}/attention/{name}/scale",
            f"{hf}cross_attn.{name}.weight",
            f"{meta}attention.{name}.weight",
            "h -> h",
        )
    yield _same(f"{ours}/attention_gate", f"{hf}cross_attn_attn_gate", f"{meta}gate_attn", "one -> one")
    yield _same(f"{ours}/mlp_gate", f"{hf}cross_attn_mlp_gate", f"{meta}gate_ffwd", "one -> one")
    yield from _layer_rest(ours, hf, meta, "cross_attn")


def _layer_rest(ours: str, hf: str, meta: str, kind: str) -> Iterator[Row]:
    """What self- and cross-attention layers have alike."""
    yield _same(f"{ours}/attention/out/kernel", f"{hf}{kind}.o_proj.weight", f"{meta}attention.wo.weight", "d f -> d f")
    yield _same(f"{ours}/attention_norm/scale", f"{hf}input_layernorm.weight", f"{meta}attention_norm.weight", "d -> d")
    yield _same(f"{ours}/mlp_norm/scale", f"{hf}post_attention_layernorm.weight", f"{meta}ffn_norm.weight", "d -> d")
    yield Row(
        _path(f"{ours}/mlp/gate_up/kernel"),
        Source((f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight"), "f d -> f d", stack=0),
        Source((f"{meta}feed_forward.w1.weight", f"{meta}feed_forward.w3.weight"), "f d -> f d", stack=0),
    )
    yield _same(f"{ours}/mlp/down/kernel", f"{hf}mlp.down_proj.weight", f"{meta}feed_forward.w2.weight", "d f -> d f")


def _vision(c: VisionConfig) -> Iterator[Row]:
    hf, meta = "vision_model.", "vision_model.vision_encoder."
    yield Row(
        _path("vision/patch_embedding/kernel"),
        Source((f"{hf}patch_embedding.weight",), "d ch p q -> d (ch p q)"),
        Source((f"{meta}conv1._linear.weight",), "d e -> d e"),
        (("ch", 3), ("p", c.patch), ("q", c.patch)),
    )
    yield _same("vision/class_token", f"{hf}class_embedding", f"{meta}class_embedding", "d -> d")
    hf_positions, ours = f"{hf}gated_positional_embedding.", "vision/position_embedding"
    yield _same(f"{ours}/position", f"{hf_positions}embedding", f"{meta}positional_embedding", "n d -> n d")
    yield _same(f"{ours}/gate", f"{hf_positions}gate", f"{meta}gated_positional_embedding_gate", "one -> one")
    tiles = {"c": c.max_tiles, "n": c.tokens, "d": c.width}
    yield Row(
        _path(f"{ours}/tiles"),
        Source((f"{hf_positions}tile_embedding.weight",), "r (c n d) -> r c n d"),
        Source((f"{meta}gated_positional_embedding",), "y x n d -> y x n d", grid=True),
        tuple(tiles.items()),
    )
    for when in ("pre", "post"):
        ours, theirs = f"vision/{when}_tile_embedding", f"{hf}{when}_tile_positional_embedding."
        yield Row(
            _path(f"{ours}/table"),
            Source((f"{theirs}embedding.weight",), "r (c d) -> r c d"),
            Source((f"{meta}{when}_tile_pos_embed.embedding",), "y x 1 d -> y x d", grid=True),
            (("c", c.max_tiles), ("d", c.width)),
        )
        yield _same(f"{ours}/gate", f"{theirs}gate", f"{meta}{when}_tile_pos_embed.gate", "one -> one")
        for kind, suffix in (("scale", "weight"), ("bias", "bias")):
            yield _same(
                f"vision/norm_{when}/{kind}", f"{hf}layernorm_{when}.{suffix}", f"{meta}ln_{when}.{suffix}", "d -> d"
            )
    for i in range(c.layers):
        name = f"transformer.resblocks.{i}."
        yield from _vision_block(c, f"vision/locals_{i}", f"{hf}transformer.layers.{i}.", meta + name)
    for i in range(c.global_layers):
        theirs, name = f"{hf}global_transformer.layers.{i}.", f"{meta}global_transformer.resblocks.{i}."
        yield from _vision_block(c, f"vision/globals_{i}", theirs, name)
        yield _same(f"vision/globals_{i}/attention_gate", f"{theirs}gate_attn", f"{name}gate_attn", "one -> one")
        yield _same(f"vision/globals_{i}/mlp_gate", f"{theirs}gate_ffn", f"{name}gate_ffn", "one -> one")


def _vision_block(c: VisionConfig, ours: str, hf: str, meta: str) -> Iterator[Row]:
    heads = {"k": c.heads, "h": c.head_dim}
    yield Row(
        _path(f"{ours}/attention/qkv/kernel"),
        Source(tuple(f"{hf}self_attn.{x}_proj.weight" for x in "qkv"), "(k h) d -> k h d", stack=0),
        Source(tuple(f"{meta}attn.w{x}.weight" for x in "qkv"), "(k h) d -> k h d", stack=0),
        tuple(heads.items()),
    )
    yield _same(f"{ours}/attention/out/kernel", f"{hf}self_attn.o_proj.weight", f"{meta}attn.wo.weight", "d f -> d f")
    norms = (("attention_norm", "input_layernorm", "ln_1"), ("mlp_norm", "post_attention_layernorm", "ln_2"))
    for name, theirs, metas in norms:
        for kind, suffix in (("scale", "weight"), ("bias", "bias")):
            yield _same(f"{ours}/{name}/{kind}", f"{hf}{theirs}.{suffix}", f"{meta}{metas}.{suffix}", "d -> d")
    for name, theirs, metas, pattern in (("up", "fc1", "c_fc", "f d -> f d"), ("down", "fc2", "c_proj", "d f -> d f")):
        yield _same(f"{ours}/mlp/{name}/kernel", f"{hf}mlp.{theirs}.weight", f"{meta}mlp.{metas}.weight", pattern)
        yield _same(f"{ours}/mlp/{name}/bias", f"{hf}mlp.{theirs}.bias", f"{meta}mlp.{metas}.bias", "o -> o")
