"""Conversions beside the script that made the released Hugging Face checkpoints, and their results in others' code."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import mllama_jax
from mllama_jax.convert.apply import renamed
from mllama_jax.convert.run import convert
from tests.oracle import huggingface, meta
from tests.parity import CASES, LOGITS_TOLERANCE
from tests.toy import toy_params, toy_weights, write_meta_release

REPOSITORY = Path(__file__).parents[2]
OLD_PYTHON, WHEEL = "MLLAMA_TRANSFORMERS_4_54_PYTHON", "MLLAMA_TRANSFORMERS_4_45_WHEEL"
WIDTH = 64
ROWS = CASES[1]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 2, 8])
def test_what_transformers_own_script_makes(tmp_path: Path, shards: int, dtype: type) -> None:
    python, wheel = os.environ.get(OLD_PYTHON), os.environ.get(WHEEL)
    if python is None or wheel is None:
        pytest.fail(f"{OLD_PYTHON} and {WHEEL} must be set; `make test-all` does")
    params = toy_params(kv_heads=8)
    weights = {name: tensor.astype(dtype) for name, tensor in toy_weights(params, WIDTH).items()}
    weights["text_model.rope.freqs"] = np.ones(8, np.float32)
    release = write_meta_release(tmp_path / "release", params, weights, shards)
    convert(release, tmp_path / "ours", to="orbax")
    convert(tmp_path / "ours", tmp_path / "hf", to="hf")
    if shards == 1:  # the name that the script expects
        (release / "consolidated.00.pth").rename(release / "consolidated.pth")
    output = tmp_path / "script.safetensors"
    command = [python, "-m", "tests.oracle.conversion_4_45", wheel, release, output, str(shards), str(WIDTH)]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    theirs, ours = (load_file(path) for path in (output, tmp_path / "hf/model.safetensors"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert ours[name].tobytes() == tensor.tobytes(), name


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meta_release(tmp_path_factory.mktemp("release"), ROWS.params, ROWS.weights)


def test_exported_directories_load_in_transformers(release: Path, tmp_path: Path) -> None:
    convert(release, tmp_path / "hf", to="hf")
    model, report = transformers.MllamaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    expected = huggingface.build(ROWS.params, ROWS.weights)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    np.testing.assert_array_equal(huggingface.logits(model.eval(), ROWS), huggingface.logits(expected, ROWS))


@pytest.mark.filterwarnings("ignore:.*all_gather_tensor. is deprecated:FutureWarning")  # Meta's code calls it
def test_exported_files_give_the_oracles_logits(release: Path, tmp_path: Path) -> None:
    """Meta -> Hugging Face -> ours -> Meta: the cells that no picture reaches are gone, and no logit moves."""
    convert(release, tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "ours", to="orbax")
    convert(tmp_path / "ours", tmp_path / "meta", to="meta")
    state = torch.load(tmp_path / "meta/consolidated.00.pth", weights_only=True, mmap=True)
    model, tokens = meta.build(ROWS.params, {name: tensor.numpy() for name, tensor in state.items()}), ROWS.tokens
    exported = meta.run_rows(model, np.stack(tokens), ROWS.images)["logits"]
    assert np.abs(exported - meta.run(ROWS)["logits"]).max() <= LOGITS_TOLERANCE


def test_a_vision_models_decoder_is_a_llama_to_transformers(release: Path, tmp_path: Path) -> None:
    convert(release, tmp_path / "text", to="hf", text_only=True)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(0, ROWS.params["vocab_size"] - 256, (2, 100))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    ours = mllama_jax.load(tmp_path / "text", dtype="float32")
    np.testing.assert_allclose(ours.logits(tokens, [[], []]), expected, atol=LOGITS_TOLERANCE)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT reads it
def test_adapters_merge_as_peft_merges_them(release: Path, tmp_path: Path) -> None:
    import peft

    convert(release, tmp_path / "hf", to="hf")
    torch.manual_seed(0)
    base = transformers.MllamaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    targets = r".*(q_proj|v_proj|o_proj|up_proj|fc1|multi_modal_projector)"
    settings = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=targets, alpha_pattern={"layers.3.cross_attn.q_proj": 2}
    )
    model = peft.get_peft_model(base, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero until it is trained
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "hf", tmp_path / "merged", to="hf", lora=tmp_path / "adapter")
    before, ours = load_file(tmp_path / "hf/model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    theirs = model.merge_and_unload().state_dict()
    changed = 0
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[renamed(name)].numpy(), atol=1e-6, err_msg=name)
        changed += not np.array_equal(tensor, before[name])
    assert changed > 100
