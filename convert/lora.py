"""LoRA adapters in PEFT's safetensors layout: names and shapes, both ways, by the rows of the table.

    base_model.model.<module>.lora_A.weight [rank, in], .lora_B.weight [out, rank]

Modules are called as in transformers since 4.52. Of a kernel that fuses several modules, each has a pair of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mllama_jax.config import MllamaConfig
from mllama_jax.convert.apply import Parameters, renamed
from mllama_jax.convert.axes import backward
from mllama_jax.convert.safetensors import write_safetensors
from mllama_jax.convert.table import table

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def write_lora(
    directory: Path, parameters: Parameters, config: MllamaConfig, rank: int, alpha: float, base: str
) -> None:
    """Write pairs `lora_a`, `lora_b` (see `train.parts.lora_shapes`) of the checkpoint `base` as an adapter."""
    made, modules = {}, []
    for row in table(config):
        path = row.target[:-1]
        if row.target[-1] != "kernel" or (*path, "lora_a") not in parameters:
            continue
        a, b = (parameters[(*path, name)].whole() for name in ("lora_a", "lora_b"))
        for i, (name, pattern) in enumerate(zip(row.hf.names, row.hf.patterns, strict=True)):
            module = renamed(name).removesuffix(".weight")
            own_a, own_b = (a, b) if row.hf.stack is None else (a[i], b[i])
            # The kernel's last axis is its input, in both layouts: the rank takes its place in b.
            made[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(own_a)
            made[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(backward(row, pattern, own_b))
            modules.append(module)
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
    }
    directory.mkdir(parents=True)
    write_safetensors(directory / WEIGHTS, made, {"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
