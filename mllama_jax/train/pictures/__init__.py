"""Pictures drawn on the fly, with questions and answers: what the model that ships learns from and is tested on."""

from mllama_jax.train.pictures.example import Box, Example, conversation
from mllama_jax.train.pictures.stream import FAMILIES, held_out, sample, shuffled, training

__all__ = ["FAMILIES", "Box", "Example", "conversation", "held_out", "sample", "shuffled", "training"]
