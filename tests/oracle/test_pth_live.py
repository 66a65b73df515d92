"""Our torch files read by torch, and torch's by us.

    python -m tests.oracle.test_pth_live

writes the everyday tests' torch.save file anew.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from mllama_jax.convert import pth
from mllama_jax.convert.pth import PthFile, write_pth
from tests.test_pth import ARRAYS, SAVED, SAVED_ARRAYS


def saved_state():
    """What SAVED holds: a state_dict() with its `_metadata`, views of several kinds, shared storage, and all types."""
    module = torch.nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.copy_(torch.arange(6).reshape(2, 3))
        module.bias.copy_(torch.arange(2))
    state = module.state_dict()
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    state["parameter"] = torch.nn.Parameter(base.clone())
    state["transposed"] = base.half().T
    state["shared"], state["shared.slice"] = base, base[1:, ::2]
    state["expanded"] = torch.tensor([7]).expand(3, 2)
    state["scalar"] = torch.tensor(2.5, dtype=torch.float64)
    state["empty"] = torch.zeros(0, 4)
    state["bfloat16"] = base.bfloat16()[:, 1]
    state["float8"] = base.to(torch.float8_e4m3fn)[1:]
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16):
        state[str(dtype)] = base.to(dtype)
    return state


def bytes_of(tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("protocol", [2, 4])
def test_we_read_what_torch_saves(tmp_path, protocol):
    state = saved_state()
    torch.save(state, tmp_path / "live.pth", pickle_protocol=protocol)
    file = PthFile(tmp_path / "live.pth")
    assert list(file.tensors) == list(state) == list(SAVED_ARRAYS)
    for name, tensor in state.items():
        assert file.read(name).shape == tuple(tensor.shape), name
        assert file.read(name).tobytes() == bytes_of(tensor) == SAVED_ARRAYS[name].tobytes(), name
    assert file.tensors["shared.slice"].start == file.tensors["shared"].start + 16


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("zip64", [False, True])
def test_torch_reads_what_we_write(tmp_path, monkeypatch, mapped, zip64):
    if zip64:  # as for tensors of 1 GiB and more
        monkeypatch.setattr(pth, "_ZIP64_SIZE", 0)
    write_pth(tmp_path / "ours.pth", ARRAYS)
    state = torch.load(tmp_path / "ours.pth", weights_only=True, mmap=mapped)
    assert list(state) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert str(state[name].dtype) == f"torch.{array.dtype}"
        assert tuple(state[name].shape) == array.shape
        assert bytes_of(state[name]) == np.ascontiguousarray(array).tobytes(), name


def test_torch_reads_a_mebibyte_of_random_bits(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**16, (512, 1024), np.uint16)
    write_pth(tmp_path / "ours.pth", {"bits": bits})
    assert bytes_of(torch.load(tmp_path / "ours.pth", weights_only=True)["bits"]) == bits.tobytes()
    torch.save({"bits": torch.from_numpy(bits)}, tmp_path / "theirs.pth")
    np.testing.assert_array_equal(PthFile(tmp_path / "theirs.pth").read("bits"), bits)


if __name__ == "__main__":
    torch.save(saved_state(), Path(SAVED))
