"""int4 on a mesh; what int8 and int4 do to layers as wide as the 11B's: `pytest -s tests/long/test_quantize.py`."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax

from mllama_jax.config import PRESETS
from mllama_jax.convert.apply import insert, paths
from mllama_jax.convert.export import write_hf
from mllama_jax.generate.decode import all_logits
from mllama_jax.model.mllama import MllamaModel, Params, abstract_parameters, init_parameters
from mllama_jax.model.quantize import QUANTIZERS, is_quantized, quantize_parameters, widen
from tests.conftest import SMALL
from tests.test_sharding import run

# Two self-attention layers of the 11B and a head of an eighth of its vocabulary.
CONFIG = dataclasses.replace(
    PRESETS["11b"],
    vision=None,
    text=dataclasses.replace(PRESETS["11b"].text, layers=2, cross_layers=(), vocab=2**14, extra_embeddings=0),
)


def random_parameters() -> Params:
    """Rows and columns of kernels have sizes that differ by a third; of norms one channel in 128 is large.

    All that layers add is together about as large as what was embedded, as GPT-2 begins.
    """
    draw, tree = np.random.default_rng(0), {}
    for path, leaf in paths(abstract_parameters(CONFIG)).items():
        shape = leaf.value.shape
        value = draw.standard_normal(shape, np.float32)
        if path[-1] == "scale":
            value = np.exp(0.3 * value)
            value[::128] *= 8
        elif path[-1] == "kernel":
            for sizes in ((*shape[:-1], 1), shape[-1:]):
                value *= np.exp(0.3 * draw.standard_normal(sizes, np.float32))
            value *= (shape[-1] * (2 * CONFIG.text.layers if path[-2] in ("out", "down") else 1)) ** -0.5
        insert(tree, path, jnp.asarray(value))
    return tree


def weights_only(params: Params, quantize: str) -> Params:
    """Kernels as they come back from what they are stored in; activations stay as they are."""
    tree: Params = {}
    for path, leaf in paths(params).items():
        if is_quantized(path, quantize):
            leaf = widen(*QUANTIZERS[quantize](leaf), jnp.dtype("float32"))
        insert(tree, path, leaf)
    return tree


def test_agreement_with_float32() -> None:
    params, tokens = random_parameters(), np.random.default_rng(1).integers(0, CONFIG.text.vocab, (1, 128))

    def foretold(params: Params, dtype: str = "float32") -> np.ndarray:
        model = MllamaModel(CONFIG, jnp.dtype(dtype))
        return log_softmax(np.asarray(all_logits(model, params, tokens, None), np.float64)[0], axis=-1)

    def quantized(name: str) -> np.ndarray:
        return foretold(quantize_parameters(params, name, QUANTIZERS[name]))

    whole, found = foretold(params), {}
    kinds = {
        "bfloat16": lambda: foretold(params, "bfloat16"),
        "int8, weights only": lambda: foretold(weights_only(params, "int8")),
    } | {name: functools.partial(quantized, name) for name in ("int8-layers", "int8", "int4-layers", "int4")}
    print(f"\n{'beside float32':<20}{'top-1':>8}{'KL a position':>15}{'largest':>9}")
    for name, foretell in kinds.items():
        theirs = foretell()
        kl = (np.exp(whole) * (whole - theirs)).sum(axis=-1)
        top1 = (whole.argmax(axis=-1) == theirs.argmax(axis=-1)).mean()
        found[name] = kl.mean()
        print(f"{name:<20}{top1:8.1%}{kl.mean():15.2g}{kl.max():9.2g}")
    assert found["bfloat16"] < found["int8, weights only"] < found["int8-layers"] < found["int8"] < 0.1
    assert found["int8"] < found["int4-layers"] < found["int4"] < 0.5


def test_int4_equals_one_device(tmp_path: Path) -> None:
    """Eight devices have a group of the inputs of each output and down kernel, of two layers of text."""
    sizes = {"heads": 8, "kv_heads": 4, "head_dim": 128, "hidden": 1024}
    text = dataclasses.replace(SMALL.text, layers=2, cross_layers=(), extra_embeddings=0, **sizes)
    config = dataclasses.replace(SMALL, text=text, vision=None)
    write_hf(tmp_path, init_parameters(config, jax.random.key(1)), config, np.dtype("float32"))
    assert json.loads(run(8, "packed", str(tmp_path)))["error"] <= 1e-5
