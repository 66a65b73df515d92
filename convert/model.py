"""A checkpoint as a model to be written: its parameters, its configuration and the files beside them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from mllama_jax.config import MllamaConfig
from mllama_jax.convert.apply import Extras, Parameters, extras, has_new_names, parameters, read_config
from mllama_jax.convert.sources import Checkpoint

# Files that say nothing of the weights and go along as they are, whatever the layout.
CARRIED = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.json", "chat_template.jinja", "preprocessor_config.json", "processor_config.json"),
    *("generation_config.json", "LICENSE", "LICENSE.txt", "USE_POLICY.md"),
)


@dataclasses.dataclass(frozen=True)
class Model:
    """What is written: parameters and configuration, and what the source says beside them."""

    parameters: Parameters
    config: MllamaConfig
    extras: Extras
    hf_names: str  # generation of Hugging Face's tensor names: "4.45" or "4.52"
    json: Mapping[str, dict[str, Any]]  # config.json and params.json of the source, as far as they still hold
    carried: Mapping[str, bytes]  # other files by name


def read_model(checkpoint: Checkpoint) -> Model:
    """Everything that a checkpoint holds, nothing of it read yet but small files."""
    config = read_config(checkpoint)
    if checkpoint.layout == "orbax":
        hf_names = checkpoint.manifest["hf_names"]
    else:
        hf_names = "4.52" if has_new_names(checkpoint) else "4.45"
    jsons = {"config.json": checkpoint.config_json, "params.json": checkpoint.params_json}
    carried = {}
    for name in CARRIED:
        with contextlib.suppress(FileNotFoundError):
            carried[name] = (checkpoint.directory / name).read_bytes()
    return Model(parameters(checkpoint, config), config, extras(checkpoint, config), hf_names, jsons, carried)
