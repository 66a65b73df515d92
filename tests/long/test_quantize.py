"""What int8 and int4 do to the answers of layers as wide as the 11B's: `pytest -s tests/long/test_quantize.py`."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax

from mllama_jax.config import PRESETS
from mllama_jax.convert.apply import insert, paths
from mllama_jax.generate.decode import all_logits
from mllama_jax.model.mllama import MllamaModel, Params, abstract_parameters
from mllama_jax.model.quantize import QUANTIZERS, is_quantized, quantize_parameters, widen

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
        insert(tree, path, widen(*QUANTIZERS[quantize](leaf), jnp.dtype("float32")) if is_quantized(path) else leaf)
    return tree


def test_agreement_with_float32() -> None:
    params, tokens = random_parameters(), np.random.default_rng(1).integers(0, CONFIG.text.vocab, (1, 128))

    def foretold(params: Params, dtype: str = "float32") -> np.ndarray:
        model = MllamaModel(CONFIG, jnp.dtype(dtype))
        return log_softmax(np.asarray(all_logits(model, params, tokens, None), np.float64)[0], axis=-1)

    whole, found = foretold(params), {}
    kinds = {
        "bfloat16": lambda: foretold(params, "bfloat16"),
        "int8, weights only": lambda: foretold(weights_only(params, "int8")),
        "int8": lambda: foretold(quantize_parameters(params, QUANTIZERS["int8"])),
        "int4": lambda: foretold(quantize_parameters(params, QUANTIZERS["int4"])),
    }
    print(f"\n{'beside float32':<20}{'top-1':>8}{'KL a position':>15}{'largest':>9}")
    for name, run in kinds.items():
        theirs = run()
        kl = (np.exp(whole) * (whole - theirs)).sum(axis=-1)
        top1 = (whole.argmax(axis=-1) == theirs.argmax(axis=-1)).mean()
        found[name] = kl.mean()
        print(f"{name:<20}{top1:8.1%}{kl.mean():15.2g}{kl.max():9.2g}")
    assert found["bfloat16"] < found["int8, weights only"] < found["int8"] < found["int4"] < 0.5
