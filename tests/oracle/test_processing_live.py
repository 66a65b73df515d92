"""Processing beside Meta's and transformers' own code, on the real vocabulary that llama-models carries."""

from __future__ import annotations

import io
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllama_jax.config import ASPECT_RATIOS, VisionConfig
from mllama_jax.errors import InputError
from mllama_jax.processing.chat import ChatTemplate, encode_conversation, image_spans, load_template
from mllama_jax.processing.image import preprocess
from mllama_jax.processing.tokenizer import SPECIALS, WORDS, TextStream, Tokenizer
from tests.processing import MODES, PICTURES, TEXTS, conversations, noise

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracles' warnings are not ours

# What released templates do: trimmed content, dates, tools as JSON, calls, refusals, loop controls, namespaces.
TEMPLATES = {
    "trimmed": """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for content in message['content'] %}
            {%- if content['type'] == 'image' %}
                {{- '<|image|>' }}
            {%- elif content['type'] == 'text' %}
                {{- content['text'] | trim }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}""",
    "dated, with tools": """{{ bos_token }}{% set date = strftime_now('%d %b %Y') %}
{% set seen = namespace(images=0) %}
{% for message in messages if message.content is not string %}
{% for part in message.content if 'image' in part %}{% set seen.images = seen.images + 1 %}{% endfor %}
{% endfor %}
{% if messages[0].role == 'system' and seen.images %}{{ raise_exception('no system message with images') }}{% endif %}
<|start_header_id|>system<|end_header_id|>

Today Date: {{ date }}
{% if tools is not none %}{% for tool in tools %}{{ tool | tojson(indent=4) }}

{% endfor %}{% endif %}<|eot_id|>
{% for message in messages %}
    {% if message.role == 'tool' %}{% generation %}skipped{% endgeneration %}{% continue %}{% endif %}
<|start_header_id|>{{ message.role }}<|end_header_id|>

    {%- if message.content is string %}{{ message.content }}{% else %}
    {% for part in message.content %}{{ '<|image|>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}
    {%- if message.tool_calls %}<|python_tag|>{{ message.tool_calls[0].function | tojson }}{% endif %}<|eot_id|>
{% endfor %}{{ eos_token }}{{ pad_token }}{{ unk_token }}""",
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": 'é <b> "q"', "parameters": {}}}]
HOSTILE_TOOLS = [{"name": "f", "description": "<|eot_id|><|image|> <|start_header_id|>"}]


def meta_directory() -> Path:
    import llama_models.llama3

    return Path(llama_models.llama3.__file__).parent


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(meta_directory())


@pytest.fixture(scope="module")
def meta_tokenizer():
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    return MetaTokenizer.get_instance()


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory):
    """transformers' own conversion of Meta's file, arranged as in the releases."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    file = str(meta_directory() / "tokenizer.model")
    converted = TikTokenConverter(vocab_file=file, pattern=WORDS, extra_special_tokens=list(SPECIALS)).converted()
    tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
    return PreTrainedTokenizerFast(tokenizer_object=converted, **tokens)


# ---- Pictures -----------------------------------------------------------------------------------------------------


def random_pictures(count: int, largest: int, seed: int) -> list[Image.Image]:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, largest, (count, 2))
    return [Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.mark.parametrize(("tile", "count"), [(28, 300), (56, 200), (448, 12), (560, 12)])
def test_pixels_equal_transformers(tile: int, count: int) -> None:
    from tests.oracle.make_processing_goldens import image_processor

    pictures = random_pictures(count, 6 * tile, seed=tile)
    if tile < 100:
        pictures += [noise(*picture) for picture in PICTURES]
    processor = image_processor(tile)
    for picture in pictures:
        theirs = processor(images=[[picture]], return_tensors="np")
        pixels, ids = preprocess([picture], VisionConfig(tile=tile))
        assert np.array_equal(pixels.view(np.int32), theirs["pixel_values"][0].view(np.int32)), (
            picture.mode,
            picture.size,
        )
        assert np.array_equal(ids, theirs["aspect_ratio_ids"][0])


def test_a_photo_takes_no_longer_than_with_transformers() -> None:
    """12 megapixels, and eight such at once; the quickest of several turns each, since other work may be going on."""
    from tests.oracle.make_processing_goldens import image_processor

    rough = np.random.default_rng(0).integers(0, 256, (378, 504, 3), np.uint8)
    photo = Image.fromarray(rough).resize((4032, 3024), Image.Resampling.BICUBIC)
    processor = image_processor(560)
    for photos, turns in (([photo], 9), ([photo.copy() for _ in range(8)], 3)):
        ours, theirs = [], []
        for _ in range(turns):
            start = time.perf_counter()
            preprocess(photos, VisionConfig())
            middle = time.perf_counter()
            processor(images=[photos], return_tensors="np")
            ours.append(middle - start)
            theirs.append(time.perf_counter() - middle)
        assert min(ours) <= 1.1 * min(theirs)


@pytest.mark.parametrize(("tile", "count"), [(28, 300), (56, 100), (560, 10)])
def test_pixels_equal_meta(tile: int, count: int) -> None:
    from tests.oracle import torchvision_stub

    with torchvision_stub.standing_in():
        from llama_models.llama3.multimodal.image_transform import VariableSizeImageTransform

    transform = VariableSizeImageTransform(size=tile)
    opaque = [mode for mode in MODES if "A" not in mode]
    pictures = random_pictures(count, 6 * tile, seed=tile + 1) + [noise(131, 77, mode) for mode in opaque]
    compared = 0
    for picture in pictures:
        try:
            theirs, ratio = transform(picture.convert("RGB"), max_num_chunks=4)
        except ValueError:  # a side of less than a pixel
            assert max(picture.size) > tile * min(picture.size)
            continue
        pixels, ids = preprocess([picture], VisionConfig(tile=tile))
        assert np.array_equal(pixels[0, : len(theirs)].view(np.int32), theirs.numpy().view(np.int32)), picture.size
        assert ASPECT_RATIOS[ids[0] - 1] == tuple(ratio)
        compared += 1
    assert compared > 0.9 * len(pictures)


# ---- Token ids ----------------------------------------------------------------------------------------------------


def fuzz(count: int) -> list[str]:
    draw = random.Random(17)
    planes = [(0x20, 0x250), (0x370, 0x1200), (0x3000, 0xA000), (0x1F300, 0x1FB00), (0xE000, 0x10FFFF)]
    texts = [
        "".join(chr(draw.randrange(*draw.choice(planes))) for _ in range(draw.randint(1, 40))) for _ in range(count)
    ]
    broken = [draw.randbytes(draw.randint(1, 60)).decode("utf-8", "replace") for _ in range(count)]
    return texts + broken + [source.read_text() for source in Path(__file__).parent.glob("*.py")]


def test_ids_equal_tiktoken(tokenizer: Tokenizer, meta_tokenizer) -> None:
    for text in [*TEXTS, *fuzz(2000)]:
        plain = tokenizer.encode(text, specials=False)
        assert plain == meta_tokenizer.encode(text, bos=False, eos=False)
        assert tokenizer.decode(plain) == text
        special = meta_tokenizer.encode(text, bos=False, eos=False, allowed_special="all")
        if "<|reserved_special_token_2|>" not in text:  # its id is the image token's at Meta
            assert tokenizer.encode(text, specials=True) == [remap(i, meta_tokenizer) for i in special]


def remap(i: int, meta_tokenizer) -> int:
    """Meta's id as the model embeds it."""
    return 128256 if i == meta_tokenizer.special_tokens["<|image|>"] else i


