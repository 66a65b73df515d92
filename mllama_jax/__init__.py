"""Llama 3.2 Vision in JAX and Flax."""

from mllama_jax.api import Mllama
from mllama_jax.config import MllamaConfig
from mllama_jax.generate.answer import Completion
from mllama_jax.generate.sampling import SamplingParams
from mllama_jax.loading import load
from mllama_jax.processing.guard import Verdict
from mllama_jax.saving import save
from mllama_jax.sharding.libtpu import forbid_large_tiles, is_tpu7x

__all__ = ["Completion", "Mllama", "MllamaConfig", "SamplingParams", "Verdict", "load", "save"]

if is_tpu7x():
    forbid_large_tiles()
