"""Conversations into token ids and pictures, through the model's own chat template or ours.

A conversation is a list of messages ``{"role", "content"}``; content is text or a list of parts ``{"type": "text",
"text": ...}`` and ``{"type": "image", "image": ...}``, the image a PIL image, a path or the bytes of a file.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Generic, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image

from mllama_jax.errors import InputError
from mllama_jax.processing.image import open_image
from mllama_jax.processing.tokenizer import Tokenizer

T = TypeVar("T")
ROLES = ("system", "user", "assistant", "tool", "ipython")
END = 2**31 - 1  # beyond any position: tokens yet to be generated see the last image

# Two symbols steer the way from the rendered template to token ids; printable ones, since templates may write the repr
# of a list. In what a user says they are escaped like the beginnings of special tokens.
ESCAPE = "␛"  # the next character is only itself
CUT = "␟"  # text on either side is tokenized apart

_VARIABLES = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}


@dataclass(frozen=True)
class Prompt(Generic[T]):
    """What the model is given: token ids with one image token for each picture, in order."""

    tokens: list[int]
    images: list[T]


# ---- Template -----------------------------------------------------------------------------------------------------


class ChatTemplate:
    """A Jinja chat template in the sandbox that transformers' ``apply_chat_template`` uses.

    `variables` are the special tokens that templates refer to by name, such as ``bos_token``.
    """

    def __init__(self, source: str, variables: Mapping[str, str] = _VARIABLES):
        self._made_of = (source, variables)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, cut=CUT, **variables)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise _template_error(error) from None

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[str, Mapping[str, str]]]:
        return ChatTemplate, self._made_of  # Jinja's own templates cannot go to another process

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt as text. Whatever goes wrong in a template, which may be anyone's, is an `InputError`."""
        try:
            return self._template.render(messages=messages, **variables)
        except Exception as error:
            raise _template_error(error) from None


def load_template(directory: str | os.PathLike[str]) -> ChatTemplate:
    """The chat template among a model's files, or Meta's dialog format where they have none."""
    folder = Path(directory)
    config = _read_json(folder / "tokenizer_config.json")
    variables = dict(_VARIABLES)
    for name, token in config.items():
        text = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str):
            variables[name] = text
    alone, wrapped = folder / "chat_template.jinja", _read_json(folder / "chat_template.json")
    if alone.is_file():
        try:
            return _template(alone, alone.read_text(encoding="utf-8"), variables)
        except UnicodeDecodeError:
            raise InputError(f"{alone}: expected text in UTF-8; fetch the file again") from None
    for found, where in ((wrapped, "chat_template.json"), (config, "tokenizer_config.json")):
        source = found.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = [each for each in source if isinstance(each, dict) and each.get("name") == "default"]
            source = named[0].get("template", source) if named else source
        if isinstance(source, str):
            return _template(folder / where, source, variables)
        if source is not None:
            raise InputError(f"{folder / where}: 'chat_template' must be text or a list with one named 'default'")
    default = resources.files("mllama_jax.processing").joinpath("chat_template.jinja")
    return ChatTemplate(default.read_text(encoding="utf-8"), variables)


def _template(path: Path, source: str, variables: Mapping[str, str]) -> ChatTemplate:
    """A template of the file `path`, which is named only here: what goes wrong later may be told to a server's user."""
    try:
        return ChatTemplate(source, variables)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, got an error at '{error}'; fetch the file again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}; fetch the file again")
    return content


class _Generation(Extension):
    """``{% generation %}`` marks what an assistant said; here it only groups."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON without Jinja's escaping of HTML; `ESCAPE` and `CUT` stay what they are."""
    text = json.dumps(value, ensure_ascii=False, **options)
    if not ensure_ascii:
        return text
    return re.sub(f"[^\0-~{ESCAPE}{CUT}]", lambda letter: json.dumps(letter[0])[1:-1], text)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _template_error(error: Exception) -> InputError:
    text = " ".join(str(error).split()).replace(ESCAPE, "").replace(CUT, "")
    return InputError(f"chat template: {text or type(error).__name__}")


# ---- Conversation -------------------------------------------------------------------------------------------------


