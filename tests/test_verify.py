"""The manifest finds any byte that is not as it was written, and names the tensor."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import mllama_jax
from mllama_jax.convert.export import write_hf
from mllama_jax.convert.run import convert
from mllama_jax.convert.table import Layout
from mllama_jax.convert.verify import verify
from mllama_jax.errors import InputError
from mllama_jax.model.mllama import Params
from tests.archives import fault
from tests.conftest import SMALL


@pytest.fixture(scope="module")
def ours(small_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("verify") / "ours"
    convert(small_directory, directory, to="orbax", dtype="bfloat16")
    return directory


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def faults(directory: Path) -> str:
    """What `verify` says is wrong: what is needed to open a checkpoint is checked before the rest."""
    try:
        return " ".join(verify(directory)["damaged"])
    except InputError as error:
        return str(error)


def test_one_flipped_bit_anywhere_is_found_and_named(ours: Path, tmp_path: Path) -> None:
    random.seed(0)
    files = sorted(path for path in ours.rglob("*") if path.is_file())
    chosen = [p for p in files if p.parent == ours] + random.sample([p for p in files if p.parent != ours], 20)
    for path in chosen:
        whole = path.read_bytes()
        flip(path, random.randrange(len(whole)))
        name = path.relative_to(ours).parts[0]
        assert name in faults(ours), path
        assert name in fault(lambda: mllama_jax.load(ours, verify=True))
        path.write_bytes(whole)
    assert not verify(ours)["damaged"]


def test_missing_and_short_chunks_are_found(ours: Path, tmp_path: Path) -> None:
    shutil.copytree(ours, tmp_path / "copy")
    gone, short = (tmp_path / f"copy/text.layers_{i}.mlp.down.kernel/c/0/0" for i in (0, 2))
    gone.unlink()
    short.write_bytes(short.read_bytes()[:-1])
    report = verify(tmp_path / "copy")
    assert list(report["damaged"]) == ["text.layers_0.mlp.down.kernel", "text.layers_2.mlp.down.kernel"]
    assert "text.layers_0.mlp.down.kernel: NOT_FOUND: chunk {0, 0}" in fault(mllama_jax.load, tmp_path / "copy")


@pytest.mark.parametrize("to", ["orbax", "hf", "meta"])
def test_nan_and_infinity_are_counted(small_params: Params, tmp_path: Path, to: Layout) -> None:
    params = jax.tree.map(np.array, small_params)
    params["text"]["final_norm"]["scale"][:3] = np.nan
    params["projector"]["linear"]["bias"][:2] = [np.inf, -np.inf]
    write_hf(tmp_path / "a", params, SMALL, np.dtype("float32"))
    convert(tmp_path / "a", tmp_path / "b", to=to, dtype="bfloat16")
    report = verify(tmp_path / "b")
    names = {
        "orbax": ("text.final_norm.scale", "projector.linear.bias"),
        "hf": ("language_model.model.norm.weight", "multi_modal_projector.bias"),
        "meta": ("text_model.norm.weight", "vision_model.vision_projection.bias"),
    }[to]
    assert (report["nan"], report["infinite"]) == ({names[0]: 3}, {names[1]: 2})
    assert (report["manifest"], report["damaged"]) == (to == "orbax", {})


def test_only_ours_has_a_manifest(small_directory: Path) -> None:
    message = fault(lambda: mllama_jax.load(small_directory, verify=True))
    assert "has no manifest to verify; `mllama convert` writes a checkpoint that has one" in message


def test_a_manifest_of_another_version(ours: Path, tmp_path: Path) -> None:
    shutil.copytree(ours, tmp_path / "copy")
    manifest = tmp_path / "copy/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 2}))
    assert "manifest.json: is damaged or of another version of this program" in fault(verify, tmp_path / "copy")
    manifest.unlink()
    assert "manifest.json: is missing; expected a checkpoint that `mllama convert` wrote" in fault(
        verify, tmp_path / "copy"
    )
