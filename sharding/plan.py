"""Will a model fit a slice, how many rows at once, and how fast can it be: asked of the compiler, or by arithmetic."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from jax.sharding import AbstractMesh, AxisType, Mesh

from mllama_jax.config import MllamaConfig
from mllama_jax.errors import InputError
from mllama_jax.sharding.compiler import has_compiler
from mllama_jax.sharding.hlo import Collective
from mllama_jax.sharding.mesh import CHIPS, Topology, make_mesh
from mllama_jax.sharding.programs import Compiled, DoesNotFit, Programs, Workload, compile_program
from mllama_jax.sharding.resolve import device_bytes
from mllama_jax.sharding.roofline import Floor, expected_collectives, floor, row_temporaries, temporaries
from mllama_jax.sharding.rules import check_preset, mesh_axes, preset_rules


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """One program on one device: bytes beside weights and caches, and why they are believed.

    Attributes:
        fits: False where the compiler refuses the program; `temporaries` are then what it asks for beyond arguments.
        collectives: kind, bytes of each, devices that take part, count; in decode for one token.
        seconds: of compiling; None where nothing was compiled.
    """

    temporaries: int
    code: int
    fits: bool
    collectives: tuple[tuple[str, int, int, int], ...]
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a device of `topology` holds and does. Bytes are of one device, times are of one decode step.

    Attributes:
        source: "compiler", or "arithmetic" where none was asked.
        needed: bytes at the fullest moment: weights, caches, and the program with the largest temporaries.
        largest_slots: how many rows of this context and so many pictures fit; 0 where the weights alone do not.
        nearest: the smallest slice of the same chips that fits, else of other chips; None where this one does,
            or none.
    """

    topology: str
    cloud: str
    chips: int
    devices: int
    preset: str
    quantize: str | None
    cache: str | None
    mesh: dict[str, int]
    load: Workload
    source: str
    usable: int
    weights: int
    self_cache: int
    image_cache: int
    programs: dict[str, ProgramPlan]
    needed: int
    fits: bool
    largest_slots: int
    floor: Floor
    binds: str
    tokens_per_second: float
    nearest: str | None


def plan(
    config: MllamaConfig,
    topology: Topology,
    load: Workload,
    *,
    preset: str = "serve",
    group: int | None = None,
    quantize: str | None = None,
    cache: str | None = None,
    compiled: bool | None = None,
    decode: tuple[int, int] | None = None,
) -> Plan:
    """Plan to serve `load`.

    Args:
        group: how many devices share a row (see `rules.mesh_axes`); `evaluate` takes as few as hold the weights.
        quantize, cache: as `load` takes them.
        compiled: ask the compiler; by default where there is one for this chip.
        decode: bytes of temporaries and code of the decode step, where they are known and all else is by arithmetic.

    Raises:
        InputError: the preset, the group or the load cannot be on this slice.
    """
    if compiled is None:
        compiled = topology.chip.platform == "tpu" and has_compiler()
    programs = programs_on(config, topology, preset, group, quantize, cache, abstract=not compiled)
    check_load(programs, load)
    found = _compile(programs, load) if compiled else _estimate(programs, load)
    if decode is not None:
        found["decode"] = dataclasses.replace(found["decode"], temporaries=decode[0], code=decode[1])
    weights = device_bytes(programs.params)
    self_cache, image_cache = _caches(programs, load)
    need = weights + self_cache + image_cache + max(each.temporaries + each.code for each in found.values())
    usable = int(topology.chip.hbm)
    fits = need <= usable and all(each.fits for each in found.values())
    sent = Counter({Collective(kind, size, n): count for kind, size, n, count in found["decode"].collectives})
    limits = floor(topology, programs, load, sent)
    return Plan(
        topology=topology.name,
        cloud=topology.cloud,
        chips=topology.chips,
        devices=topology.devices,
        preset=preset,
        quantize=quantize,
        cache=cache,
        mesh=dict(programs.rules.mesh.shape),
        load=load,
        source="compiler" if compiled else "arithmetic",
        usable=usable,
        weights=weights,
        self_cache=self_cache,
        image_cache=image_cache,
        programs=found,
        needed=need,
        fits=fits,
        largest_slots=largest_slots(programs, load, usable, found),
        floor=limits,
        binds=limits.binds,
        tokens_per_second=load.slots / limits.seconds,
        nearest=None if fits else _nearest(config, topology, load, preset, group, quantize, cache),
    )


def programs_on(
    config: MllamaConfig,
    topology: Topology,
    preset: str,
    group: int | None = None,
    quantize: str | None = None,
    cache: str | None = None,
    *,
    abstract: bool = False,
) -> Programs:
    """A model's programs on a slice under a preset; `abstract` needs no compiler and compiles nothing."""
    check_preset(preset)
    if preset == "evaluate" and group is None:
        group = _smallest_group(config, topology, quantize)
    axes = mesh_axes(preset, config, topology.devices, group, topology.slices)
    if abstract:
        types = (AxisType.Auto,) * len(axes)
        mesh: Mesh | AbstractMesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=types)
    else:
        mesh = make_mesh(axes, topology.compile_devices())
    return Programs(config, preset_rules(preset, config, mesh), quantize=quantize, cache=cache)


