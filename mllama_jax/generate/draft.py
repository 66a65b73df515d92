"""A draft model: guess what follows as a small model would go on, by the settings and random numbers of the large one.

With the same Gumbel noise on their logits, two models whose distributions are D apart in total variation choose the
same token with probability (1 - D) / (1 + D) or more. Daliri et al., arXiv 2408.07978.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from mllama_jax.errors import InputError
from mllama_jax.generate.decode import State, choose, prefill, step
from mllama_jax.generate.sampling import Settings
from mllama_jax.model.cache import KVCache
from mllama_jax.model.mllama import MllamaModel, Params, call


@struct.dataclass
class Draft:
    """A model that guesses for another of the same vocabulary. It reads text alone."""

    model: MllamaModel = struct.field(pytree_node=False)
    params: Params

    @classmethod
    def of(cls, model: MllamaModel, small: MllamaModel, params: Params) -> Draft:
        """`small` to guess for `model`. Raises InputError where it cannot."""
        wanted, got = (each.config.text.vocab for each in (model, small))
        if got != wanted:
            raise InputError(
                f"draft: expected a vocabulary of {wanted} ids like the model's, got {got}; take one of its family"
            )
        if small.constrain.mesh != model.constrain.mesh:
            raise InputError("draft: expected a model on the same mesh; load both with one mesh, or both with none")
        rows, own = (each.constrain.parts("batch") for each in (model, small))
        if rows % own:
            raise InputError(f"draft: its rules split rows in {own} and the model's in {rows}; load both with the same")
        return cls(small, params)

    def read(self, tokens: jax.Array, lengths: jax.Array, settings: Settings, length: int) -> tuple[KVCache, ...]:
        """Read prompts int [B, T], of which lengths [B] are real, into a new cache of `length` positions."""
        cache = tuple(layer.placed(self.model.constrain) for layer in self.model.empty_cache(len(tokens), length))
        return prefill(self.model, self.params, tokens, lengths, cache, None, settings, top=0)[0].cache

    def guess(self, before: jax.Array, state: State, settings: Settings, k: int) -> tuple[jax.Array, State]:
        """What may follow, int32 [B, k], and the state `k` tokens on.

        `before` int32 [B] stands before the state's token. It is read once more, for where all guesses were right it
        is the last of them, which has been made but not read.
        """
        pair = jnp.stack([before, state.token], axis=1)
        positions = jnp.stack([state.position - 1, state.position], axis=1)
        x, cache = call(self.model, self.params, "__call__", pair, positions, state.cache, None)
        logits = call(self.model, self.params, "logits", x[:, 1])
        state = dataclasses.replace(state, cache=cache, position=state.position + 1)
        state, first = choose(logits, state, settings, 0)

        def further(state: State, _: None) -> tuple[State, jax.Array]:
            state, made = step(self.model, self.params, state, None, settings, 0)
            return state, made.token

        state, rest = jax.lax.scan(further, state, length=k - 1)
        return jnp.concatenate([first.token[:, None], rest.T], axis=1), state
