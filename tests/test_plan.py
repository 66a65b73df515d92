"""The planner by arithmetic, its reading of compiled programs, and what it refuses. Compiling is in tests/oracle."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mllama_jax.cli import main
from mllama_jax.config import PRESETS
from mllama_jax.convert.run import convert
from mllama_jax.errors import InputError
from mllama_jax.sharding import compiler
from mllama_jax.sharding import plan as sharding_plan
from mllama_jax.sharding.hlo import Collective, Program
from mllama_jax.sharding.mesh import topology
from mllama_jax.sharding.plan import Plan, plan
from mllama_jax.sharding.programs import DoesNotFit, Workload

GIB = 2**30

# A loop of three rounds with a collective of each way to write groups, on-chip prefetch, and copies big and small.
TEXT = """\
HloModule jit_step, entry_computation_layout={(bf16[8,128]{1,0:T(8,128)(2,1)})->bf16[8,128]{1,0}}

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[]{:T(256)} parameter(0)
  %b = bf16[]{:T(256)} parameter(1)
  ROOT %sum = bf16[]{:T(256)} add(%a, %b)
}

%transposed (p: bf16[1024,1024]) -> bf16[1024,1024] {
  %p = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %t = bf16[1024,1024]{0,1:T(8,128)(2,1)} transpose(%p), dimensions={1,0}
}

%body (s: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %s = (s32[], bf16[8,128]{1,0}) parameter(0)
  %x = bf16[8,128]{1,0} get-tuple-element(%s), index=1
  %one = bf16[8,128]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %two = bf16[8,128]{1,0} all-reduce(%one), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%add
  %three = bf16[8,128]{1,0} all-reduce(%two), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %r = (s32[], bf16[8,128]{1,0}) tuple(%i, %three)
}

%hidden (h: bf16[8,128]) -> bf16[8,1024] {
  %h = bf16[8,128]{1,0} parameter(0)
  ROOT %g = bf16[8,1024]{1,0} all-gather(%h), replica_groups=mesh['a'=2,'b'=4], dimensions={1}
}

