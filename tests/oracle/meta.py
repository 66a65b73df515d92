"""Meta's own Llama 3.2 Vision code (PyPI `llama-models`) on the toy weights, in float32 on a CPU.

    python -m tests.oracle.meta [DIRECTORY]

writes the goldens anew, one file a case, in the format that `tests.parity` documents. Needs torch, fairscale and
llama-models; see `tests.parity` for the cases and the arrays' names.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.oracle import torchvision_stub
from tests.parity import CASES, GOLDENS, GREEDY, LOGITS_TOLERANCE, Array, Case, Golden, spans
from tests.toy import STOPS

with torchvision_stub.standing_in():  # Meta's image transform imports it
    import fairscale.nn.model_parallel.initialize as model_parallel
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.multimodal import model as meta

CPU = torch.device("cpu")


def build(params: Mapping[str, Any], weights: Mapping[str, Array]) -> meta.CrossAttentionTransformer:
    """Meta's model of `params` with all of `weights`, and nothing but these, loaded."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        model_parallel.initialize_model_parallel(1)
    # Meta's code fixes the encoder's sizes: give it those of the weights, and the projection that fits them.
    encoder, sizes = meta.VisionEncoder, _encoder_sizes(params, weights)
    with mock.patch.object(meta, "VisionEncoder", lambda **given: encoder(**given | sizes)):
        model = meta.CrossAttentionTransformer(ModelArgs(**params, max_batch_size=8, max_seq_len=128))
    features = weights["vision_model.vision_projection.weight"].shape[1]
    model.vision_model.vision_projection = meta.ColumnParallelLinear(features, params["dim"], init_method=lambda x: x)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=True)
    return model.eval()


