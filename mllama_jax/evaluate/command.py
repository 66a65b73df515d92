"""`mllama evaluate` and `mllama compare`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllama_jax.config import CACHES, DTYPES, QUANTIZATIONS
from mllama_jax.errors import InputError

if TYPE_CHECKING:
    from mllama_jax import Mllama


def add_commands(commands: Any) -> None:
    """Add both to the subparsers of the command line."""
    evaluate = commands.add_parser("evaluate", help="score a model on a data set, beside published scores")
    own = evaluate.add_argument_group("local data")
    own.add_argument("--data", type=Path, nargs="+", metavar="FILE", help=".jsonl or .parquet")
    own.add_argument("--task", help="a known recipe, or a .toml file of one's own")
    own.add_argument("--versus", type=Path, metavar="FOLDER", help="compare with this earlier run, pair by pair")
    own.add_argument("--html", type=Path, metavar="FILE", help="write a page to look through wrong answers")
    harness = evaluate.add_argument_group("another harness")
    harness.add_argument("--harness", choices=["lm-eval"], help="ask its tasks instead")
    harness.add_argument("--tasks", metavar="NAME,NAME", help="of the harness")
    harness.add_argument("--include", type=Path, metavar="FOLDER", help="tasks of one's own, .yaml files")
    harness.add_argument("--chat", action="store_true", help="ask through the chat template, for instruct models")
    evaluate.add_argument("--output", type=Path, required=True, help="folder of the run; a stopped one goes on")
    evaluate.add_argument("--model", help="checkpoint directory, gs:// too (default: what ships)")
    evaluate.add_argument("--limit", type=int, help="only so many questions, the first")
    evaluate.add_argument("--batch", type=int, default=16, help="rows at once in each group of devices (default 16)")
    evaluate.add_argument("--group", type=int, help="devices that hold one copy of the weights (default 1)")
    evaluate.add_argument(
        "--join", metavar="auto|HOST:PORT,PROCESS,PROCESSES", help="be one of the processes of a slice or cluster"
    )
    evaluate.set_defaults(run=_evaluate)

    compare = commands.add_parser("compare", help="how far two models agree, token by token, along known answers")
    compare.add_argument("first", help="checkpoint directory")
    compare.add_argument("second", help="checkpoint directory, or a .npz of logits that other code made")
    compare.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE", help=".jsonl or .parquet")
    compare.add_argument("--task", required=True, help="a known recipe, or a .toml file of one's own")
    compare.add_argument("--limit", type=int, help="only so many rows, the first")
    compare.set_defaults(run=_compare)

    for command, whose in ((evaluate, "the decoder's"), (compare, "the second's decoder's")):
        command.add_argument(
            "--dtype", choices=DTYPES, help="bfloat16 (default on accelerators), float32 (default on CPU)"
        )
        command.add_argument("--quantize", choices=QUANTIZATIONS, help=f"what to keep {whose} kernels in")
        command.add_argument("--cache", choices=CACHES, help=f"keep {whose} keys and values in int8")
        command.add_argument("--json", action="store_true", help="print one JSON object")


def _evaluate(args: argparse.Namespace) -> None:
    wanted, other = (("tasks",), ("data", "task", "versus", "html"))
    if args.harness is None:
        wanted, other = ("data", "task"), ("tasks", "include", "chat")
    for name in wanted:
        if not getattr(args, name):
            raise InputError(f"--{name} is missing; give --data and --task, or --harness and --tasks")
    for name in other:
        if getattr(args, name):
            raise InputError(f"--{name} is not for {'data of your own' if args.harness is None else args.harness}")
    for name in ("batch", "limit", "group"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    (_ask_rows if args.harness is None else _ask_harness)(args)


def _ask_rows(args: argparse.Namespace) -> None:
    """Ask the rows of local data by a recipe."""
    from mllama_jax.cli import not_first
    from mllama_jax.evaluate.data import digest, read_rows
    from mllama_jax.evaluate.folder import Folder, read_result
    from mllama_jax.evaluate.recipe import load_recipe
    from mllama_jax.evaluate.report import compare, same_questions, table, versus

    recipe = load_recipe(args.task)
    rows = read_rows(args.data, recipe, args.limit)
    if args.html is not None and not os.access(args.html.parent, os.W_OK):
        raise InputError(f"--html: {args.html}: cannot write there; expected a folder that exists")
    earlier = read_result(args.versus)[1] if args.versus is not None else None
    if earlier is not None:
        same_questions([record["id"] for record in earlier], [row.id for row in rows])
    _begin(args)

    from mllama_jax.evaluate.run import evaluate
    from mllama_jax.processes import agree

    asked = {"task": dataclasses.asdict(recipe), "data": [file.name for file in args.data]}
    asked |= {"data_sha256": digest(args.data), "rows": len(rows)}
    agree({"data": asked["data_sha256"]})
    folder = None if not_first() else Folder(args.output, asked | _configuration(args))
    told = evaluate(lambda: _load(args), recipe, rows, folder, batch=args.batch)
    if folder is None:
        return
    result, records = read_result(args.output)
    comparison = compare(earlier, records) if earlier is not None else None
    line = versus(str(args.versus), comparison) if comparison is not None else None
    if args.html is not None:
        from mllama_jax.evaluate.page import write_page

        write_page(args.html, result, records, rows, recipe, line)
    if args.json:
        extra = {"versus": dataclasses.asdict(comparison)} if comparison is not None else {}
        print(json.dumps({**result, "asked": told, **extra}))
        return
    print(table(result))
    if line is not None:
        print(line)
    print(f"asked {told['rows']} in {told['batches']} batches of {told['rows_at_once']}, {told['groups']} groups")


def _ask_harness(args: argparse.Namespace) -> None:
    """Run tasks of lm-eval."""
    from mllama_jax.cli import not_first
    from mllama_jax.evaluate.folder import Folder

    _begin(args)
    try:
        from mllama_jax.evaluate import harness
    except ImportError as error:
        raise InputError(f"--harness lm-eval needs {error.name}: pip install 'mllama-jax[eval]'") from None
    tasks = args.tasks.split(",")
    manager = harness.tasks_of(args.include, tasks)
    asked = {"harness": harness.version(), "tasks": tasks, "chat": args.chat, "limit": args.limit}
    folder = None if not_first() else Folder(args.output, asked | _configuration(args))
    model = harness.HarnessModel(_load(args), batch=args.batch)
    results, records = harness.run(model, tasks, manager, args.output, chat=args.chat, limit=args.limit)
    if folder is None:
        return
    folder.finish(records, results)
    print(json.dumps(results) if args.json else harness.make_table(results))


def _compare(args: argparse.Namespace) -> None:
    from mllama_jax.evaluate.data import read_rows
    from mllama_jax.evaluate.recipe import load_recipe

    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit must be at least 1, got {args.limit}")
    recipe = load_recipe(args.task)
    rows = read_rows(args.data, recipe, args.limit)

    from mllama_jax import load
    from mllama_jax.cli import default_dtype, stage, use_compilation_cache
    from mllama_jax.evaluate.agreement import Reference, agreement, text

    use_compilation_cache()
    dtype = args.dtype or default_dtype()
    reference = Reference(Path(args.second)) if args.second.endswith(".npz") else None
    for name in ("quantize", "cache"):
        if reference is not None and getattr(args, name) is not None:
            raise InputError(f"--{name}: {args.second} is no model; leave it out")
    with stage(f"loading {args.first}"):
        first = load(args.first, dtype=dtype)
    with stage(f"loading {args.second}"):
        second = reference or load(args.second, dtype=dtype, quantize=args.quantize, cache=args.cache)
    found = agreement(first, second, recipe, rows)
    print(json.dumps(dataclasses.asdict(found)) if args.json else text(found))


def _begin(args: argparse.Namespace) -> None:
    """Join the other processes, then fill in what depends on the machine."""
    from mllama_jax.cli import SHIPPED, default_dtype, join

    join(args)

    args.model = args.model or SHIPPED
    args.dtype = args.dtype or default_dtype()


def _load(args: argparse.Namespace) -> Mllama:
    """The model on all devices, replicas that share out rows."""
    import jax

    from mllama_jax import load
    from mllama_jax.cli import stage, use_compilation_cache
    from mllama_jax.loading import preset_mesh

    use_compilation_cache()
    mesh = preset_mesh(args.model, "evaluate", args.group) if max(jax.device_count(), args.group or 1) > 1 else None
    with stage(f"loading {args.model}"):
        return load(args.model, dtype=args.dtype, quantize=args.quantize, cache=args.cache, mesh=mesh, rules="evaluate")


def _configuration(args: argparse.Namespace) -> dict[str, Any]:
    """What answers follow from, beside the questions; a run goes on only with the same, on however many devices."""
    import jax

    from mllama_jax.processes import versions

    return {
        "model": Path(args.model).name,
        "weights": weights_digest(args.model),
        "dtype": args.dtype,
        "quantize": args.quantize,
        "cache": args.cache,
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }


def weights_digest(model: str | Path) -> str:
    """SHA-256 of the manifest of a checkpoint that `mllama convert` wrote; of all files of another's directory."""
    import hashlib
    from concurrent.futures import ThreadPoolExecutor

    from mllama_jax.convert.manifest import MANIFEST, digest_of
    from mllama_jax.convert.sources import open_checkpoint
    from mllama_jax.convert.store import Store

    checkpoint = open_checkpoint(model)
    if checkpoint.layout == "orbax":
        return digest_of(Store(checkpoint.directory).read(MANIFEST) or b"")
    if not isinstance(checkpoint.directory, Path):
        raise InputError(f"{model}: has no manifest to tell its weights by; `mllama convert` writes one")

    def one(file: Path) -> str:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    files = sorted(file for file in checkpoint.directory.iterdir() if file.is_file())
    with ThreadPoolExecutor() as pool:
        return digest_of(json.dumps([*zip((f.name for f in files), pool.map(one, files), strict=True)]).encode())
