"""`mllama train RECIPE.toml`: tune a model, or go on where such a run ended."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mllama_jax.errors import InputError

PREEMPTED = 143  # what a shell says of a process that SIGTERM ended


def add_parser(commands: Any) -> None:
    """Add `train` to the subcommands of a parser."""
    parser = commands.add_parser("train", help="tune a model on chats with pictures; a stopped run goes on")
    parser.add_argument("recipe", type=Path, help="what is trained on what, and how: a TOML file")
    parser.add_argument(
        "out", help="directory of the run, gs:// too: new, empty, or of a stopped run of the same recipe"
    )
    parser.add_argument(
        "--join", metavar="auto|HOST:PORT,PROCESS,PROCESSES", help="be one of the processes of a slice or cluster"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int | None:
    try:
        from mllama_jax.cli import not_first, use_compilation_cache
        from mllama_jax.processes import join_by_name
        from mllama_jax.train.recipe import read_recipe
        from mllama_jax.train.trainer import Preempted, train
    except ModuleNotFoundError as error:
        raise InputError(f"training needs {error.name}: pip install 'mllama-jax[train]'") from None
    use_compilation_cache()
    recipe = read_recipe(args.recipe)
    if args.join is not None:
        join_by_name(args.join, {"recipe": str(recipe), "out": args.out})
    try:
        report = train(recipe, args.out)
    except Preempted as notice:
        print(f"mllama train: {notice}", file=sys.stderr)
        return PREEMPTED
    except OSError as error:
        place, why = error.filename or args.out, error.strerror or error
        raise InputError(f"{place}: {why}; once that is mended the same command goes on") from None
    if not_first():  # the first process speaks for all
        return None
    if args.json:
        print(json.dumps(report))
        return None
    print(
        f"{report['result']}: {report['steps']} steps, loss {report['loss']:.4f}, "
        f"{report['tokens_per_second']:.0f} tokens/s"
    )
    if "held_out_loss" in report:
        print(f"  held out: loss {report['held_out_loss']:.4f}, at best {report['best_held_out_loss']:.4f}")
    for name, done in (("dropped", "left out"), ("cut", "cut")):
        if report[name]:
            print(f"  {report[name]} chats were too long and {done}")
    return None