def _encoder_sizes(params: Mapping[str, Any], weights: Mapping[str, Array]) -> dict[str, Any]:
    """The vision encoder's arguments that Meta's params.json leaves out; see `mllama_jax.MllamaConfig.from_meta`."""
    prefix = "vision_model.vision_encoder."

    def blocks(kind: str) -> int:
        start = f"{prefix}{kind}.resblocks."
        return len({name.removeprefix(start).split(".")[0] for name in weights if name.startswith(start)})

    vision = params.get("vision", {})
    return {
        "width": weights[f"{prefix}class_embedding"].size,
        "heads": vision.get("heads", 16),
        "patch_size": math.isqrt(weights[f"{prefix}conv1._linear.weight"].shape[1] // 3),
        "layers": blocks("transformer"),
        "n_global_layers": blocks("global_transformer"),
        "return_intermediate": vision.get("taps", [3, 7, 15, 23, 30]),
    }


@torch.no_grad()
def run(case: Case) -> dict[str, Array]:
    """Every array of `case`, whole, named as in `tests.parity`."""
    model, tokens, images = build(case.params, case.weights), case.tokens, case.images
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*all_gather_tensor. is deprecated", FutureWarning)  # Meta's code calls it
        if not case.ragged:
            return run_rows(model, np.stack(tokens), images)
        rows = [run_rows(model, own[None], [pictures]) for own, pictures in zip(tokens, images, strict=True)]
    return {
        name: np.concatenate([row[name] for row in rows if name in row]) for name in ("features", "logits", "greedy")
    }


@torch.no_grad()
def run_rows(
    model: meta.CrossAttentionTransformer,
    tokens: Array,
    images: list[list[Any]],
    choose: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, Array]:
    """The arrays of equally long rows: tokens [B, T]. `choose` takes the next ids [B] from logits [B, V]."""
    choose = choose or _clear_winner
    (rows, length), text = tokens.shape, model.text_model
    total, text_only = length + GREEDY, not any(images)
    arrays: dict[str, Array] = {}
    model.setup_cache(rows, CPU, torch.float32)
    caches, mask, row_mask = None, torch.zeros(rows, 1, total, 1), torch.ones(rows, 1, total, 1)
    if not text_only:
        row_spans = [spans(row, text.vocab_size) for row in tokens]
        with _recording(_vision_modules(model), arrays):
            caches, mask, row_mask = model.compute_vision_tokens_masks(images, row_spans, total, CPU)
        _regroup_vision(model, arrays, images)
        arrays |= _image_keys_values(text, caches, images, arrays["features"].shape[1:3])
    sequence = torch.zeros(rows, total, dtype=torch.long)
    sequence[:, :length] = torch.from_numpy(tokens)
    step = functools.partial(
        model,
        tokens=sequence,
        cross_attention_masks=mask,
        full_text_row_masked_out_mask=row_mask,
        xattn_caches=caches,
        text_only_inference=text_only,
    )
    arrays["text/embedded"] = text.get_partially_trainable_embedding(sequence[:, :length]).numpy()
    with _recording(_text_modules(text), arrays):
        logits = step(torch.arange(length))
    arrays["text/logits"] = logits.numpy()
    arrays["logits"] = logits.flatten(0, 1).numpy()
    for t in range(length, total):
        sequence[:, t] = choose(logits[:, -1])
        logits = step(torch.arange(t, t + 1))
    return arrays | {"greedy": sequence[:, length:].numpy()}


def _clear_winner(logits: torch.Tensor) -> torch.Tensor:
    """The greedy choices [B] from logits [B, V], sure to be the same within the tolerance."""
    best = logits.topk(2)
    if (best.values[:, 0] - best.values[:, 1]).min() < 2 * LOGITS_TOLERANCE:
        raise RuntimeError("two ids compete within the logits' tolerance: give this case another seed")
    stops = logits.shape[-1] - 256 + torch.tensor(STOPS)
    if torch.isin(best.indices[:, 0], stops).any():
        raise RuntimeError("greedy decoding meets a stop id: give this case another seed")
    return best.indices[:, 0]


# ---- Intermediates ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _recording(modules: Mapping[str, torch.nn.Module], arrays: dict[str, Array]) -> Iterator[None]:
    """Put each module's output into `arrays` under its name; `<name>:input` stands for its first input."""

    def recorder(name: str):
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            arrays[name.removesuffix(":input")] = (inputs[0] if name.endswith(":input") else output).numpy().copy()

        return hook

    handles = [module.register_forward_hook(recorder(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _vision_modules(model: meta.CrossAttentionTransformer) -> dict[str, torch.nn.Module]:
    encoder = model.vision_model.vision_encoder
    return {
        "vision/patch": encoder.conv1,
        "vision/embedded:input": encoder.ln_pre,
        "vision/ln_pre": encoder.ln_pre,
        **{f"vision/local_{i}": block for i, block in enumerate(encoder.transformer.resblocks)},
        "vision/ln_post": encoder.ln_post,
        "vision/post_tile": encoder.post_tile_pos_embed,
        **{f"vision/global_{i}": block for i, block in enumerate(encoder.global_transformer.resblocks)},
        "vision/features": encoder,
        "vision/projected": model.vision_model,
    }


def _regroup_vision(model: meta.CrossAttentionTransformer, arrays: dict[str, Array], images: list[list[Any]]) -> None:
    """Bring every vision array to [images that are present, C, tokens without padding, D]."""
    tokens = len(model.vision_model.vision_encoder.positional_embedding)
    present = _present(images)
    for name, array in arrays.items():
        grouped = array.reshape(len(present), model.max_num_chunks, -1, array.shape[-1])
        arrays[name] = grouped[present, :, :tokens]
    arrays["features"] = arrays["vision/projected"]


def _text_modules(text: meta.CrossAttentionTransformerText) -> dict[str, torch.nn.Module]:
    """Layers under their Hugging Face index: cross-attention layers run, and count, before the layer they precede."""
    modules = {}
    for i, layer in enumerate(text.layers):
        if i in text.fusion_schedule:
            cross = text.fusion_schedule.index(i)
            modules[f"text/layer_{i + cross}"] = text.cross_attention_layers[cross]
        modules[f"text/layer_{i + sum(i >= before for before in text.fusion_schedule)}"] = layer
    return modules | {"text/norm": text.norm}


def _image_keys_values(
    text: meta.CrossAttentionTransformerText, caches: torch.Tensor, images: list[list[Any]], tiles: tuple[int, int]
) -> dict[str, Array]:
    """Each cross-attention layer's keys and values [images, C, N, K, h] from caches [layers, 2, B, H, I * C * N, h]."""
    present, repeats = _present(images), caches.shape[3] // text.n_kv_heads
    arrays = {}
    for cross, cache in enumerate(caches[:, :, :, ::repeats].numpy()):
        for name, heads in zip(("keys", "values"), cache, strict=True):  # [B, K, I * C * N, h]
            by_token = heads.swapaxes(1, 2).reshape(len(present), *tiles, *heads.shape[1::2])
            arrays[f"cross/{name}_{text.fusion_schedule[cross] + cross}"] = by_token[present]
    return arrays


def _present(images: list[list[Any]]) -> Array:
    """bool [B * I]: which of the batch's image slots are filled."""
    slots = max(map(len, images))
    return np.array([i < len(row) for row in images for i in range(slots)])


def main() -> None:
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDENS
    directory.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        Golden.of(run(case)).save(directory / f"{case.name}.npz")


if __name__ == "__main__":
    main()
