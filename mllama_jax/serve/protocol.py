"""OpenAI's requests: what is asked, checked field by field; and how a fault is told."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mllama_jax.errors import InputError
from mllama_jax.generate.sampling import STOPS_AT_MOST, SamplingParams

_SAMPLING = {  # fields that are passed on as they are
    *("temperature", "top_p", "top_k", "min_p", "seed", "n"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
}
_COMMON = _SAMPLING | {
    *("model", "stream", "stream_options", "stop", "logprobs", "max_tokens", "logit_bias"),
    *("stop_token_ids", "ignore_eos", "user"),
}
_CHAT = _COMMON | {"messages", "top_logprobs", "max_completion_tokens", "tools", "tool_choice", "response_format"}
_TEXT = _COMMON | {"prompt", "echo"}


class ModelNotFound(InputError):
    """The request asks for another model."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that has been understood.

    Attributes:
        prompts: conversations, or texts or token ids to go on from.
        settings: of `SamplingParams`, without `max_new_tokens` where the request sets none.
        logprobs: whether to report log-probabilities.
        schema: what the answer is held to, a JSON schema; None for any text.
    """

    prompts: list[Any]
    settings: dict[str, Any]
    tools: list[Any] | None
    stream: bool
    usage: bool
    logprobs: bool
    schema: dict[str, Any] | None = None


def parse(body: bytes) -> dict[str, Any]:
    """A request's JSON object. Raises InputError."""

    def refuse(name: str) -> None:
        raise InputError(f"body: {name} is not JSON")

    try:
        found = json.loads(body, parse_constant=refuse)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"body: expected JSON, got an error: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"body: expected a JSON object, got {type(found).__name__}")
    return {name: value for name, value in found.items() if value is not None}


def chat_request(body: Mapping[str, Any], model: str, picture: Callable[[str], bytes], pictures: int) -> Asked:
    """What /v1/chat/completions takes, with so many pictures at most; `picture` gives the file at a URL. Raises
    InputError, naming the field."""
    _known(body, _CHAT, model)
    top, wanted = _typed(body, "top_logprobs", int, 0), _typed(body, "logprobs", bool, False)
    if top and not wanted:
        raise InputError("top_logprobs: needs logprobs true")
    settings = _settings(body, top, body.get("max_completion_tokens", body.get("max_tokens")))
    tools, choice = _typed(body, "tools", list, []), body.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise InputError(f"tool_choice: expected 'auto' or 'none', got {choice!r}")
    messages = _conversation(body.get("messages"), picture, pictures)
    return Asked(
        [messages], settings, tools if tools and choice == "auto" else None, *_delivery(body), wanted, _schema(body)
    )


def text_request(body: Mapping[str, Any], model: str) -> Asked:
    """What /v1/completions takes: a text, token ids, or several of either. Raises InputError."""
    _known(body, _TEXT, model)
    if body.get("echo", False) is not False:
        raise InputError("echo: expected false, the prompt is not repeated")
    prompt = body.get("prompt")
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise InputError(f"prompt: expected a text, token ids or a list of either, got {type(prompt).__name__}")
    for each in prompt:
        ids = isinstance(each, list) and each and all(type(token) is int for token in each)
        if not isinstance(each, str) and not ids:
            raise InputError("prompt: expected texts or lists of token ids")
    top = _typed(body, "logprobs", int, 0)
    settings = _settings(body, top, body.get("max_tokens", 16))
    return Asked(prompt, settings, None, *_delivery(body), "logprobs" in body)


def _known(body: Mapping[str, Any], known: set[str], model: str) -> None:
    if unknown := sorted(set(body) - known):
        raise InputError(f"{unknown[0]}: not supported; known are {', '.join(sorted(known))}")
    if (asked := _typed(body, "model", str, model)) != model:
        raise ModelNotFound(f"model: {asked[:80]!r} is not served here; {model!r} is")


def _typed(body: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name, default)
    if (value is not None and not isinstance(value, kind)) or (isinstance(value, bool) and kind is int):
        raise InputError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _schema(body: Mapping[str, Any]) -> dict[str, Any] | None:
    asked = _typed(body, "response_format", dict, {"type": "text"})
    kind = asked.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise InputError(f"response_format.type: expected text, json_object or json_schema, got {kind!r}")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    named = asked.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise InputError(f"response_format.json_schema.schema: expected an object, got {type(schema).__name__}")
    return schema


def _delivery(body: Mapping[str, Any]) -> tuple[bool, bool]:
    options = _typed(body, "stream_options", dict, {})
    if unknown := sorted(set(options) - {"include_usage"}):
        raise InputError(f"stream_options.{unknown[0]}: not supported; known is include_usage")
    return _typed(body, "stream", bool, False), bool(options.get("include_usage"))


