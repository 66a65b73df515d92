"""Write tests/data/processing, by transformers and tiktoken: python -m tests.oracle.make_processing_goldens"""

import base64
import json
from collections import Counter
from itertools import pairwise

import regex
import tiktoken
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from mllama_jax.processing.tokenizer import WORDS
from tests.processing import DATA, PICTURES, TEXTS, TILE, digest, noise

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def image_processor(tile: int) -> MllamaImageProcessorPil:
    size = {"height": tile, "width": tile}
    return MllamaImageProcessorPil(size=size, image_mean=CLIP_MEAN, image_std=CLIP_STD, max_image_tiles=4)


def pictures() -> list[list]:
    processor, rows = image_processor(TILE), []
    for picture in PICTURES:
        output = processor(images=[[noise(*picture)]], return_tensors="np")
        rows.append([*picture, int(output["aspect_ratio_ids"][0, 0]), digest(output["pixel_values"][0, 0])])
    return rows


def vocabulary(size: int) -> dict[bytes, int]:
    """Byte pairs learnt from the texts themselves, the most frequent first."""
    words = Counter(word.encode() for text in TEXTS for word in regex.findall(WORDS, text))
    pieces = {word: [bytes([byte]) for byte in word] for word in words}
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < size:
        pairs = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.setdefault(left + right, len(ranks))
        for parts in pieces.values():
            for i in range(len(parts) - 2, -1, -1):
                if parts[i : i + 2] == [left, right]:
                    parts[i : i + 2] = [left + right]
    return ranks


def main() -> None:
    DATA.mkdir(parents=True, exist_ok=True)
    (DATA / "pictures.json").write_text("[\n" + ",\n".join(map(json.dumps, pictures())) + "\n]\n")
    ranks = vocabulary(700)
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    (DATA / "tokenizer.model").write_bytes(b"".join(lines))
    encoding = tiktoken.Encoding("small", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
    ids = [encoding.encode_ordinary(text) for text in TEXTS]
    (DATA / "ids.json").write_text("[\n" + ",\n".join(map(json.dumps, ids)) + "\n]\n")


if __name__ == "__main__":
    main()
