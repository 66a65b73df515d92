"""A model spread over a mesh gives what it gives on one device; rules and meshes that cannot be are refused."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mllama_jax.config import PRESETS as MODELS
from mllama_jax.errors import InputError
from mllama_jax.loading import preset_mesh
from mllama_jax.model.layers import Unconstrained
from mllama_jax.model.mllama import MllamaModel, abstract_parameters
from mllama_jax.sharding.mesh import CHIPS, make_mesh, topology
from mllama_jax.sharding.resolve import device_bytes, resolve
from mllama_jax.sharding.rules import LOGICAL_AXES, PRESETS, mesh_axes, preset_rules
from tests.conftest import SMALL
from tests.sharded import CASES


def run(devices: int, *args: str) -> str:
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.sharded", *args],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def equal(devices: int, *args: str) -> list[dict[str, Any]]:
    """What was compared, at least one thing: float32 logits are within 1e-5, greedy tokens the same."""
    found = [json.loads(line) for line in run(devices, *args).splitlines()]
    assert found
    for each in found:
        assert each["error"] <= 1e-5, each
        assert each["tokens"], each
    return found


@pytest.mark.parametrize("devices", CASES)
def test_sharded_equals_single(devices: int, spread_directory: Path) -> None:
    """An uneven batch with and without pictures."""
    assert len(equal(devices, "compare", str(spread_directory))) == len(CASES[devices])


def test_every_preset_is_compared() -> None:
    assert {rules for cases in CASES.values() for rules, _ in cases if isinstance(rules, str)} == set(PRESETS)


def test_what_cannot_be_placed_is_refused(spread_directory: Path) -> None:
    assert run(8, "refuse", str(spread_directory)) == "refused\n"


def test_int8_equals_its_shard_scales_on_one_device(spread_directory: Path) -> None:
    """The same logits and tokens as one device whose activations have a scale for each part that a mesh would have."""
    for found in equal(8, "quantized", str(spread_directory)):
        assert found["other_scales"] > 1e-4, found  # with one scale for all parts the logits are others


def test_steps_send_few_rows_to_their_peers(spread_directory: Path) -> None:
    found = json.loads(run(8, "peers", str(spread_directory)))
    assert found["tokens"]
    assert found["sent"] == ["embedding", *["heads", "mlp"] * 4, "vocab"]  # traced once, of four layers
    assert found["known"]


def test_few_rows_over_int4_meet_whole_parts_of_kernels(spread_directory: Path) -> None:
    """Rows, outputs and inputs of what a device multiplies: for queries, gate and up, down."""
    serve, train = map(json.loads, run(8, "few", str(spread_directory)).splitlines())
    assert serve["met"] == [[4, 128, 512], [4, 512, 512], [4, 64, 256]]
    assert train["met"] == [[2, 256, 512], [2, 1024, 512], [2, 64, 512]]
    assert max(serve["error"], train["error"]) <= 1e-6


def test_int8_caches_equal_those_of_one_device(spread_directory: Path) -> None:
    """The scales lie where their numbers do, heads and positions split alike."""
    for found in equal(8, "cached", str(spread_directory)):
        assert found["float32"] > 1e-3, found


def test_our_layout_restores_on_a_mesh(spread_directory: Path) -> None:
    assert run(8, "restore", str(spread_directory)) == "restored\n"


def test_the_compiled_decode_step_is_clean(spread_directory: Path) -> None:
    """On CPU devices; tests/oracle asks the TPU's compiler at full size."""
    assert run(8, "clean", str(spread_directory)) == "clean\n"


def test_every_logical_axis_is_known() -> None:
    """The table of logical axes names all that parameters and activations use, and nothing else."""
    used: set[str | None] = set()

    class Recording(Unconstrained):
        def __call__(self, x: jax.Array, *axes: str | None) -> jax.Array:
            assert len(axes) == x.ndim
            used.update(axes)
            return x

    model = MllamaModel(SMALL, jnp.dtype("float32"), Recording())
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), method="touch")["params"])
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)):
        used.update(leaf.names)
    assert used - {None} == set(LOGICAL_AXES)


# Cloud names and what they are: chips, devices, sizes of the serve preset's axes for the 90B.
SLICES = {
    "v6e-8": ("v6e:2x4", 8, 8, (1, 8, 1)),
    "v5litepod-16": ("v5e:4x4", 16, 16, (1, 8, 2)),
    "v5e-256": ("v5e:16x16", 256, 256, (4, 8, 8)),
    "v5p-8": ("v5p:2x2x1", 4, 4, (1, 4, 1)),
    "tpu7x-8": ("tpu7x:2x2x1", 4, 8, (1, 8, 1)),
    "a3-highgpu-8g": ("h100:8", 8, 8, (1, 8, 1)),
    "h200:1": ("h200:1", 1, 1, (1, 1, 1)),
    "2xv6e:4x4": ("2xv6e:4x4", 32, 32, (2, 8, 2)),
}