def _settings(body: Mapping[str, Any], top: int, limit: Any) -> dict[str, Any]:
    """Checked settings by the names of `SamplingParams`; OpenAI's temperature is 1 where none is given."""
    found: dict[str, Any] = {"temperature": 1.0, "logprobs": top, "seed": secrets.randbits(31)}
    found |= {name: body[name] for name in _SAMPLING if name in body}
    stop = body.get("stop", [])
    found["stop"] = [stop] if isinstance(stop, str) else stop
    bias = _typed(body, "logit_bias", dict, {})
    if wrong := [name for name in bias if not name.isdecimal() or len(name) > 10]:
        raise InputError(f"logit_bias: expected token ids for names, got {wrong[0][:40]!r}")
    found["logit_bias"] = {int(token): value for token, value in bias.items()}
    if limit is not None:
        found["max_new_tokens"] = limit
    if _typed(body, "ignore_eos", bool, False):
        found["stop_ids"] = _typed(body, "stop_token_ids", list, [])
    elif "stop_token_ids" in body:
        found["more_stop_ids"] = body["stop_token_ids"]
    try:
        SamplingParams.of({name.removeprefix("more_"): value for name, value in found.items()})
    except InputError as error:
        raise InputError(_renamed(str(error), body)) from None
    return found


def _renamed(message: str, body: Mapping[str, Any]) -> str:
    """What is said of a setting, with the name of its field."""
    fields = {"max_new_tokens": ("max_completion_tokens", "max_tokens"), "logprobs": ("top_logprobs", "logprobs")}
    setting, _, rest = message.partition(" ")
    names = (*fields.get(setting, ()), "stop_token_ids" if setting == "stop_ids" else setting.partition("[")[0])
    return f"{field}: {rest}" if (field := next((name for name in names if name in body), None)) else message


def sampling(asked: Asked, room: int, stops: Sequence[int]) -> SamplingParams:
    """The settings of a prompt behind which a slot has room for so many tokens. Raises InputError."""
    settings: dict[str, Any] = {"max_new_tokens": max(room, 1)} | asked.settings
    if more := settings.pop("more_stop_ids", None):
        if len(more) + len(stops) > STOPS_AT_MOST:
            most = STOPS_AT_MOST - len(stops)
            raise InputError(f"stop_token_ids: at most {most} beside the model's own, got {len(more)}")
        settings["stop_ids"] = [*stops, *more]
    return SamplingParams.of(settings)


def _conversation(messages: Any, picture: Callable[[str], bytes], most: int) -> list[Any]:
    """OpenAI's messages as ours: pictures as files, the arguments of tool calls as objects."""
    if not isinstance(messages, list):
        raise InputError(f"messages: expected a list, got {type(messages).__name__}")
    if (shown := sum(map(_shown, messages))) > most:  # before any is fetched
        raise InputError(f"messages: {shown} pictures exceed the {most} of a slot; show fewer")
    made = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InputError(f"messages[{i}]: expected an object, got {type(message).__name__}")
        message = {name: value for name, value in message.items() if name != "refusal" and value is not None}
        if isinstance(content := message.get("content"), list):
            message["content"] = [_part(part, f"messages[{i}].content[{j}]", picture) for j, part in enumerate(content)]
        if "tool_calls" in message:
            calls = _typed(message, "tool_calls", list, [])
            message["tool_calls"] = [_call(call, f"messages[{i}].tool_calls") for call in calls]
        made.append(message)
    return made


def _shown(message: Any) -> int:
    """How many pictures a message has."""
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else []
    return sum(isinstance(part, dict) and part.get("type") == "image_url" for part in parts)


def _part(part: Any, where: str, picture: Callable[[str], bytes]) -> Any:
    if not isinstance(part, dict) or part.get("type") not in ("text", "image_url"):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise InputError(f"{where}: expected a part of type 'text' or 'image_url', got {kind!r}")
    if part["type"] == "text":
        return part
    found = part.get("image_url")
    url = found.get("url") if isinstance(found, dict) else found
    if not isinstance(url, str):
        raise InputError(f"{where}.image_url.url: expected text, got {type(url).__name__}")
    return {"type": "image", "image": picture(url)}


def _call(call: Any, where: str) -> Any:
    try:
        function = dict(call["function"])
        if isinstance(function["arguments"], str):
            function["arguments"] = json.loads(function["arguments"])
        return dict(call) | {"function": function}
    except (KeyError, TypeError, ValueError, RecursionError):
        raise InputError(f"{where}: expected a function with a name and arguments in JSON") from None


def fault(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """OpenAI's form of an error; the field at fault is what the message begins with."""
    param = message.partition(":")[0] if ":" in message else None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