def largest_slots(programs: Programs, load: Workload, usable: int, found: dict[str, ProgramPlan]) -> int:
    """How many rows fit, by the temporaries of `found`; those of decode grow with the rows."""
    step = programs.rules.parts("batch")
    each = sum(_caches(programs, dataclasses.replace(load, slots=step)))
    left = usable - device_bytes(programs.params)
    fixed = max((p.temporaries + p.code for name, p in found.items() if name != "decode"), default=0)
    decode = found["decode"]
    row = row_temporaries(programs.config.text)
    rest = decode.code + max(0, decode.temporaries - row * load.slots // step)
    return step * max(0, int(min((left - fixed) // each, (left - rest) // (each + row))))


def check_load(programs: Programs, load: Workload) -> None:
    for name, value in (("slots", load.slots), ("context", load.context)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if load.images < 0:
        raise InputError(f"images must be at least 0, got {load.images}")
    parts = programs.rules.parts("batch")
    if load.slots % parts:
        up = load.slots + -load.slots % parts
        raise InputError(f"slots must be a multiple of the {parts} parts in which rows are split, got {load.slots}; "
                         f"take {up}")  # fmt: skip
    context = programs.config.text.context
    if load.context > context:
        raise InputError(f"context must be at most the model's {context}, got {load.context}")


def _caches(programs: Programs, load: Workload) -> tuple[int, int]:
    return (
        device_bytes(programs.cache(load.slots, load.context)),
        device_bytes(programs.cross(load.slots, load.images)),
    )


def _names(programs: Programs, load: Workload) -> list[str]:
    return ["decode", "prefill", *(["encode"] if programs.config.vision and load.images else [])]


def _compile(programs: Programs, load: Workload) -> dict[str, ProgramPlan]:
    found = {}
    for name in _names(programs, load):
        lowered = programs.encode() if name == "encode" else getattr(programs, name)(load)
        try:
            found[name] = _planned(compile_program(lowered))
        except DoesNotFit as error:
            arguments = _arguments(programs, load, name)
            found[name] = ProgramPlan(error.temporaries(arguments), 0, False, (), None)
    return found


def _arguments(programs: Programs, load: Workload, name: str) -> int:
    rows = load if name == "decode" else dataclasses.replace(load, slots=programs.rules.parts("batch"))
    return device_bytes(programs.params) + sum(_caches(programs, rows))


def _planned(compiled: Compiled) -> ProgramPlan:
    collectives = tuple((c.kind, c.bytes, c.group, count) for c, count in compiled.collectives.items())
    return ProgramPlan(compiled.temporaries, compiled.code, True, collectives, round(compiled.seconds, 1))


def _estimate(programs: Programs, load: Workload) -> dict[str, ProgramPlan]:
    if programs.rules.parts("embed") > 1:
        raise InputError(
            "what a decode step sends where every parameter is split, as fsdp does, the compiler alone can say; plan "
            "a TPU slice with libtpu, take another preset, or --train"
        )
    sent = tuple((c.kind, c.bytes, c.group, count) for c, count in expected_collectives(programs, load).items())
    return {
        name: ProgramPlan(size, 0, True, sent if name == "decode" else (), None)
        for name, size in temporaries(programs, load).items()
    }


def _smallest_group(config: MllamaConfig, topology: Topology, quantize: str | None) -> int:
    """The smallest group of devices in which weights leave a quarter of the memory for the rest."""
    most = mesh_axes("serve", config, topology.devices, slices=topology.slices)
    groups = [n for n in range(1, most["kv"] * most["q"] + 1) if (most["kv"] * most["q"]) % n == 0]
    for group in groups:
        programs = programs_on(config, topology, "evaluate", group, quantize, abstract=True)
        if device_bytes(programs.params) <= 0.75 * topology.chip.hbm:
            return group
    return groups[-1]


def _nearest(config: MllamaConfig, topology: Topology, load: Workload, *how: Any) -> str | None:
    """The smallest slice that fits, of the same chips if any, by arithmetic."""
    others = [chip for chip in CHIPS.values() if chip.platform == topology.chip.platform and chip != topology.chip]
    for chips in ([topology.chip], others):
        candidates = [Topology(chip, shape) for chip in chips for shape in chip.shapes]
        for candidate in sorted(candidates, key=lambda each: each.chips):
            if candidate == topology:
                continue
            try:
                if _fits(config, candidate, load, *how):
                    return candidate.name
            except InputError:  # the preset cannot be spread over so many devices, or the slots not divided
                continue
    return None


def _fits(
    config: MllamaConfig, topology: Topology, load: Workload, preset: str, group: int | None, quantize: str | None,
    cache: str | None,
) -> bool:  # fmt: skip
    """Whether arithmetic says that `load` fits."""
    programs = programs_on(config, topology, preset, group, quantize, cache, abstract=True)
    check_load(programs, load)
    most = max(temporaries(programs, load).values())
    return device_bytes(programs.params) + sum(_caches(programs, load)) + most <= topology.chip.hbm