ENTRY %main (w: bf16[1024,1024], x: bf16[8,128]) -> bf16[8,1024] {
  %w = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %x.1 = bf16[8,128]{1,0} parameter(1)
  %ahead = (bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w)
  %relaid = bf16[1024,1024]{0,1:T(8,128)(2,1)} copy(%w)
  %turned = bf16[1024,1024]{0,1:T(8,128)(2,1)} fusion(%w), kind=kLoop, calls=%transposed
  %little = bf16[8,128]{0,1} copy(%x.1)
  %c = (s32[], bf16[8,128]{1,0}) tuple(%x.1)
  %loop = (s32[], bf16[8,128]{1,0}) while(%c), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %end = bf16[8,1024]{1,0} custom-call(%x.1), called_computations={%hidden}
}
"""


def test_collectives_and_copies_are_read_from_a_program() -> None:
    program = Program(TEXT)
    assert program.collectives() == Counter(
        {Collective("all-reduce", 2048, 4): 9, Collective("all-gather", 16384, 8): 1}
    )
    assert [each.split()[0] for each in program.copies(2**20)] == ["relaid", "turned"]


def test_bytes_on_the_wire() -> None:
    assert Collective("all-reduce", 800, 8).wire == 1400
    assert Collective("all-gather", 800, 8).wire == 700
    assert Collective("reduce-scatter", 100, 8).wire == 700


def planned(model: str, name: str, slots: int = 8, **settings: str) -> Plan:
    return plan(PRESETS[model], topology(name), Workload(slots, 8192, 1), compiled=False, **settings)  # pyright: ignore[reportArgumentType]


def test_by_arithmetic() -> None:
    """The 90B on eight chips: figures that follow by hand from its sizes."""
    made = planned("90b", "v6e:2x4")
    assert (made.source, made.fits, made.nearest) == ("arithmetic", True, None)
    assert made.self_cache == 8 * 8192 * 80 * 2 * 128 * 2  # one of eight key/value heads
    assert made.image_cache == pytest.approx(8 * 4 * 1608 * 20 * 2 * 128 * 2, rel=1e-3)
    sent = {(kind, size): count for kind, size, _, count in made.programs["decode"].collectives}
    assert sent == {("all-reduce", 131072): 200, ("all-gather", 131072): 1, ("all-gather", 8 * 128256 * 2): 1}
    assert made.floor.bandwidth == pytest.approx(made.floor.read / 1638e9)
    assert made.tokens_per_second == pytest.approx(8 / made.floor.seconds)


def test_int8_caches_leave_room_for_more_rows() -> None:
    """132 bytes for 128 numbers: 1.94 times the rows where caches are most of what is left."""
    wide, small = planned("90b", "v6e:2x4"), planned("90b", "v6e:2x4", cache="int8")
    for name in ("self_cache", "image_cache"):
        assert getattr(small, name) == pytest.approx(getattr(wide, name) * 132 / 256, rel=1e-3)
    assert (
        wide.floor.read - small.floor.read == wide.self_cache + wide.image_cache - small.self_cache - small.image_cache
    )
    assert small.largest_slots > 1.9 * wide.largest_slots
    assert planned("90b", "v6e:2x4", small.largest_slots, cache="int8").fits


def test_int4_reads_a_quarter() -> None:
    """Half a byte and a 64th for each weight of 8.9 billion that a device of eight reads; 90B on one H100."""
    wide, small = planned("90b", "v6e:2x4"), planned("90b", "v6e:2x4", quantize="int4")
    weights = [made.floor.read - made.self_cache - made.image_cache for made in (wide, small)]
    assert weights[1] / weights[0] == pytest.approx((1 / 2 + 2 / 128) / 2, rel=2e-3)
    assert small.floor.compute == pytest.approx(wide.floor.compute, rel=0.01)  # activations are as they were
    assert planned("90b", "h100:1", 1, quantize="int4").fits
    with pytest.raises(InputError, match=r"mlp of size 112 does not divide over kv x q = 32; .* int4 splits between"):
        planned("11b", "v5e:4x8", quantize="int4")


def test_text_alone_reads_no_cross_attention() -> None:
    with_pictures, without = (
        plan(PRESETS["90b"], topology("v6e:2x4"), Workload(8, 8192, images), compiled=False).floor.read
        for images in (1, 0)
    )
    layer = 2 * 8192 * 8192 + 3 * 8192 * 28672  # query and output kernels, the MLP's three
    caches = planned("90b", "v6e:2x4").image_cache
    assert with_pictures - without == pytest.approx(20 * 2 * layer / 8 + caches, rel=1e-3)


@pytest.mark.parametrize("name", ["v6e:2x4", "v5e:4x4", "h200:2", "tpu7x:2x2x1"])
def test_the_largest_number_of_slots_fits_and_one_more_does_not(name: str) -> None:
    most = planned("90b", name).largest_slots
    assert planned("90b", name, most).fits
    assert not planned("90b", name, most + max(1, most // 50)).fits


def test_what_does_not_fit_is_shown_a_slice_that_does() -> None:
    for model, name in (("90b", "v6e:2x2"), ("90b", "h100:1"), ("11b", "v5e:1x1")):
        made = planned(model, name)
        assert not made.fits
        assert made.nearest is not None
        assert made.nearest.split(":")[0] == name.split(":")[0]
        assert planned(model, made.nearest).fits


def test_where_nothing_has_room_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "90b", "--topology", "v6e-8", "--slots", "100000", "--arithmetic"]) == 0
    assert "the nearest slice that has room, by arithmetic: none" in capsys.readouterr().out


def test_without_libtpu_that_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same table comes by arithmetic."""
    for module in (compiler, sharding_plan):
        monkeypatch.setattr(module, "has_compiler", lambda: False)
    assert main(["plan", "90b", "--topology", "v6e-8"]) == 0
    told = capsys.readouterr().out
    assert "by arithmetic, nothing was compiled: libtpu is missing, pip install 'mllama-jax[plan]'" in told
    assert "rows that fit: 25" in told
    assert main(["plan", "90b", "--topology", "h100:8"]) == 0
    assert "libtpu" not in capsys.readouterr().out


