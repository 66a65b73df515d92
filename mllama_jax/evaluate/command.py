"""`mllama evaluate` and `mllama compare`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllama_jax.errors import InputError

if TYPE_CHECKING:
    from mllama_jax import Mllama
    from mllama_jax.evaluate.recipe import Recipe


DTYPES = ("bfloat16", "float32", "float16")


def add_commands(commands: Any) -> None:
    """Add both to the subparsers of the command line."""
    evaluate = commands.add_parser("evaluate", help="score a model on a data set, beside published scores")
    evaluate.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE", help=".jsonl or .parquet")
    evaluate.add_argument("--task", required=True, help="a known recipe, or a .toml file of one's own")
    evaluate.add_argument("--output", type=Path, required=True, help="folder of the run; a stopped one goes on")
    evaluate.add_argument("--limit", type=int, help="only so many rows, the first")
    evaluate.add_argument("--batch", type=int, default=16, help="rows at once in each group of devices (default 16)")
    evaluate.add_argument("--group", type=int, help="devices that hold one copy of the weights (default 1)")
    evaluate.add_argument("--versus", type=Path, metavar="FOLDER", help="compare with this earlier run, pair by pair")
    evaluate.add_argument("--html", type=Path, metavar="FILE", help="write a page to look through wrong answers")
    evaluate.add_argument(
        "--join", metavar="auto|HOST:PORT,PROCESS,PROCESSES", help="be one of the processes of a slice or cluster"
    )
    evaluate.set_defaults(run=_evaluate)
    for command in (evaluate,):
        command.add_argument(
            "--dtype", choices=DTYPES, help="bfloat16 (default on accelerators), float32 (default on CPU)"
        )
        command.add_argument("--quantize", choices=["int8"], help="keep the decoder's kernels in int8; on one device")
        command.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.add_argument("--model", help="checkpoint directory, gs:// too (default: what ships)")


def _evaluate(args: argparse.Namespace) -> None:
    from mllama_jax.cli import SHIPPED, join, not_first
    from mllama_jax.evaluate.data import read_rows
    from mllama_jax.evaluate.folder import Folder, read_result
    from mllama_jax.evaluate.recipe import load_recipe
    from mllama_jax.evaluate.report import compare, same_questions, table, versus

    for name in ("batch", "limit", "group"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    recipe = load_recipe(args.task)
    rows = read_rows(args.data, recipe, args.limit)
    if args.html is not None and not os.access(args.html.parent, os.W_OK):
        raise InputError(f"--html: {args.html}: cannot write there; expected a folder that exists")
    earlier = read_result(args.versus)[1] if args.versus is not None else None
    if earlier is not None:
        same_questions([record["id"] for record in earlier], [row.id for row in rows])
    join(args)
    import jax

    from mllama_jax.evaluate.run import evaluate

    args.model = args.model or SHIPPED
    args.dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    folder = None if not_first() else Folder(args.output, configuration(args, recipe, len(rows)))
    told = evaluate(lambda: _load(args.model, args), recipe, rows, folder, batch=args.batch)
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


def _load(model: str | Path, args: argparse.Namespace) -> Mllama:
    """The model on all devices, replicas that share out rows; on one device where it is quantised."""
    import jax

    from mllama_jax import load
    from mllama_jax.cli import stage, use_compilation_cache
    from mllama_jax.loading import preset_mesh

    use_compilation_cache()
    if args.quantize is not None and args.group is not None:
        raise InputError("--group: int8 works on one device so far; leave one of the two out")
    spread = jax.device_count() > 1 and args.quantize is None
    mesh = preset_mesh(model, "evaluate", args.group) if spread else None
    with stage(f"loading {model}"):
        return load(model, dtype=args.dtype, quantize=args.quantize, mesh=mesh, rules="evaluate")


def configuration(args: argparse.Namespace, recipe: Recipe, rows: int) -> dict[str, Any]:
    """All that the answers follow from, beside the devices: a run goes on only with the same."""
    from mllama_jax.evaluate.data import digest
    from mllama_jax.processes import versions

    return {
        "task": dataclasses.asdict(recipe),
        "data": [file.name for file in args.data],
        "data_sha256": digest(args.data),
        "rows": rows,
        "model": Path(args.model).name,
        "weights": weights_digest(args.model),
        "dtype": args.dtype,
        "quantize": args.quantize,
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
