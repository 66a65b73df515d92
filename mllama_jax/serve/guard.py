"""A filter in front of the served model: Llama Guard judges conversations, and answers, on the same devices."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any

from mllama_jax.api import Mllama
from mllama_jax.errors import InputError
from mllama_jax.generate.answer import Answer
from mllama_jax.generate.engine import Engine
from mllama_jax.generate.requests import Picture, Pictures, Request
from mllama_jax.generate.sampling import SamplingParams
from mllama_jax.processing.chat import Prompt
from mllama_jax.processing.guard import ANSWER, Verdict, guard_prompts, joined, read_verdict
from mllama_jax.processing.tokenizer import Tokenizer
from mllama_jax.serve.worker import Worker


class Guard:
    """Judges with an engine of its own, whose steps take turns with the served model's.

    It has room for a conversation of `context` positions with its task around.
    """

    def __init__(
        self,
        model: Mllama,
        *,
        slots: int,
        context: int,
        memory: int | None,
        turns: Executor,
        aside: Callable[..., Awaitable[Any]],
    ):
        if model.tokenizer is None:
            raise InputError(f"{model.directory}: no tokenizer.json or tokenizer.model here; a guard needs one, add it")
        self.model, self.aside = model, aside
        self._pictures = Pictures(model.config.vision)
        (task,) = guard_prompts([{"role": "user", "content": ""}], model.tokenizer, self._pictures.of)
        context += len(task.tokens) + ANSWER
        engine = Engine(model.model, model.params, slots=slots, context=context, pictures=(1, 1), memory=memory)
        self.worker = Worker(engine, turns, number=1)

    async def judge(self, conversation: list[Any]) -> Verdict:
        """What the guard says of the last turn. Raises NoVerdict where it says neither safe nor unsafe."""
        prompts = await self.aside(guard_prompts, conversation, self.model.tokenizer, self._pictures.of)
        return joined(await asyncio.gather(*map(self._ask, prompts)))

    async def _ask(self, prompt: Prompt[Picture]) -> Verdict:
        config = self.model.config
        answer = Answer(SamplingParams(max_new_tokens=ANSWER), config.stops, self.model.tokenizer)
        request = Request.of(config, prompt, answer)
        async for _ in self.worker.answer([request]):
            pass
        return read_verdict(answer.text, whole=answer.finish_reason == "stop")


def as_conversation(prompt: Any, tokenizer: Tokenizer) -> list[Any]:
    """A prompt as a guard is shown it: texts and token ids are what a user says."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if prompt and isinstance(prompt[0], int):
        return [{"role": "user", "content": tokenizer.decode(prompt)}]
    return prompt
