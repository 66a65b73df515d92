"""What `--versus transformers` runs: the same figures of transformers (sdpa, bfloat16, random weights of the 11B).

python -m mllama_jax.bench_peer figures --context 1024 --prompt 8192 --rows 1 8 32 --images 1 8    # `mllama bench`
python -m mllama_jax.bench_peer batch --rows 32 --prompt 128 --new 128              # `mllama_jax.serve.throughput`
python -m mllama_jax.bench_peer lora --rows 4 --prompt 512                          # `mllama_jax.train.measure`
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

NEW = 65  # tokens of the longer generation that decode steps are counted in


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["figures", "batch", "lora"])
    for name in ("context", "prompt", "new"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("rows", "images"):
        parser.add_argument(f"--{name}", type=int, nargs="+")
    args = parser.parse_args()
    model = random_model()
    if args.what == "lora":
        print(json.dumps(lora(model, args)))
        return
    with torch.inference_mode():
        print(json.dumps({"figures": figures, "batch": batch}[args.what](model, args)))


def random_model() -> Any:
    torch.manual_seed(0)
    config = transformers.MllamaConfig(image_token_index=128256)
    config.vision_config.image_size = 560
    config.vision_config.max_num_tiles = 4
    config.vision_config.norm_eps = 1e-5
    config.vision_config.intermediate_layers_indices = [3, 7, 15, 23, 30]
    config.vision_config.vision_output_dim = 7680
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.MllamaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=128004, eos_token_id=None)
    return model


def figures(model: Any, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds, by the names of `mllama bench`."""
    found = {}
    for rows in args.rows:
        found[f"decode, {rows} rows with a picture"] = step(model, inputs(args.context, rows, picture=True))
    found["decode, 1 row of text"] = step(model, inputs(args.context, 1, picture=False))
    for images in args.images:
        pictures = {k: v for k, v in inputs(1, images, picture=True).items() if k in ENCODER}
        found[f"encode, {images} pictures"] = measure(
            lambda p=pictures: model.model.multi_modal_projector(model.model.vision_model(**p).last_hidden_state)
        )
    for name, tokens, picture in (
        ("first token, a picture and 128 tokens", 128, True),
        (f"prefill, a picture and {args.prompt} tokens", args.prompt, True),
        (f"prefill, {args.prompt} tokens of text", args.prompt, False),
    ):
        own = inputs(tokens, 1, picture=picture)
        found[name] = measure(lambda own=own: generate(model, own, 1))
    own = inputs(128, 1, picture=True)
    found["answer, a picture and 128 tokens, 128 new"] = measure(lambda: generate(model, own, 128), repeat=3)
    return found


def batch(model: Any, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds in which rows with a picture each, ready on the device, are answered together, by their number."""
    found = {}
    for rows in args.rows:
        own = inputs(args.prompt, rows, picture=True)
        found[str(rows)] = measure(lambda own=own: generate(model, own, args.new), repeat=2)
    return found


def lora(model: Any, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step of LoRA by PEFT, layers done again in the backward pass, and the most bytes it had in use."""
    import peft  # pyright: ignore[reportMissingImports]

    maps = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=rf".*language_model.*\.({maps})")
    )
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    own = inputs(args.prompt, args.rows[0], picture=True)
    labels = own["input_ids"].masked_fill(own["input_ids"] == 128256, -100)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], fused=True)

    def update() -> None:
        model(**own, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = measure(update) / 1e3
    return {"seconds": seconds, "peak": torch.cuda.max_memory_allocated()}


ENCODER = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


def inputs(tokens: int, rows: int, *, picture: bool) -> dict[str, torch.Tensor]:
    """Random token ids, with a four-tile picture in every row that all tokens see."""
    ids = torch.randint(0, 128000, (rows, tokens), device="cuda")
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if picture:
        ids[:, 0] = 128256
        found |= {
            "pixel_values": torch.randn(rows, 1, 4, 3, 560, 560, device="cuda"),
            "aspect_ratio_ids": torch.full((rows, 1), 6, device="cuda"),
            "aspect_ratio_mask": torch.ones(rows, 1, 4, dtype=torch.long, device="cuda"),
            "cross_attention_mask": torch.ones(rows, tokens, 1, 4, dtype=torch.long, device="cuda"),
        }
    return found


def generate(model: Any, own: dict[str, torch.Tensor], new: int) -> Any:
    return model.generate(**own, max_new_tokens=new, min_new_tokens=new)


def step(model: Any, own: dict[str, torch.Tensor]) -> float:
    """Milliseconds of a decode step: what NEW tokens take longer than one."""
    one, more = (measure(lambda n=n: generate(model, own, n), repeat=3) for n in (1, NEW))
    return (more - one) / (NEW - 1)


def measure(run: Callable[[], Any], repeat: int = 5) -> float:
    """The median, in milliseconds."""
    times = []
    for _ in range(repeat + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
