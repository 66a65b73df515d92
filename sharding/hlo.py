"""What a compiled program does, read from the text of its optimised HLO: collectives, and copies in device memory."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32}

# `%name = shape opcode(operands), attributes`, where a shape may be a tuple of shapes with layouts.
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_CALLED = re.compile(r"(?:calls|body|true_computation|false_computation|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective: what kind, bytes of its result on a device, how many devices take part."""

    kind: str
    bytes: int
    group: int

    @property
    def wire(self) -> float:
        """Bytes that each device has to send, at the least."""
        share = (self.group - 1) / self.group
        return self.bytes * {"all-reduce": 2 * share, "reduce-scatter": self.group - 1}.get(self.kind, share)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    rest: str
    root: bool


class Program:
    """A module's computations by name."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry, own = "", []
        for line in text.splitlines():
            if found := _INSTRUCTION.match(line):
                root, name, shape, opcode, rest = found.groups()
                own.append(Instruction(name, shape, opcode, rest, root is not None))
            elif line.rstrip().endswith("{") and not line[:1].isspace() and not line.startswith("HloModule"):
                head = line.removeprefix("ENTRY ").lstrip("%").split()[0].split("(")[0]
                self.computations[head] = own = []
                if line.startswith("ENTRY"):
                    self.entry = head

    def collectives(self) -> Counter[Collective]:
        """How often each collective runs: a loop as often as the compiler knows it does, else once."""
        return self._collectives(self.entry)

    @functools.cache  # noqa: B019
    def _collectives(self, name: str) -> Counter[Collective]:
        found: Counter[Collective] = Counter()
        for instruction in self.computations[name]:
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                found[Collective(kind, _result_bytes(instruction), _group(instruction.rest))] += 1
            elif instruction.opcode not in ("async-update", "async-done"):
                times = _trips(instruction.rest) if instruction.opcode == "while" else 1
                for called in self._called(instruction):
                    for collective, count in self._collectives(called).items():
                        found[collective] += count * times
        return found

    def _called(self, instruction: Instruction) -> Iterator[str]:
        names = _CALLED.findall(instruction.rest)
        for branches in _BRANCHES.findall(instruction.rest):
            names += [name.strip().lstrip("%") for name in branches.split(",")]
        return (name for name in names if name in self.computations)

    def copies(self, least: int) -> list[str]:
        """Copies and transposes of at least so many bytes from a device's main memory to its main memory.

        What is fetched ahead into on-chip memory, or put back from there, is none: the layout says `S(1)`.
        """
        found = []
        for each in self.executed():
            arrays = [(size, layout) for size, layout in _arrays(each.shape) if size >= least]
            if self._copies(each) and arrays and not any("S(" in layout for _, layout in arrays):
                found.append(f"{each.name} = {each.shape} {each.opcode}")
        return found

    def executed(self) -> Iterator[Instruction]:
        """Instructions whose results exist in memory: what is fused into another one is not among them."""
        fused: set[str] = set()
        fusions = [each for own in self.computations.values() for each in own if each.opcode == "fusion"]
        for fusion in fusions:
            fused.update(_CALLED.findall(fusion.rest))
        return (each for name, own in self.computations.items() if name not in fused for each in own)

    def _copies(self, instruction: Instruction) -> bool:
        if instruction.opcode in ("copy", "copy-start", "transpose"):
            return True
        called = [name for name in _CALLED.findall(instruction.rest) if name in self.computations]
        roots = [each for name in called for each in self.computations[name] if each.root]
        return instruction.opcode == "fusion" and any(self._copies(each) for each in roots)


def _arrays(shape: str) -> list[tuple[int, str]]:
    """Bytes and layout of each array in a shape."""
    return [
        (math.prod(int(n) for n in dims.split(",") if n) * _BITS.get(dtype, 0) // 8, layout or "")
        for dtype, dims, layout in _ARRAY.findall(shape)
    ]


def _result_bytes(instruction: Instruction) -> int:
    """Bytes of a collective's result; one that starts here and ends elsewhere has its operands before it."""
    sizes = [size for size, _ in _arrays(instruction.shape)]
    if not instruction.opcode.endswith("-start"):
        return sum(sizes)
    if instruction.opcode == "collective-permute-start":
        return sizes[0]
    return sum(sizes) if instruction.opcode == "all-reduce-start" else sum(sizes[len(sizes) // 2 :])


def _group(rest: str) -> int:
    """How many devices one group has; these are groups of two: `replica_groups={{0,1},{2,3}}`, `[2,2]<=[4]`, and
    `mesh['a'=2,'b'=2] {'b'}`, where without braces all axes are meant."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?: \{([^}]*)\})?", rest):
        sizes = dict(axis.split("=") for axis in found[1].split(","))
        return math.prod(int(sizes[axis]) for axis in (found[2].split(",") if found[2] else sizes))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return found[1].count(",") + 1
    return 2  # a permutation: one sends, one receives


def _trips(rest: str) -> int:
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest)
    return int(found[1]) if found else 1
