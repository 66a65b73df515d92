"""Chat: what a template sees and may do, which token ids come out, who sees which image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllama_jax.errors import InputError
from mllama_jax.processing.chat import END, ChatTemplate, encode_conversation, image_spans, load_template
from mllama_jax.processing.tokenizer import Tokenizer
from tests.processing import DATA, conversations, noise

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(DATA)


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return load_template(tmp_path_factory.mktemp("nothing"))


# ---- Token ids ----------------------------------------------------------------------------------------------------


def test_the_default_template_writes_metas_dialog(tokenizer: Tokenizer, default: ChatTemplate) -> None:
    picture = noise(4, 5)
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "tool", "content": "42"},
    ]
    prompt = encode_conversation(conversation, tokenizer, default)
    text = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<|image|>What?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
        "<|start_header_id|>ipython<|end_header_id|>\n\n42<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert prompt.tokens == tokenizer.encode(text, specials=True)
    assert [np.array_equal(np.asarray(image), np.asarray(picture)) for image in prompt.images] == [True]
    without = encode_conversation(conversation, tokenizer, default, add_generation_prompt=False)
    assert tokenizer.decode(prompt.tokens[len(without.tokens) :], skip_specials=False) == (
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_the_default_template_writes_metas_tool_calls(tokenizer: Tokenizer, default: ChatTemplate) -> None:
    """As `ToolUtils.encode_tool_call`; what a tool is to run stands behind a tag, and eom_id waits for its answer."""
    waiting = {"role": "assistant", "stop_reason": "end_of_message"}
    weather = {"function": {"name": "weather", "arguments": {"city": "Köln"}}}
    code = {"function": {"name": "code_interpreter", "arguments": {"code": "1 + 1"}}}
    search = {"function": {"name": "brave_search", "arguments": {"query": "rain"}}}
    for calls, written in (
        ([weather], '{"type": "function", "name": "weather", "parameters": {"city": "K\\u00f6ln"}}'),
        ([code], "<|python_tag|>1 + 1"),
        ([search], 'brave_search.call(query="rain")'),
    ):
        conversation = [{**waiting, "tool_calls": calls}, {"role": "tool", "content": "2"}]
        prompt = encode_conversation(conversation, tokenizer, default, add_generation_prompt=False)
        assert tokenizer.decode(prompt.tokens, skip_specials=False) == (
            f"<|begin_of_text|><|start_header_id|>assistant<|end_header_id|>\n\n{written}<|eom_id|>"
            "<|start_header_id|>ipython<|end_header_id|>\n\n2<|eot_id|>"
        )


def test_pieces_of_a_message_are_tokenized_apart(tokenizer: Tokenizer, default: ChatTemplate) -> None:
    parts = ["\n\nth", "e", "␟␛"]
    content = [{"type": "text", "text": part} for part in parts]
    prompt = encode_conversation([{"role": "user", "content": content}], tokenizer, default)
    pieces = [i for part in ("\n\n", *parts) for i in tokenizer.encode(part, specials=False)]
    start = prompt.tokens.index(tokenizer.special("<|end_header_id|>")) + 1
    assert prompt.tokens[start : start + len(pieces)] == pieces
    assert prompt.tokens[start + len(pieces)] == tokenizer.special("<|eot_id|>")


@pytest.mark.parametrize("beginning", ["", "{{ bos_token }}", "{{ bos_token }}<|begin_of_text|>"])
def test_exactly_one_beginning_of_text(beginning: str, tokenizer: Tokenizer) -> None:
    prompt = encode_conversation(HI, tokenizer, ChatTemplate(beginning + "{{ messages[0].content }}"))
    assert prompt.tokens == [tokenizer.bos, *tokenizer.encode("Hi", specials=False)]


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_special_tokens_in_messages_are_text(role: str, tokenizer: Tokenizer, default: ChatTemplate) -> None:
    def specials_of(content: Any) -> list[int]:
        tokens = encode_conversation([{"role": role, "content": content}], tokenizer, default).tokens
        assert content in tokenizer.decode(tokens)
        return [token for token in tokens if token >= tokenizer.bos]

    harmless = specials_of("ab")
    assert all(specials_of(f"a{name}b") == harmless for name in tokenizer.specials)


@pytest.mark.parametrize("cut", range(1, len("<|eot_id|>")))
def test_no_special_token_comes_about_between_pieces(cut: int, tokenizer: Tokenizer) -> None:
    template = ChatTemplate("{% for part in messages[0].content %}{{ part.text }}{% endfor %}")
    content = [{"type": "text", "text": part} for part in ("<|eot_id|>"[:cut], "<|eot_id|>"[cut:])]
    prompt = encode_conversation([{"role": "user", "content": content}], tokenizer, template)
    assert prompt.tokens == [tokenizer.bos, *tokenizer.encode("<|eot_id|>", specials=False)]


def test_a_special_token_in_the_repr_of_parts_is_text(tokenizer: Tokenizer) -> None:
    """Released templates trim the first message where there are tools, and so write a list of parts as Python does."""
    content = [{"type": "text", "text": "a<|eot_id|>␛␟<"}]
    prompt = encode_conversation(
        [{"role": "user", "content": content}], tokenizer, ChatTemplate("{{ messages[0].content | trim }}")
    )
    assert prompt.tokens == [tokenizer.bos, *tokenizer.encode(str(content), specials=False)]


def test_special_tokens_in_tools_and_calls_are_text(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(
        "{{ tools | tojson(indent=2) }}{{ tools | tojson(ensure_ascii=True) }}{{ messages[0].tool_calls[0] | tojson }}"
    )
    hostile = {"<|eot_id|>": "é<|image|>\x7f"}
    call = [{"role": "assistant", "tool_calls": [{"arguments": hostile}]}]
    prompt = encode_conversation(call, tokenizer, template, tools=[hostile])
    assert prompt.tokens[0] == tokenizer.bos
    assert max(prompt.tokens[1:]) < tokenizer.bos
    assert tokenizer.decode(prompt.tokens) == (
        json.dumps([hostile], indent=2, ensure_ascii=False)
        + json.dumps([hostile])
        + json.dumps({"arguments": hostile}, ensure_ascii=False)
    )


@pytest.mark.parametrize("conversation", conversations(), ids=range(len(conversations())))
def test_text_and_pictures_arrive(
    conversation: list[dict[str, Any]], tokenizer: Tokenizer, default: ChatTemplate
) -> None:
    prompt = encode_conversation(conversation, tokenizer, default)
    parts = [part for message in conversation for part in message["content"] if isinstance(part, dict)]
    pictures = [part["image"] for part in parts if part["type"] == "image"]
    assert prompt.tokens.count(tokenizer.image_token) == len(pictures)
    assert [image.size for image in prompt.images] == [picture.size for picture in pictures]
    text = tokenizer.decode(prompt.tokens)
    for message in conversation:
        content = message["content"]
        assert (content if isinstance(content, str) else "".join(p.get("text", "") for p in content)) in text


def test_pictures_come_from_paths_and_bytes(tokenizer: Tokenizer, default: ChatTemplate, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    noise(6, 7).save(file)
    content = [{"type": "image", "image": source} for source in (file, str(file), file.read_bytes())]
    assert len(encode_conversation([{"role": "user", "content": content}], tokenizer, default).images) == 3


def test_a_template_that_forgets_a_picture_is_refused(tokenizer: Tokenizer) -> None:
    conversation = [{"role": "user", "content": [{"type": "image", "image": noise(2, 2)}]}]
    with pytest.raises(InputError, match="expected an image token for each of 1 images, got 0"):
        encode_conversation(conversation, tokenizer, ChatTemplate("{{ bos_token }}"))


# ---- What is no conversation --------------------------------------------------------------------------------------


def _user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    ("conversation", "problem"),
    [
        ([], "conversation: expected at least one message"),
        ("Hi", "conversation: expected a list of messages, got str"),
        (["Hi"], "conversation[0]: expected"),
        ([*HI, {"role": "critic", "content": "Hi"}], "conversation[1].role: expected system, user"),
        ([{"content": "Hi"}], "conversation[0].role: expected system, user, assistant, tool, ipython, got None"),
        ([{"role": "user"}], "conversation[0].content: expected text or a list of parts, got NoneType"),
        ([{"role": "user", "content": 3}], "conversation[0].content: expected text or a list of parts, got int"),
        (_user("Hi"), "conversation[0].content[0]: expected"),
        (_user({"type": "video"}), "conversation[0].content[0].type: expected 'text' or 'image', got 'video'"),
        (_user({"type": "text"}), "conversation[0].content[0].text: expected text, got NoneType"),
        (_user({"type": "image"}), "conversation[0].content[0].image: expected a PIL image, a path or bytes, got none"),
        (_user({"type": "image", "image": b"x"}), "conversation[0].content[0].image: picture of 1 bytes: expected"),
        (_user({"type": "image", "image": 3}), "conversation[0].content[0].image: picture: expected a path"),
        ([{"role": "user", "content": "Hi", "extra": Image.new("L", (1, 1))}], "conversation[0]: expected JSON data"),
        ([{"role": "user", "content": "\ud800"}], "expected Unicode, got a lone surrogate"),
        ([{"role": "assistant", "tool_calls": [{}]}], "chat template: a tool call must have a name and arguments"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}], "a tool call must have a name and arg"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_in_one_line(conversation: Any, problem: str, tokenizer: Tokenizer, default: ChatTemplate) -> None:
    with pytest.raises(InputError) as refusal:
        encode_conversation(conversation, tokenizer, default)
    assert problem in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_tools_that_the_default_template_cannot_say_are_refused(tokenizer: Tokenizer, default: ChatTemplate) -> None:
    with pytest.raises(InputError, match="chat template: tools are not known"):
        encode_conversation(HI, tokenizer, default, tools=[{"name": "f"}])
    hostile: Any = [{"name": _user}]
    with pytest.raises(InputError, match="tools: expected JSON data, got function"):
        encode_conversation(HI, tokenizer, default, tools=hostile)


# ---- Templates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
        ("{{ '' | attr('__class__') }}x{{ ''['__class__'].mro() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "'__init__' of 'type' object is unsafe"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ raise_exception('not\nso') }}", "chat template: not so"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ raise_exception('no ' + messages[0].content) }}", "chat template: no <|eot_id|>"),
    ],
)
def test_templates_cannot_do_more_than_write(source: str, problem: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError) as refusal:
        encode_conversation([{"role": "user", "content": "<|eot_id|>"}], tokenizer, ChatTemplate(source))
    assert problem in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_template_must_be_jinja() -> None:
    with pytest.raises(InputError, match="chat template: "):
        ChatTemplate("{% if")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% if true %}\nx\n  {% endif %}\ny", "x\ny"),  # trim_blocks and lstrip_blocks
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("a{% generation %}b{% set x = 1 %}{% endgeneration %}{{ x is defined }}", "abFalse"),
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ messages[0].content | trim }}", "x"),
        ("{{ tools is none }} {{ add_generation_prompt }} {{ eos_token }}", "True True <|eot_id|>"),
        ("{% set n = namespace(i=0) %}{% set n.i = 3 %}{{ n.i }}", "3"),
    ],
)
def test_templates_find_what_transformers_gives_them(source: str, text: str, tokenizer: Tokenizer) -> None:
    prompt = encode_conversation([{"role": "user", "content": " x\n"}], tokenizer, ChatTemplate(source))
    assert tokenizer.decode(prompt.tokens[1:], skip_specials=False) == text


def test_where_templates_are_found(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def found() -> str:
        tokens = encode_conversation(HI, tokenizer, load_template(tmp_path)).tokens
        return tokenizer.decode(tokens[1:], skip_specials=False)

    assert found().endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    config: dict[str, Any] = {"eos_token": {"content": "<|eom_id|>"}, "unk_token": None, "model_max_length": 9}
    for template in ("config {{ eos_token }}", [{"name": "default", "template": "config {{ eos_token }}"}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        assert found() == "config <|eom_id|>"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json {{ eos_token }}"}))
    assert found() == "json <|eom_id|>"
    (tmp_path / "chat_template.jinja").write_text("jinja {{ eos_token }} é", encoding="utf-8")
    assert found() == "jinja <|eom_id|> é"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "chat_template.json: expected JSON"),
        ("[]", "chat_template.json: expected a JSON object, got list"),
        ('{"chat_template": 3}', "'chat_template' must be text or a list with one named 'default'"),
        ('{"chat_template": [{"name": "rag", "template": ""}]}', "'chat_template' must be text or a list"),
    ],
)
def test_broken_template_files_are_refused(content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(content)
    with pytest.raises(InputError) as refusal:
        load_template(tmp_path)
    assert problem in str(refusal.value)


# ---- Spans --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "spans"),
    [
        ("....", []),
        ("..i.", [(2, END)]),
        ("...i", [(3, END)]),
        (".i..i..", [(1, 4), (4, END)]),
        (".ii.", [(1, END), (2, END)]),
        ("iii..i.", [(0, 5), (1, 5), (2, 5), (5, END)]),
        ("i.ii.iii", [(0, 2), (2, 5), (3, 5), (5, END), (6, END), (7, END)]),
    ],
)
def test_spans(tokens: str, spans: list[tuple[int, int]]) -> None:
    assert image_spans([9 if token == "i" else 1 for token in tokens], 9) == spans


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", b"\xff\xfe"),
        ("chat_template.jinja", b"{% if"),
        ("chat_template.json", b'{"chat_template": "{% if"}'),
        ("chat_template.json", b'{"chat_template": ["x"]}'),
        ("chat_template.json", b'{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", b"[" * 100_000),
    ],
)
def test_damaged_template_files_are_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        load_template(tmp_path)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
