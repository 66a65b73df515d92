"""Answers in OpenAI's form: as one object, or as server-sent events."""

from __future__ import annotations

import base64
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from mllama_jax.errors import InputError
from mllama_jax.generate.answer import Answer
from mllama_jax.generate.requests import Request
from mllama_jax.look import Look
from mllama_jax.processing.guard import SAFE, Verdict
from mllama_jax.processing.tokenizer import Tokenizer
from mllama_jax.serve.protocol import Asked, fault
from mllama_jax.serve.worker import EngineFault, Piece


@dataclasses.dataclass
class Job:
    """One answer in progress.

    Attributes:
        prompt: what is answered, as it was asked.
        verdict: what a guard says of the answer, once it is whole.
    """

    request: Request
    prompt: Any
    began: float
    verdict: Verdict = SAFE
    last: float | None = None  # when the last piece came
    seen: int = 0

    @property
    def answer(self) -> Answer:
        return self.request.answer

    @property
    def finish_reason(self) -> str | None:
        return self.answer.finish_reason if self.verdict.safe else "content_filter"


@dataclasses.dataclass(frozen=True)
class Replies:
    """Tells what jobs have made, for a model of this name; `kind` is "chat.completion" or "text_completion"."""

    name: str
    tokenizer: Tokenizer

    def whole(self, asked: Asked, jobs: list[Job], kind: str) -> dict[str, Any]:
        """One object, once all have ended."""
        chat = kind == "chat.completion"
        choices = []
        for i, job in enumerate(jobs):
            answer, calls = job.answer, None
            choice: dict[str, Any] = {"index": i, "finish_reason": job.finish_reason, "logprobs": None}
            if not job.verdict.safe:
                refusal = {"role": "assistant", "content": None, "refusal": f"the answer was judged {job.verdict}"}
                choices.append(choice | ({"message": refusal} if chat else {"text": ""}))
                continue
            if asked.logprobs:
                choice["logprobs"] = self._logprobs(chat, answer, 0, len(answer.tokens))
            if chat:
                calls = tool_calls(answer.text) if asked.tools else None
                choice["message"] = {"role": "assistant", "content": None if calls else answer.text, "refusal": None}
            else:
                choice["text"] = answer.text
            if calls:
                choice["message"]["tool_calls"] = calls
                choice["finish_reason"] = "tool_calls"
            choices.append(choice)
        return header(kind, self.name) | {"choices": choices, "usage": usage(jobs)}

    def _logprobs(self, chat: bool, answer: Answer, start: int, end: int) -> dict[str, Any]:
        told = chat_logprobs if chat else text_logprobs
        return told(answer, self.tokenizer, start, end)

    async def stream(
        self, asked: Asked, jobs: list[Job], kind: str, pieces: AsyncIterator[tuple[int, Piece]]
    ) -> AsyncIterator[bytes]:
        """Server-sent events, of pieces with the numbers of their jobs.

        With tools an answer is told when it is whole: only then it is known to be a call. Without them it is told as
        it grows, and where a guard finds it unsafe in the end, the last event has the finish_reason "content_filter".
        """
        chat = kind == "chat.completion"
        head = header(f"{kind}.chunk" if chat else kind, self.name)

        def event(choices: list[Any], **more: Any) -> bytes:
            return b"data: " + json.dumps(head | {"choices": choices} | more, ensure_ascii=False).encode() + b"\n\n"

        def choice(i: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
            told = {"delta": delta} if chat else {"text": delta.get("content", "")}
            return {"index": i, **told, "logprobs": logprobs, "finish_reason": reason}

        seen = [0] * len(jobs)
        if chat:
            yield event([choice(i, {"role": "assistant", "content": ""}) for i in range(len(jobs))])
        try:
            async for i, piece in pieces:
                logprobs = self._logprobs(chat, jobs[i].answer, seen[i], piece.end) if asked.logprobs else None
                seen[i] = piece.end
                if not asked.tools and (piece.text or logprobs):
                    yield event([choice(i, {"content": piece.text}, logprobs=logprobs)])
            last = []  # in one go: each event costs the server a call, and they come for all rows of a block at once
            for i, job in enumerate(jobs):
                calls = tool_calls(job.answer.text) if asked.tools and job.verdict.safe else None
                if calls:
                    last.append(event([choice(i, {"tool_calls": [{"index": 0, **call} for call in calls]})]))
                elif asked.tools and job.verdict.safe:
                    last.append(event([choice(i, {"content": job.answer.text})]))
                last.append(event([choice(i, {}, "tool_calls" if calls else job.finish_reason)]))
            if asked.usage:
                last.append(event([], usage=usage(jobs)))
        except (EngineFault, InputError) as error:
            last = [b"data: " + json.dumps(fault(str(error), "server_error")).encode() + b"\n\n"]
        yield b"".join([*last, b"data: [DONE]\n\n"])


def told_look(look: Look) -> dict[str, Any]:
    """The words and, for each picture, where they looked: bytes [words, rows, columns] in base64, 255 where a word
    looked most, and how many columns and rows of these patches the picture covers."""
    hottest = np.max([view.patches.max(axis=(1, 2)) for view in look.views], axis=0)[:, None, None]
    views = []
    for view in look.views:
        heat = np.rint(255 * view.patches / hottest).astype(np.uint8)
        _, rows, columns = heat.shape
        told = {"rows": rows, "columns": columns, "covered": view.covered}
        views.append(told | {"heat": base64.b64encode(heat.tobytes()).decode()})
    return {"words": look.words, "views": views}


def header(kind: str, model: str) -> dict[str, Any]:
    """What every object of an answer begins with."""
    short = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {"id": f"{short}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def tool_calls(text: str) -> list[dict[str, Any]] | None:
    """The calls in an answer as Llama 3.2's template asks for them: one object of name and parameters; None if it is
    none."""
    try:
        found = json.loads(text)
        name, arguments = found["name"], found.get("parameters", found.get("arguments"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return [{"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}]


def chat_logprobs(answer: Answer, tokenizer: Tokenizer, start: int, end: int) -> dict[str, Any]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token, skip_specials=False)
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}

    return {
        "content": [
            one(answer.tokens[i], answer.logprobs[i])
            | {"top_logprobs": [one(*each) for each in answer.top_logprobs[i].items()]}
            for i in range(start, end)
        ]
    }


def text_logprobs(answer: Answer, tokenizer: Tokenizer, start: int, end: int) -> dict[str, Any]:
    def text(token: int) -> str:
        return tokenizer.token_bytes(token, skip_specials=False).decode(errors="replace")

    return {
        "tokens": [text(token) for token in answer.tokens[start:end]],
        "token_logprobs": answer.logprobs[start:end],
        "top_logprobs": [{text(t): p for t, p in tops.items()} for tops in answer.top_logprobs[start:end]],
    }


def usage(jobs: list[Job]) -> dict[str, int]:
    """Each prompt counts once, however many answers it has."""
    prompts = {id(job.request.prompt): len(job.request.prompt.tokens) for job in jobs}
    prompt, completion = sum(prompts.values()), sum(len(job.answer.tokens) for job in jobs)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