def test_decoding_equals_tiktoken(tokenizer: Tokenizer, meta_tokenizer) -> None:
    draw = random.Random(19)
    for _ in range(2000):
        ids = [draw.randrange(128_000) for _ in range(draw.randint(0, 12))]
        stream = TextStream(tokenizer)
        streamed = "".join([*map(stream.push, ids), stream.finish()])
        assert meta_tokenizer.decode(ids) == tokenizer.decode(ids) == streamed


def test_the_rebuilt_tokenizer_is_transformers(tokenizer: Tokenizer, hugging_face) -> None:
    ours, theirs = (json.loads(each.to_str()) for each in (tokenizer._backend, hugging_face.backend_tokenizer))
    assert ours["model"]["vocab"] == theirs["model"]["vocab"]
    assert ours["model"]["merges"] == theirs["model"]["merges"]
    added = [{token["content"]: token["id"] for token in each["added_tokens"]} for each in (ours, theirs)]
    assert added[0] == added[1]
    assert (tokenizer.image_token, tokenizer.bos, tokenizer.vocab_size) == (128256, 128000, 128256)
    for text in [*TEXTS, *fuzz(500)]:
        assert tokenizer.encode(text, specials=True) == hugging_face.encode(text, add_special_tokens=False)


# ---- Chat ---------------------------------------------------------------------------------------------------------