@pytest.mark.parametrize("name", SLICES)
def test_slices_by_name(name: str) -> None:
    found, chips, devices, axes = topology(name), *SLICES[name][1:]
    assert (found.name, found.chips, found.devices) == (SLICES[name][0], chips, devices)
    assert tuple(mesh_axes("serve", MODELS["90b"], devices, slices=found.slices).values()) == axes


@pytest.mark.parametrize("name", ["v9:2x2", "v6e:3x3", "v5p-3", "2xh100:8", "0xv6e:2x2", ""])
def test_unknown_slices_list_the_known(name: str) -> None:
    with pytest.raises(InputError, match=r"known are v5e:.*v6e:.*v5p:.*tpu7x:.*h100:") as error:
        topology(name)
    assert "\n" not in str(error.value)


def test_every_slice_has_a_mesh_for_both_models() -> None:
    for model in ("11b", "90b"):
        for chip in CHIPS.values():
            for shape in chip.shapes:
                devices = int(np.prod(shape)) * chip.devices
                for preset in PRESETS:
                    assert int(np.prod(list(mesh_axes(preset, MODELS[model], devices).values()))) == devices


def test_groups_that_cannot_be_are_refused() -> None:
    for group in (3, 0, -8):
        message = rf"groups of {group} must divide a slice's 8 devices and 64 heads; \[1, 2, 4, 8\] do"
        with pytest.raises(InputError, match=message):
            mesh_axes("serve", MODELS["90b"], 8, group)
    with pytest.raises(InputError, match="groups of 16 must divide a slice's 8 devices"):
        mesh_axes("serve", MODELS["90b"], 16, 16, slices=2)


def test_bytes_of_a_device() -> None:
    """The 90B in bfloat16, by hand: everything whole on one device, and what eight share."""
    config = MODELS["90b"]
    whole = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nn.unbox(abstract_parameters(config))))
    sizes = {}
    for devices in (1, 8):
        axes = mesh_axes("serve", config, devices)
        mesh = jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes), (jax.sharding.AxisType.Auto,) * 3)
        sizes[devices] = device_bytes(resolve(config, preset_rules("serve", config, mesh), jnp.dtype("bfloat16")))
    assert sizes[1] == 2 * whole
    assert whole / 4 < sizes[8] < 1.02 * whole / 4  # norms, gates and tables are on every device


class Chip:
    """A chip at a place, as a TPU's devices have it."""

    def __init__(self, *coords: int):
        self.coords, self.core_on_chip, self.slice_index = (*coords, 0), 0, 0
        self.platform, self.device_kind, self.process_index = "tpu", "TPU v6 lite", 0
        self.id = coords[0] * 16 + coords[1]


def test_only_rows_are_split_between_slices(spread_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chips = [Chip(x, y) for y in range(4) for x in range(4)]
    for chip in chips:
        chip.slice_index = chip.coords[1] // 2
    monkeypatch.setattr(jax, "devices", lambda: chips)
    mesh = preset_mesh(spread_directory)
    assert dict(mesh.shape) == {"data": 2, "kv": 4, "q": 2}
    assert [{chip.slice_index for chip in own.flat} for own in mesh.devices] == [{0}, {1}]


class GPU:
    """A GPU as JAX has it: with coordinates, and no cores on a chip."""

    def __init__(self, number: int):
        self.id, self.coords, self.process_index = number, (0, 0, number), 0
        self.platform, self.device_kind = "gpu", "NVIDIA H100 80GB HBM3"


def test_gpus_stay_in_their_order() -> None:
    mesh = make_mesh({"data": 1, "kv": 4, "q": 2}, [GPU(number) for number in range(8)])
    assert [device.id for device in mesh.devices.flat] == list(range(8))


@pytest.mark.parametrize(
    ("grid", "axes", "farthest"),
    [
        ((2, 4), {"data": 1, "kv": 8, "q": 1}, {"kv": 1}),
        ((4, 8), {"data": 1, "kv": 8, "q": 4}, {"kv": 1, "q": 1}),
        ((4, 4), {"data": 1, "kv": 8, "q": 2}, {"kv": 2, "q": 1}),  # one physical axis has to serve both
    ],
)
def test_neighbours_in_the_mesh_are_neighbours_on_the_wire(
    grid: tuple[int, int], axes: dict[str, int], farthest: dict[str, int]
) -> None:
    mesh = make_mesh(axes, [Chip(x, y) for y in range(grid[1]) for x in range(grid[0])])
    for number, axis in enumerate(axes):
        line = np.moveaxis(mesh.devices, number, 0).reshape(axes[axis], -1)
        steps = [
            sum(abs(p - q) for p, q in zip(a.coords, b.coords, strict=True))
            for row in line.T
            for a, b in itertools.pairwise(row)
        ]
        assert max(steps, default=0) == farthest.get(axis, 0)