def test_a_quantised_checkpoint_is_planned_as_it_is(
    tiny_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(tiny_directory, tmp_path / "int8", to="orbax", quantize="int8")
    command = ["plan", str(tmp_path / "int8"), "--topology", "v6e-1", "--context", "64", "--arithmetic"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantize"] == "int8"
    assert main([*command, "--quantize", "int4"]) == 2
    assert "holds int8 weights, which cannot become int4" in capsys.readouterr().err


def test_replicas_of_the_smallest_groups() -> None:
    assert planned("11b", "v6e:2x4", preset="evaluate").mesh == {"data": 8, "kv": 1, "q": 1}
    assert planned("90b", "v6e:4x4", 16, preset="evaluate").mesh == {"data": 2, "kv": 8, "q": 1}


def test_several_slices_split_rows() -> None:
    assert planned("90b", "2xv6e:4x4").mesh == {"data": 2, "kv": 8, "q": 2}


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["plan", "90b", "--topology", "v5p-8", "--arithmetic"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "v5p:2x2x1 (v5p-8): 4 chips, 4 devices" in text
    assert "by arithmetic, nothing was compiled" in text
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mesh"] == {"data": 1, "kv": 4, "q": 1}
    assert main([*command, "--plot", str(tmp_path / "plan.png")]) == 0
    with Image.open(tmp_path / "plan.png") as drawn:
        assert len(drawn.convert("RGB").getcolors(2**20) or ()) > 8  # axes, bars of several colours


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["90b", "--topology", "v6e:3x3"], "topology 'v6e:3x3' is not known"),
        (["90b", "--topology", "v6e-256", "--slots", "6"], "slots must be a multiple of the 4 parts .* got 6; take 8"),
        (["90b", "--topology", "v6e-8", "--context", "200000"], "context must be at most the model's 131072"),
        (["90b", "--topology", "v6e-8", "--slots", "0"], "slots must be at least 1, got 0"),
        (["90b", "--topology", "v6e-8", "--preset", "fast"], "preset 'fast' is not known; known are serve"),
        (["90b", "--topology", "v6e-8", "--group", "3"], "groups of 3 must divide"),
        (["90b", "--topology", "v6e-8", "--group", "-8"], "groups of -8 must divide"),
        (["90b", "--topology", "2xv6e:2x4", "--group", "16"], "groups of 16 must divide a slice's 8 devices"),
        (["90b", "--topology", "h100:8", "--preset", "fsdp"], "every parameter is split, as fsdp does"),
        (["70b", "--topology", "v6e-8"], "70b: neither a directory nor one of 11b"),
        (["90b", "--topology", "v6e-8", "--plot", "x.pdf"], "--plot must name a .png file"),
        (["90b", "--topology", "v6e-8", "--plot", "/nowhere/x.png"], "--plot: /nowhere/x.png: cannot write there"),
        (["90b", "--topology", "v6e-8", "--train", "lora"], "--train asks the compiler of whole weights"),
    ],
)
def test_mistakes_cost_a_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments, "--arithmetic"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("message", "temporaries"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.", 10.5),
        (
            "CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries (31.50G) "
            "exceeds available HBM (31.24G).",
            31.5,
        ),
    ],
)
def test_what_the_compiler_says_of_memory(message: str, temporaries: float) -> None:
    said = DoesNotFit.said(message)
    assert said is not None
    assert said.temporaries(10 * 2**30) == temporaries * 2**30
    assert DoesNotFit.said("INTERNAL: something else") is None