def encode_conversation(
    conversation: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Prompt[Image.Image]:
    """A conversation as the model reads it, its pictures opened; see `read_conversation`."""
    read = read_conversation(
        conversation, tokenizer, template, add_generation_prompt=add_generation_prompt, tools=tools
    )
    return read.opened(open_image)


@dataclass(frozen=True)
class Read:
    """Token ids of a conversation, and the sources of its pictures in order, each with the name of its field."""

    tokens: list[int]
    sources: list[tuple[str, Any]]

    def opened(self, opener: Callable[[Any], T]) -> Prompt[T]:
        """With what a function makes of each source; its InputErrors name the fields."""
        images = []
        for where, source in self.sources:
            try:
                images.append(opener(source))
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
        return Prompt(self.tokens, images)


def read_conversation(
    conversation: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Read:
    """A conversation in token ids, beginning with exactly one beginning of text.

    Only the template writes special tokens: their names in messages and tools are mere text, even where a name comes
    about between two parts. `tools` are JSON schemas. Raises `InputError` for what is not a conversation and for what
    the template refuses.
    """
    escape = _escaper(tuple(tokenizer.specials))
    if tools is not None and not (isinstance(tools, list | tuple) and all(isinstance(each, Mapping) for each in tools)):
        raise InputError(f"tools: expected a list of JSON schemas, got {type(tools).__name__}")
    messages, sources = _check(conversation, escape)
    rendered = template.render(
        messages,
        tools=None if tools is None else _plain(tools, "tools", escape),
        documents=None,
        add_generation_prompt=add_generation_prompt,
    )
    tokens = tokenize(rendered, tokenizer)
    if sources and (count := tokens.count(tokenizer.image_token)) != len(sources):
        raise InputError(f"chat template: expected an image token for each of {len(sources)} images, got {count}")
    while tokens[:1] == [tokenizer.bos]:
        del tokens[0]
    return Read([tokenizer.bos, *tokens], sources)


def _check(
    conversation: Sequence[Mapping[str, Any]], escape: Callable[[str], str]
) -> tuple[list[dict[str, Any]], list[tuple[str, Any]]]:
    """The messages as a template may see them, and the images in order, each with the name of its field."""
    if not isinstance(conversation, list | tuple):
        raise InputError(f"conversation: expected a list of messages, got {type(conversation).__name__}")
    if not conversation:
        raise InputError("conversation: expected at least one message, got none")
    messages: list[dict[str, Any]] = []
    images: list[tuple[str, Any]] = []
    for i, message in enumerate(conversation):
        where = f"conversation[{i}]"
        if not isinstance(message, Mapping):
            raise InputError(f'{where}: expected {{"role": ..., "content": ...}}, got {type(message).__name__}')
        if message.get("role") not in ROLES:
            raise InputError(f"{where}.role: expected {', '.join(ROLES)}, got {message.get('role')!r}")
        others = {key: value for key, value in message.items() if key != "content" and value is not None}
        plain = _plain(others, where, escape)
        content = message.get("content")
        if isinstance(content, list | tuple):
            plain["content"] = [_part(part, f"{where}.content[{j}]", escape, images) for j, part in enumerate(content)]
        elif isinstance(content, str):
            plain["content"] = escape(content)
        elif content is not None or "tool_calls" not in plain:
            raise InputError(f"{where}.content: expected text or a list of parts, got {type(content).__name__}")
        messages.append(plain)
    return messages, images


def _part(part: Any, where: str, escape: Callable[[str], str], images: list[tuple[str, Any]]) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise InputError(f'{where}: expected {{"type": "text" or "image", ...}}, got {type(part).__name__}')
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise InputError(f"{where}.text: expected text, got {type(part.get('text')).__name__}")
        return {"type": "text", "text": escape(part["text"])}
    if kind == "image":
        if part.get("image") is None:
            raise InputError(f"{where}.image: expected a PIL image, a path or bytes, got none")
        images.append((f"{where}.image", part["image"]))
        return {"type": "image", "image": "image"}  # templates ask whether it is there, never what it is
    raise InputError(f"{where}.type: expected 'text' or 'image', got {kind!r}")


def _plain(value: Any, where: str, escape: Callable[[str], str]) -> Any:
    """A copy in JSON's own types: nothing with methods of its own gets into a template."""
    if isinstance(value, str):
        return escape(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(each, where, escape) for each in value]
    if isinstance(value, Mapping):
        return {_plain(key, where, escape): _plain(each, where, escape) for key, each in value.items()}
    raise InputError(f"{where}: expected JSON data, got {type(value).__name__}")


# ---- Tokens -------------------------------------------------------------------------------------------------------


@functools.cache
def _escaper(specials: tuple[str, ...]) -> Callable[[str], str]:
    """Escapes what begins a special token's name, or may begin one that goes on in the text behind."""
    beginnings = {rf"{re.escape(name[0])}(?={re.escape(name[1:2])}|\Z)" for name in specials}
    pattern = re.compile("|".join((f"[{ESCAPE}{CUT}]", *sorted(beginnings))))
    return lambda text: pattern.sub(rf"{ESCAPE}\g<0>", text)


def tokenize(rendered: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of what a template rendered: names of special tokens become those tokens, but where escaped."""
    text, *marks = re.split(f"{ESCAPE}(.)|{tokenizer.special_names}|{CUT}", rendered, flags=re.DOTALL)
    tokens: list[int] = []
    for escaped, name, behind in zip(marks[::3], marks[1::3], marks[2::3], strict=True):
        if escaped:
            text += escaped + behind
            continue
        tokens += tokenizer.encode(text, specials=False)
        if name:
            tokens.append(tokenizer.special(name))
        text = behind
    return tokens + tokenizer.encode(text, specials=False)


def image_spans(tokens: Sequence[int], image_token: int) -> list[tuple[int, int]]:
    """For each image the positions [start, end) that see it: from its token to the next image's, the last for ever.

    Images whose tokens stand together share the range of the last of them (``create_vision_mask`` in llama-models,
    which ends the last of several images with the prompt; generated tokens would see none).
    """
    starts = [position for position, token in enumerate(tokens) if token == image_token]
    spans: list[tuple[int, int]] = []
    end = following = END
    for start in reversed(starts):
        end = end if following == start + 1 else following
        spans.append((start, end))
        following = start
    return spans[::-1]
