"""The README's table of what fits where: `python -m mllama_jax.sharding.fit_table [--check]`; takes an hour.

Decode is compiled with 5 and 10 layers and extrapolated to full depth, `--check` also compiles some at full depth; what
prefill and encoding need beside is by arithmetic, as everything is for GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator

import jax

from mllama_jax.config import PRESETS, MllamaConfig
from mllama_jax.sharding.mesh import topology
from mllama_jax.sharding.plan import Plan, plan, programs_on
from mllama_jax.sharding.programs import Compiled, DoesNotFit, Workload, compile_program

MODELS = {"11B": "11b-instruct", "90B": "90b-instruct"}
SLICES = (
    *("v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4", "v6e:1x1", "v6e:2x2", "v6e:2x4", "v6e:4x4"),
    *("v5p:2x1x1", "v5p:2x2x1", "v5p:2x2x2", "tpu7x:1x1x1", "tpu7x:2x2x1"),
    *("h100:1", "h100:2", "h100:4", "h100:8", "h200:1", "h200:8"),
)
CHECKED = (("11B", "v6e:1x1"), ("11B", "v5e:2x2"), ("90B", "v6e:2x4"), ("90B", "v5e:4x4"), ("90B", "v5p:2x2x1"),
           ("90B", "v6e:4x4"))  # fmt: skip
COLUMNS = [(model, quantize) for model in MODELS for quantize in (None, "int8", "int4")]
LOAD = Workload(slots=8, context=8192, images=1)


def shallow(config: MllamaConfig, layers: int) -> MllamaConfig:
    """The model with its first `layers` text layers."""
    cross = tuple(i for i in config.text.cross_layers if i < layers)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, layers=layers, cross_layers=cross))


def extrapolated(config: MllamaConfig, name: str, quantize: str | None = None) -> dict[str, int]:
    """Bytes of arguments, temporaries and code of decode at full depth, from 5 and 10 layers."""
    five, ten = (_decode(shallow(config, layers), name, quantize) for layers in (5, 10))
    more = (config.text.layers - 10) / 5
    sizes = ("arguments", "temporaries", "code")
    return {size: round(getattr(ten, size) + more * (getattr(ten, size) - getattr(five, size))) for size in sizes}


def _decode(config: MllamaConfig, name: str, quantize: str | None = None) -> Compiled:
    return compile_program(programs_on(config, topology(name), "serve", quantize=quantize).decode(LOAD))


def row(model: str, name: str, quantize: str | None) -> tuple[Plan, dict[str, int] | None]:
    """The plan of a model on a slice, and what was compiled for it: nothing where the weights alone do not fit."""
    config, place = PRESETS[MODELS[model]], topology(name)
    made = plan(config, place, LOAD, quantize=quantize, compiled=False)
    if place.chip.platform == "gpu" or made.weights > made.usable:
        return made, None
    sizes = extrapolated(config, name, quantize)
    known = (sizes["temporaries"], sizes["code"])
    return plan(config, place, LOAD, quantize=quantize, compiled=False, decode=known), sizes


def rows(checked: bool) -> Iterator[str]:
    """The table's lines as they are made."""
    names = [model if quantize is None else f"{model}, {quantize}" for model, quantize in COLUMNS]
    yield _line("rows that fit; tokens/s of eight", *(cell for name in names for cell in (name, "")))
    yield "|---|" + "--:|" * (2 * len(names))
    notes = []
    for name in SLICES:
        place, cells = topology(name), []
        for model, quantize in COLUMNS:
            made, sizes = row(model, name, quantize)
            cells.append(str(made.largest_slots) if made.largest_slots else "no")
            cells.append(f"{made.tokens_per_second:.0f}" if made.largest_slots >= LOAD.slots else "")
            if checked and sizes and quantize is None and (model, name) in CHECKED:
                notes.append(check(model, name, sizes))
        yield _line(f"{place.name}, {place.chips} chips" if place.chips > 1 else place.name, *cells)
    yield from notes


def _line(*cells: str) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def check(model: str, name: str, sizes: dict[str, int]) -> str:
    """Full depth beside what was extrapolated."""
    try:
        full = _decode(PRESETS[MODELS[model]], name)
    except DoesNotFit as error:
        return f"{model} {name}: full depth needs {error.needed / 2**30:.2f} GiB and is refused"
    asked, got = sum(sizes.values()), full.arguments + full.temporaries + full.code
    return f"{model} {name}: extrapolated {asked / 1e9:.3f} GB, at full depth {got / 1e9:.3f}, {asked / got - 1:+.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compile six entries at full depth too")
    jax.config.update("jax_platforms", "cpu")
    for line in rows(parser.parse_args().check):
        print(line, flush=True)


if __name__ == "__main__":
    main()
