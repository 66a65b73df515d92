"""`mllama plan`: will a model fit a slice, how many rows at once, how fast at best; on a terminal, as JSON, drawn."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllama_jax.config import CACHES, QUANTIZATIONS
from mllama_jax.errors import InputError

if TYPE_CHECKING:
    from mllama_jax.config import MllamaConfig
    from mllama_jax.sharding.mesh import Topology
    from mllama_jax.sharding.plan import Plan
    from mllama_jax.sharding.programs import Workload
    from mllama_jax.train.plan import TrainPlan

GIB = 2**30


def add_parser(commands: Any) -> None:
    """Add `plan` to the subcommands of a parser."""
    parser = commands.add_parser("plan", help="whether a model fits a slice, and how fast it can be; needs no TPU")
    parser.add_argument("model", help="11b, 11b-instruct, 90b, 90b-instruct, guard-3-11b, or a checkpoint directory")
    parser.add_argument("--topology", required=True, help="v6e:2x4, v6e-8, v5p-8, 2xv6e:4x4, h100:8, a3-highgpu-8g ...")
    parser.add_argument("--slots", type=int, default=8, help="rows served at once")
    parser.add_argument("--context", type=int, default=8192, help="positions of a row")
    parser.add_argument("--images", type=int, default=1, help="pictures of a row, of all tiles each")
    parser.add_argument("--quantize", choices=QUANTIZATIONS, help="of the decoder's weights (default: bfloat16)")
    parser.add_argument("--cache", choices=CACHES, help="of keys and values (default: bfloat16)")
    parser.add_argument(
        "--preset", help="serve (default), long-context, evaluate, fsdp (default of --train), fsdp+tensor"
    )
    parser.add_argument(
        "--train", choices=("adapter", "lora", "full"), help="plan a training step of this part, of that many rows"
    )
    parser.add_argument("--group", type=int, help="devices that share a row (default: as the preset does)")
    parser.add_argument(
        "--arithmetic", action="store_true", help="do not ask the TPU's compiler; an estimate in seconds"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw the memory of a device and the step's floors"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import jax

    from mllama_jax.sharding.mesh import topology
    from mllama_jax.sharding.plan import plan
    from mllama_jax.sharding.programs import Workload

    jax.config.update("jax_platforms", "cpu")  # nothing runs here: the programs are only compiled
    place = topology(args.topology)
    check_plot(args.plot)
    load = Workload(args.slots, args.context, args.images)
    if args.train is not None:
        _run_training(args, place, load)
        return
    made = plan(
        config_of(args.model),
        place,
        load,
        preset=args.preset or "serve",
        group=args.group,
        quantize=quantization_of(args.model, args.quantize),
        cache=args.cache,
        compiled=False if args.arithmetic else None,
    )
    print(json.dumps(dataclasses.asdict(made)) if args.json else text(args.model, made))
    if args.plot is not None:
        draw(args.model, made, args.plot)


def _run_training(args: argparse.Namespace, place: Topology, load: Workload) -> None:
    from mllama_jax.train.plan import train_plan

    if args.arithmetic or args.plot is not None or args.quantize is not None or args.cache is not None:
        raise InputError(
            "--train asks the compiler of whole weights, has no caches and draws nothing; leave --arithmetic, --plot, "
            "--quantize, --cache out"
        )
    made = train_plan(config_of(args.model), place, load, args.train, args.preset or "fsdp", args.group)
    print(json.dumps(dataclasses.asdict(made)) if args.json else training_text(args.model, made))


def training_text(model: str, plan: TrainPlan) -> str:
    """The plan of a training step as lines for a terminal."""
    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    rows = [("frozen parameters", plan.frozen), ("trained ones, their moments", plan.trained)]
    rows += [("temporaries, code", plan.temporaries)]
    lines = [
        f"{model}, {plan.part}, on {plan.topology} ({plan.cloud}): {plan.chips} chips, {plan.devices} devices",
        f"preset {plan.preset}: {axes}; {plan.load.slots} rows of {plan.load.context} tokens, "
        f"{plan.load.images} pictures each; by the TPU's compiler"
        + (f", for {plan.stand_in} in their place" if plan.stand_in != plan.topology else ""),
        "",
        "a device holds, GiB",
        *(f"  {name:<28}{size / GIB:9.2f}" for name, size in rows),
        f"  {'needed':<28}{plan.needed / GIB:9.2f}  of {plan.usable / GIB:.2f}: "
        + ("fits" if plan.fits else f"does not fit, {(plan.needed - plan.usable) / GIB:.2f} too many"),
        "",
        f"a step does {plan.flops / 1e12:.0f} TFLOP; it takes at least {plan.seconds:.2f} s",
    ]
    return "\n".join(lines)


def check_plot(file: Path | None) -> None:
    """Raise InputError where nothing can be drawn into the file of `--plot`; before anything is made that is lost."""
    if file is None:
        return
    if file.suffix != ".png":
        raise InputError(f"--plot must name a .png file, got {file}")
    if file.is_dir():
        raise InputError(f"--plot: {file}: expected the name of a file, got a folder")
    if not os.access(file.parent, os.W_OK):
        raise InputError(f"--plot: {file}: cannot write there; expected a folder that exists, got {file.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install 'mllama-jax[plan]'")


def config_of(model: str) -> MllamaConfig:
    from mllama_jax.config import PRESETS
    from mllama_jax.convert.apply import read_config
    from mllama_jax.convert.sources import open_checkpoint
    from mllama_jax.convert.store import is_bucket

    if model in PRESETS:
        return PRESETS[model]
    if not is_bucket(model) and not Path(model).exists():
        raise InputError(f"{model}: neither a directory nor one of {', '.join(PRESETS)}")
    return read_config(open_checkpoint(model))


def quantization_of(model: str, wanted: str | None) -> str | None:
    """What a model's kernels will be in: what is wanted, or what its checkpoint holds. Raises InputError."""
    from mllama_jax.config import PRESETS
    from mllama_jax.convert.sources import open_checkpoint

    stored = None if model in PRESETS else open_checkpoint(model).quantized
    if wanted and stored not in (None, wanted):
        raise InputError(f"{model}: holds {stored} weights, which cannot become {wanted}; leave --quantize out")
    return wanted or stored