def chats() -> list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]]:
    """Conversations and the tools that go with them."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "é<1>"}}}]}
    cases = [(conversation, tools) for conversation in conversations() for tools in (None, TOOLS, HOSTILE_TOOLS)]
    return [*cases, ([{"role": "user", "content": "go"}, call, {"role": "tool", "content": "3"}], TOOLS)]


def segments(tokens: list[int], tokenizer: Tokenizer) -> list[str | int]:
    """Special tokens, and the text between them."""
    found: list[str | int] = [""]
    for token in tokens:
        if token >= tokenizer.bos:
            found += [token, ""]
        else:
            found[-1] += tokenizer.token_bytes(token).decode("latin-1")
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_equal_apply_chat_template(name: str, tokenizer: Tokenizer, hugging_face) -> None:
    """Asked to, transformers too reads names of special tokens as text, but cuts the text around them before BPE.

    So ids are compared where there are no such names, and what is special and the text between where there are.
    """
    from jinja2 import TemplateError

    source, equal, hostile = TEMPLATES[name], 0, 0
    for conversation, tools in chats():
        options = {"tools": tools, "add_generation_prompt": (equal + hostile) % 3 > 0}
        given = repr([message["content"] for message in conversation]) + repr(tools)
        sanitize = any(special in given for special in SPECIALS)
        try:
            theirs = hugging_face.apply_chat_template(
                conversation, chat_template=source, sanitize_control_tokens=sanitize, return_dict=False, **options
            )
        except TemplateError as refusal:
            with pytest.raises(InputError, match=str(refusal)):
                encode_conversation(conversation, tokenizer, ChatTemplate(source), **options)
            continue
        ours = encode_conversation(conversation, tokenizer, ChatTemplate(source), **options).tokens
        if sanitize:
            assert segments(ours, tokenizer) == segments(theirs, tokenizer)
            hostile += 1
        else:
            assert ours == theirs
            equal += 1
    assert min(equal, hostile) > 60


def test_the_default_template_equals_meta(tokenizer: Tokenizer, meta_tokenizer, tmp_path: Path) -> None:
    from llama_models.datatypes import RawMediaItem, RawMessage, RawTextItem
    from llama_models.llama3.chat_format import ChatFormat

    def item(part: dict[str, Any]) -> Any:
        if part["type"] == "text":
            return RawTextItem(text=part["text"])
        file = io.BytesIO()
        part["image"].save(file, "PNG")
        return RawMediaItem(data=file.getvalue())

    template, form = load_template(tmp_path), ChatFormat(meta_tokenizer)
    joined = [{"type": "text", "text": text} for text in ("<", "|eot_id|>", "\n\n", " x")]
    for conversation in [*conversations(), [{"role": "user", "content": joined}]]:
        dialog = [
            RawMessage(
                role="tool" if message["role"] == "ipython" else message["role"],
                content=content if isinstance(content := message["content"], str) else [item(part) for part in content],
            )
            for message in conversation
        ]
        theirs = form.encode_dialog_prompt(dialog)
        ours = encode_conversation(conversation, tokenizer, template)
        assert ours.tokens == theirs.tokens
        pictures = theirs.vision.images if theirs.vision else []
        assert [np.array_equal(a, b) for a, b in zip(ours.images, pictures, strict=True)] == [True] * len(pictures)


CALLS: list[list[tuple[str, dict[str, Any]]]] = [
    [("f", {"x": "é <|eot_id|>", "n": [1, 2.5, None, True], "deep": {"a": "b", "c": 3}})],
    [("f", {}), ("g", {"y": "'\"\\"})],
    [("brave_search", {"query": 'who "is"'})],
    [("wolfram_alpha", {"query": "1+1"}), ("photogen", {"query": "a cat"})],
    [("code_interpreter", {"code": "print('<|python_tag|>')\n"})],
    [("f", {"x": 1}), ("code_interpreter", {"code": "2"})],
]


def test_tool_calls_of_the_default_template_equal_meta(tokenizer: Tokenizer, meta_tokenizer, tmp_path: Path) -> None:
    from llama_models.datatypes import BuiltinTool, RawMessage, StopReason, ToolCall
    from llama_models.llama3.chat_format import ChatFormat

    template, form, equal = load_template(tmp_path), ChatFormat(meta_tokenizer), 0
    for calls in CALLS:
        for content in ("", "Let me see. "):
            for reason in StopReason:
                made = [
                    ToolCall(
                        call_id="1",
                        tool_name=BuiltinTool[name] if name in BuiltinTool.__members__ else name,
                        arguments=arguments,
                    )
                    for name, arguments in calls
                ]
                theirs = form.encode_dialog_prompt(
                    [
                        RawMessage(role="user", content="go"),
                        RawMessage(role="assistant", content=content, tool_calls=made, stop_reason=reason),
                        RawMessage(role="tool", content="3"),
                    ]
                )
                named = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
                assistant = {"role": "assistant", "content": content, "stop_reason": reason.value}
                conversation = [
                    {"role": "user", "content": "go"},
                    {**assistant, "tool_calls": named},
                    {"role": "tool", "content": "3"},
                ]
                assert encode_conversation(conversation, tokenizer, template).tokens == theirs.tokens
                equal += 1
    assert equal == 36


def test_spans_equal_meta() -> None:
    """But for the end of the last image, which is open in ours and with Meta only where it is the only one."""
    from llama_models.llama3.chat_format import create_vision_mask

    draw = random.Random(23)
    for _ in range(2000):
        tokens = draw.choices([9, 1], weights=[1, 2], k=draw.randint(1, 14))
        theirs = create_vision_mask(tokens, 9)
        assert [(s, min(e, len(tokens))) for s, e in image_spans(tokens, 9)] == [
            (start, len(tokens) if end == -1 else end) for start, end in theirs
        ]
