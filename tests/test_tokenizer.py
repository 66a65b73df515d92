"""The tokenizer, on a small vocabulary in Meta's format; `tests/oracle` repeats it on the real one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tokenizers

from mllama_jax.errors import InputError
from mllama_jax.processing.tokenizer import SPECIALS, TextStream, Tokenizer
from tests.processing import DATA, TEXTS

BASE = 700  # tokens of the small vocabulary before the special ones


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(DATA)


def save_json(directory: Path) -> tokenizers.Tokenizer:
    """The small vocabulary as Hugging Face's file."""
    backend = Tokenizer.from_directory(DATA)._backend
    backend.encode_special_tokens = False
    backend.save(str(directory / "tokenizer.json"))
    return backend


def test_ids_equal_tiktoken(tokenizer: Tokenizer) -> None:
    assert [tokenizer.encode(text, specials=False) for text in TEXTS] == json.loads((DATA / "ids.json").read_text())


def test_text_comes_back(tokenizer: Tokenizer) -> None:
    for specials in (True, False):
        ids = [tokenizer.encode(text, specials=specials) for text in TEXTS]
        assert [tokenizer.decode(each, skip_specials=False) for each in ids] == TEXTS


def test_special_tokens_follow_the_vocabulary_and_the_image_token_follows_them(tokenizer: Tokenizer) -> None:
    assert tokenizer.specials == {name: BASE + i for i, name in enumerate(SPECIALS)}
    assert tokenizer.vocab_size == tokenizer.image_token == BASE + 256
    assert tokenizer.bos == BASE
    assert tokenizer.special("<|eot_id|>") == BASE + 9
    assert tokenizer.special("<|reserved_special_token_2|>") == BASE + 11
    assert tokenizer.special("<|reserved_special_token_246|>") == BASE + 255


def test_names_of_special_tokens_are_text_unless_asked_for(tokenizer: Tokenizer) -> None:
    text = "a<|image|><|eot_id|> b"
    plain = tokenizer.encode(text, specials=False)
    assert max(plain) < BASE
    assert tokenizer.encode(text, specials=True) == [
        *tokenizer.encode("a", specials=False),
        tokenizer.image_token,
        tokenizer.special("<|eot_id|>"),
        *tokenizer.encode(" b", specials=False),
    ]
    assert tokenizer.decode(tokenizer.encode(text, specials=True)) == "a b"


def test_tokenizer_json_is_the_same_and_goes_first(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_json(tmp_path)
    (tmp_path / "tokenizer.model").write_text("not read")
    other = Tokenizer.from_directory(tmp_path)
    assert (other.specials, other.vocab_size) == (tokenizer.specials, tokenizer.vocab_size)
    for text in TEXTS:
        assert other.encode(text, specials=True) == tokenizer.encode(text, specials=True)


def test_truncation_and_padding_saved_with_a_tokenizer_do_not_count(tmp_path: Path) -> None:
    backend = save_json(tmp_path)
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.decode(tokenizer.encode("one two three", specials=False)) == "one two three"
    assert len(tokenizer.encode("e", specials=False)) == 1


def test_a_stream_adds_up_to_the_whole_text(tokenizer: Tokenizer) -> None:
    draw = random.Random(2)
    for _ in range(300):
        ids = [draw.randrange(tokenizer.vocab_size + 1) for _ in range(draw.randint(0, 12))]
        for skip in (True, False):
            stream = TextStream(tokenizer, skip_specials=skip)
            pieces = [stream.push(i) for i in ids]
            assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids, skip_specials=skip)


def test_a_stream_cuts_no_character(tokenizer: Tokenizer) -> None:
    text = "né 👩 我"
    stream = TextStream(tokenizer)
    pieces = [stream.push(byte_token(tokenizer, byte)) for byte in text.encode()]
    assert [piece for piece in pieces if piece] == list(text)
    assert stream.finish() == ""
    for byte in "👩".encode()[:2]:
        assert stream.push(byte_token(tokenizer, byte)) == ""
    assert stream.finish() == "\ufffd"


def byte_token(tokenizer: Tokenizer, byte: int) -> int:
    return next(i for i in range(256) if tokenizer.token_bytes(i) == bytes([byte]))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer.model", b"IQ== 0\nnonsense\n", "line 2: expected a base64 token and its rank, got b'nonsense'"),
        ("tokenizer.model", b"IQ== 0\n!!!! 1\n", "line 2: expected a base64 token"),
        ("tokenizer.model", b"IQ== 0\nIg== 2\n", "expected ranks 0, 1, 2, ... with all 256 bytes, got 2 tokens"),
        ("tokenizer.model", b"", "got 0 tokens"),
        ("tokenizer.json", b"{", "expected a tokenizer, got"),
        ("README", b"", "expected tokenizer.json or tokenizer.model, got neither"),
    ],
)
def test_broken_files_are_refused(name: str, content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as refusal:
        Tokenizer.from_directory(tmp_path)
    assert problem in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="expected byte-level BPE, got WordLevel"):
        Tokenizer.from_directory(tmp_path)


def test_what_is_no_token_is_refused(tokenizer: Tokenizer) -> None:
    for i in (BASE + 257, -1, 1 << 40):
        with pytest.raises(InputError, match=f"token id {i}"):
            tokenizer.decode([i])
    with pytest.raises(InputError, match="special token '<|no|>' is missing".replace("|", r"\|")):
        tokenizer.special("<|no|>")
    with pytest.raises(InputError, match="lone surrogate"):
        tokenizer.encode("\ud800", specials=False)