def text(model: str, plan: Plan) -> str:
    """The plan as lines for a terminal."""
    from mllama_jax.sharding.compiler import has_compiler
    from mllama_jax.sharding.mesh import topology

    asked = "the TPU's compiler" if plan.source == "compiler" else "arithmetic, nothing was compiled"
    if topology(plan.topology).chip.platform == "tpu" and not has_compiler():
        asked += ": libtpu is missing, pip install 'mllama-jax[plan]'"
    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    lines = [
        f"{model}, {plan.quantize or 'bfloat16'}, caches {plan.cache or 'bfloat16'}, on {plan.topology} "
        f"({plan.cloud}): {plan.chips} chips, {plan.devices} devices",
        f"preset {plan.preset}: {axes}; {plan.load.slots} rows of {plan.load.context} positions, "
        f"{plan.load.images} pictures each; by {asked}",
        "",
        "a device holds, GiB",
    ]
    rows = [("weights", plan.weights), ("self cache", plan.self_cache), ("image cache", plan.image_cache)]
    rows += [(f"{name}: temporaries, code", p.temporaries + p.code) for name, p in plan.programs.items()]
    lines += [f"  {name:<28}{size / GIB:9.2f}" for name, size in rows]
    over = plan.needed - plan.usable
    lines += [
        f"  {'needed at most':<28}{plan.needed / GIB:9.2f}  of {plan.usable / GIB:.2f}: "
        + ("fits" if plan.fits else f"does not fit{f', {over / GIB:.2f} too many' if over > 0 else ''}"),
        f"  rows that fit: {plan.largest_slots}"
        + ("" if plan.fits else f"; the nearest slice that has room, by arithmetic: {plan.nearest or 'none'}"),
        "",
    ]
    if sent := plan.programs["decode"].collectives:
        lines += ["a decode step sends"]
        lines += [f"  {count:4} {kind} of {size / 1e3:.1f} kB between {n}" for kind, size, n, count in sent]
        lines += [""]
    floors = ", ".join(
        f"{name} {1e3 * getattr(plan.floor, name):.2f}" for name in ("bandwidth", "compute", "interconnect")
    )
    lines += [
        f"a decode step reads {plan.floor.read / 1e9:.2f} GB a device; it takes at least, ms: {floors}",
        f"{plan.binds} binds: at most {plan.tokens_per_second:.0f} tokens/s, "
        f"{plan.tokens_per_second / plan.load.slots:.1f} a row",
    ]
    return "\n".join(lines)


def draw(model: str, plan: Plan, path: Path) -> None:
    """Draw the memory of a device as a bar, and the floors of a decode step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    memory, time = figure.subplots(2, 1, height_ratios=(1, 1.4))
    largest = max(plan.programs.values(), key=lambda program: program.temporaries + program.code)
    parts = {
        "weights": plan.weights,
        "self cache": plan.self_cache,
        "image cache": plan.image_cache,
        "temporaries and code": largest.temporaries + largest.code,
    }
    left = 0.0
    for name, size in parts.items():
        memory.barh(0, size / GIB, left=left, label=f"{name} {size / GIB:.1f}")
        left += size / GIB
    memory.axvline(plan.usable / GIB, color="black", linestyle="--", label=f"usable {plan.usable / GIB:.1f}")
    memory.set(yticks=[], xlabel="GiB of a device", title=f"{model} on {plan.topology}, {plan.load.slots} rows")
    memory.legend(ncols=5, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, -1.3), frameon=False)
    names = ("interconnect", "compute", "bandwidth")
    milliseconds = [1e3 * getattr(plan.floor, name) for name in names]
    colours = ["tab:red" if name == plan.binds else "tab:gray" for name in names]
    time.bar_label(time.barh(names, milliseconds, color=colours), fmt="%.2f")
    time.set(xlabel=f"ms a decode step takes at least; {plan.binds} binds: {plan.tokens_per_second:.0f} tokens/s")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}; choose another place") from None
