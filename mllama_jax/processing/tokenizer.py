"""Llama 3's tokenizer: byte-level BPE over the `tokenizers` library, from Hugging Face's file or from Meta's."""

from __future__ import annotations

import base64
import codecs
import os
import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from mllama_jax.errors import InputError

IMAGE = "<|image|>"

# How text is cut into words before BPE (``Tokenizer.pat_str`` in llama-models).
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

# Meta's 256 specials have the image token twelfth, but the model embeds it at the vocabulary size. As in Hugging Face's
# file, the twelfth is a reserved one here and the image token has the id of its embedding.
_NAMED = [
    "begin_of_text",
    "end_of_text",
    "reserved_special_token_0",
    "reserved_special_token_1",
    "finetune_right_pad_id",
    "step_id",
    "start_header_id",
    "end_header_id",
    "eom_id",
    "eot_id",
    "python_tag",
]
_RESERVED = [f"reserved_special_token_{2 + i}" for i in range(256 - len(_NAMED))]
SPECIALS = (*(f"<|{name}|>" for name in _NAMED + _RESERVED), IMAGE)


def _byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte in byte-level BPE (``bytes_to_unicode`` of GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_LETTERS = _byte_letters()
_BYTES = {letter: byte for byte, letter in _LETTERS.items()}


class Tokenizer:
    """Text to token ids and back. Nothing is ever added by itself: no beginning of text, no end."""

    def __init__(self, backend: tokenizers.Tokenizer):
        """`backend`: byte-level BPE of the `tokenizers` library, which belongs to this object from then on."""
        if not isinstance(backend.model, models.BPE) or not isinstance(backend.decoder, decoders.ByteLevel):
            raise InputError(
                f"tokenizer: expected byte-level BPE, got {type(backend.model).__name__} with "
                f"{type(backend.decoder).__name__} decoding; is this a Llama 3 tokenizer?"
            )
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # `encode` finds the specials, where they are wanted
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._added = {i: token.content for i, token in added.items()}
        self._specials = {token.content: i for i, token in added.items() if token.special}
        self._special_ids = frozenset(self._specials.values())
        longest_first = sorted(map(re.escape, self._specials), key=len, reverse=True)
        self.special_names = f"({'|'.join(longest_first) or '(?!)'})"  # a regular expression

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read ``tokenizer.json`` (Hugging Face) or, where there is none, ``tokenizer.model`` (Meta) in `path`."""
        hugging_face, meta = Path(path, "tokenizer.json"), Path(path, "tokenizer.model")
        if hugging_face.is_file():
            try:
                return cls(tokenizers.Tokenizer.from_file(str(hugging_face)))
            except InputError:
                raise
            except Exception as error:  # the library raises nothing narrower
                reason = " ".join(str(error).split())
                raise InputError(f"{hugging_face}: expected a tokenizer, got '{reason}'; fetch it again") from None
        if meta.is_file():
            return cls(_from_ranks(_read_ranks(meta)))
        raise InputError(f"{os.fspath(path)}: expected tokenizer.json or tokenizer.model, got neither; copy one there")

    @property
    def vocab_size(self) -> int:
        """How many tokens the model can produce: the image token, which lies just behind them, can only be read."""
        return self._backend.get_vocab_size() - (IMAGE in self._specials)

    @property
    def bos(self) -> int:
        return self.special("<|begin_of_text|>")

    @property
    def image_token(self) -> int:
        return self.special(IMAGE)

    @property
    def specials(self) -> dict[str, int]:
        """Every special token's name and id."""
        return dict(self._specials)

    def special(self, name: str) -> int:
        """The id of a special token such as ``<|eot_id|>``."""
        if name not in self._specials:
            raise InputError(f"tokenizer: special token {name!r} is missing; is this a Llama 3.2 Vision tokenizer?")
        return self._specials[name]

    def encode(self, text: str, *, specials: bool) -> list[int]:
        """Token ids of `text`. Names of special tokens become those tokens with `specials`, else they are mere text."""
        if not specials:
            return self._encode_plain(text)
        ids: list[int] = []
        for part in filter(None, re.split(self.special_names, text)):
            ids += [self._specials[part]] if part in self._specials else self._encode_plain(part)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise InputError("text: expected Unicode, got a lone surrogate; decode it with errors='replace'") from None

    def decode(self, ids: Iterable[int], *, skip_specials: bool = True) -> str:
        """The text of token ids. Bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(i, skip_specials=skip_specials) for i in ids).decode(errors="replace")

    def token_bytes(self, i: int, *, skip_specials: bool = True) -> bytes:
        """What one token stands for: part of a UTF-8 text, or nothing where it is a special that is skipped."""
        if i in self._added:
            return b"" if skip_specials and i in self._special_ids else self._added[i].encode()
        try:
            token = self._backend.id_to_token(i)
        except OverflowError:
            token = None
        if token is None:
            raise InputError(f"token id {i}: expected an id below {self._backend.get_vocab_size()}")
        return bytes(_BYTES[letter] for letter in token)


class TextStream:
    """Text from token ids as they come. The pieces add up to `Tokenizer.decode` of all ids; no character is cut."""

    def __init__(self, tokenizer: Tokenizer, *, skip_specials: bool = True):
        self._tokenizer, self._skip_specials = tokenizer, skip_specials
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, i: int) -> str:
        """The characters that token `i` completes, perhaps none."""
        return self._decoder.decode(self._tokenizer.token_bytes(i, skip_specials=self._skip_specials))

    def finish(self) -> str:
        """What remains of a character that was never completed."""
        return self._decoder.decode(b"", final=True)


# ---- Meta's file --------------------------------------------------------------------------------------------------


def _read_ranks(path: Path) -> dict[bytes, int]:
    """A tiktoken file: one token a line, base64 and rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise InputError(
                f"{path}: line {number}: expected a base64 token and its rank, got {line[:40]!r}; fetch the file again"
            ) from None
    if set(ranks.values()) != set(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise InputError(
            f"{path}: expected ranks 0, 1, 2, ... with all 256 bytes, got {len(ranks)} tokens with gaps; fetch it again"
        )
    return ranks


def _from_ranks(ranks: dict[bytes, int]) -> tokenizers.Tokenizer:
    """BPE merges from ranks: two tokens merge where their union is a token, and the lowest union goes first."""
    names = {rank: "".join(_LETTERS[byte] for byte in token) for token, rank in ranks.items()}
    merges = sorted(
        (rank, ranks[token[:cut]], ranks[token[cut:]])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    )
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={name: rank for rank, name in names.items()},
            merges=[(names[left], names[right]) for _, left, right in merges],
            ignore_merges=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return backend
