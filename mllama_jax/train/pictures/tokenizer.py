"""The tokenizer of the checkpoint that ships: a byte-level BPE learned from the questions, laid out like Llama 3.2's.

Ids 0..511 are 256 bytes and 256 merges, then come Llama 3.2's 256 special tokens in their order, then `<|image|>` at
the vocabulary size of 768, where the model embeds it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mllama_jax.processing.tokenizer import IMAGE, SPECIALS
from mllama_jax.train.pictures.stream import training

MERGED = 512
VOCAB = MERGED + 256
SPECIAL = SPECIALS[:-1]  # the image token is added behind the vocabulary

# Llama 3's split, but for digits: its \p{N}{1,3} would give the small model a thousand numbers to learn one by one.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_ENGLISH = """\
Hello! What can you do? I can answer questions about a picture: what it shows, where things are, and how many there are.
You are a helpful assistant. Please describe the image and say what you think of it. This is not what I had in mind.
The weather was fine and they went out to see the old town before the others came back from their work in the evening.
There is no one here who can tell whether that would have been better, but we should try to find out more about it.
Cutting Knowledge Date: December 2023. Today Date: 26 July 2024. Thank you, that is all for now. No, it does not.
"""


def _corpus(examples: int = 1600) -> Iterator[str]:
    """What the model will read and write, after the names of those who speak, and a little English beside it."""
    yield from [_ENGLISH] * 5
    for example in itertools.islice(training(0, 0), examples):
        yield f"user\n\n{example.question}"
        yield f"assistant\n\n{example.answer}"


def build() -> Tokenizer:
    """Learn the tokenizer; the same one at each call."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = split  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        _corpus(), trainers.BpeTrainer(vocab_size=MERGED, initial_alphabet=alphabet, show_progress=False)
    )
    learnt = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=learnt["vocab"], merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = split  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIAL, IMAGE)])
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{SPECIAL[0]} $A",
        pair=f"{SPECIAL[0]} $A {SPECIAL[0]}:1 $B:1",
        special_tokens=[(SPECIAL[0], MERGED)],
    )
    return tokenizer


def write(directory: str | Path) -> Tokenizer:
    """Build the tokenizer and leave it in `directory` in the three files that Hugging Face expects."""
    directory, tokenizer = Path(directory), build()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    ends = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {str(MERGED + n): {"content": token, **flags, "special": True} for n, token in enumerate((*SPECIAL, IMAGE))}
    config = {
        "added_tokens_decoder": added,
        **ends,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _save(directory / "tokenizer_config.json", config)
    _save(directory / "special_tokens_map.json", {name: {"content": token, **flags} for name, token in ends.items()})
    return tokenizer


def _save(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
