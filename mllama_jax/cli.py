"""`mllama`: the command line. A mistake in what the user gave ends in one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mllama_jax import bench, moderation, planner
from mllama_jax.config import CACHES, QUANTIZATIONS
from mllama_jax.convert import command as conversion
from mllama_jax.errors import InputError
from mllama_jax.evaluate import command as evaluation
from mllama_jax.processes import attend, attended, join_by_name, leaving
from mllama_jax.serve import command as serving
from mllama_jax.train import command as train

if TYPE_CHECKING:
    from mllama_jax import Mllama

SHIPPED = Path(__file__).parent / "assets" / "pictures-4m"


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if getattr(args, "join", None) is not None and not attended():
        return attend(["-m", "mllama_jax.cli", *(sys.argv[1:] if argv is None else argv)])
    try:
        with leaving():
            return args.run(args) or 0
    except InputError as error:
        print(f"mllama {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mllama {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception:
        if (why := no_backend()) is None:
            raise
        print(f"mllama {args.command}: {why}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line; its subcommands are of its kind."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists what it takes\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mllama", description="Llama 3.2 Vision in JAX")
    commands = parser.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="answer a question about pictures")
    generate.add_argument("question", help="what to ask")
    generate.add_argument("--image", type=Path, default=[], action="append", help="a picture; may be given again")
    generate.add_argument("--look", type=Path, metavar="FILE.png", help="draw where each word of the answer looked")
    generate.add_argument(
        "--lookup", type=int, default=0, metavar="K", help="guess K tokens at once from what is written"
    )
    generate.add_argument("--draft", metavar="DIR", help="a small model that guesses the K tokens of --lookup instead")
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk about pictures in the terminal")
    chat.set_defaults(run=_chat)

    served, moderate = serving.add_parser(commands), moderation.add_parser(commands)
    for command in (generate, chat, served):
        command.add_argument("--model", default=SHIPPED, help="checkpoint directory, gs:// too (default: what ships)")
    for command in (generate, chat, served, moderate):
        command.add_argument("--dtype", help="bfloat16 (default on accelerators), float32 (default on CPU)")
        command.add_argument(
            "--quantize", choices=QUANTIZATIONS, help="what to keep the decoder's kernels in, a draft's or guard's too"
        )
        command.add_argument("--cache", choices=CACHES, help="keep the keys and values of what was read in int8")
    for command in (generate, chat):
        command.add_argument("--max-new-tokens", type=int, default=256, help="of the answer at most (default: 256)")
        command.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
        command.add_argument("--top-k", type=int, default=0, help="draw from the K likeliest tokens (default: all)")
        command.add_argument("--top-p", type=float, default=1.0, help="or from those that have P of the probability")
        command.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")

    inspect = commands.add_parser("inspect", help="say what a checkpoint directory holds")
    inspect.add_argument("model", help="checkpoint directory, gs:// too")
    inspect.set_defaults(run=_inspect)

    check = commands.add_parser("check", help="compare this machine with what Meta's code computes")
    check.set_defaults(run=_check)

    for command in (generate, chat, served, moderate):
        command.add_argument(
            "--preset", help="spread the model over all devices: serve, evaluate, long-context, fsdp, fsdp+tensor"
        )
    for command in (generate, served, check):
        command.add_argument(
            "--join", metavar="auto|HOST:PORT,PROCESS,PROCESSES", help="be one of the processes of a slice or cluster"
        )

    conversion.add_commands(commands)
    evaluation.add_commands(commands)
    planner.add_parser(commands)
    bench.add_parser(commands)
    train.add_parser(commands)
    for command in (generate, moderate, inspect, check):
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Say on a terminal what is going on, and how long it took."""
    if not sys.stderr.isatty():
        yield
        return
    print(f"{what} ...", end="", file=sys.stderr, flush=True)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        print(file=sys.stderr)
        raise
    print(f"\r{what}: {time.monotonic() - start:.1f} s", file=sys.stderr)


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache directory, so that only the first run of a model compiles."""
    import jax

    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "mllama-jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings among the arguments, refused here, before the long load, where they are bad."""
    from mllama_jax.generate.sampling import SamplingParams

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    sampling = {name: getattr(args, name) for name in names}
    SamplingParams(**sampling)
    return sampling


def no_backend() -> str | None:
    """What to tell where JAX cannot start the devices that it was told to take; None where it can."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked, why = os.environ.get("JAX_PLATFORMS", ""), f"{error}".partition("\n")[0]
        told = f"JAX_PLATFORMS={asked}: no such device, or no plugin for it"
        return f"{told}; install the extra cuda or tpu, or unset it{f' ({why})' if why else ''}"
    return None


def default_dtype() -> str:
    import jax

    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def load_model(args: argparse.Namespace) -> Mllama:
    start_jax(args)
    return _load(args, args.model)


def start_jax(args: argparse.Namespace) -> None:
    """Settle what the arguments leave to the devices that there are."""
    with stage("starting JAX"):
        import jax

        use_compilation_cache()
        args.dtype = args.dtype or default_dtype()
        args.preset = args.preset or ("serve" if jax.process_count() > 1 else None)


def _load(args: argparse.Namespace, path: str | Path) -> Mllama:
    """The checkpoint at `path`, on the mesh of the arguments' model."""
    with stage(f"loading {path}"):
        from mllama_jax import load
        from mllama_jax.loading import preset_mesh

        if args.preset is None:
            return load(path, dtype=args.dtype, quantize=args.quantize, cache=args.cache)
        mesh = preset_mesh(args.model, args.preset)
        return load(path, dtype=args.dtype, quantize=args.quantize, cache=args.cache, mesh=mesh, rules=args.preset)


def join(args: argparse.Namespace) -> None:
    """Become one of the processes that `--join` means, all given the same arguments."""
    if args.join is not None:
        arguments = {name: str(value) for name, value in vars(args).items() if name not in ("join", "run")}
        join_by_name(args.join, arguments)


def not_first() -> bool:
    import jax

    return jax.process_index() > 0


def _chat(args: argparse.Namespace) -> None:
    from mllama_jax.terminal import Terminal

    sampling = _sampling(args)
    Terminal(load_model(args).chat(), sampling).run()


def _generate(args: argparse.Namespace) -> None:
    from mllama_jax.generate.speculate import checked
    from mllama_jax.processing.image import open_image

    sampling, lookup = _sampling(args), checked(args.lookup, args.draft)
    if args.look is not None:
        _check_look(args.look, args.image)
    content: list[dict[str, Any]] = [{"type": "image", "image": open_image(path)} for path in args.image]
    conversation = [{"role": "user", "content": [*content, {"type": "text", "text": args.question}]}]
    join(args)
    start_jax(args)
    draft = _load(args, args.draft) if args.draft is not None else None
    model = _load(args, args.model)
    if not_first():  # the first process speaks for all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if args.json:
        start = time.monotonic()
        completion = model.generate([conversation], lookup=lookup, draft=draft, **sampling)[0]
        seconds = round(time.monotonic() - start, 3)
        report = {**dataclasses.asdict(completion), "model": str(args.model), "dtype": args.dtype, "seconds": seconds}
        print(json.dumps(report))
        answer = completion.text
    else:
        pieces = model.stream(conversation, lookup=lookup, draft=draft, **sampling)
        with stage("reading the prompt (compiles on first use)"):
            answer = next(pieces, "")
        print(answer, end="", flush=True)
        for piece in pieces:
            answer += piece
            print(piece, end="", flush=True)
        print()
    if args.look is not None:
        with stage(f"drawing {args.look}"):
            sheet = model.look(conversation, answer).draw()
            try:
                sheet.save(args.look)
            except OSError as error:
                raise InputError(f"--look: {args.look}: cannot be written: {error.strerror}") from None


def _check_look(file: Path, images: Sequence[Path]) -> None:
    if not images:
        raise InputError("--look shows where on a picture an answer looked; give --image too")
    if file.suffix.lower() != ".png":
        raise InputError(f"--look: {file}: expected the name of a .png file, got {file.suffix or 'no suffix'}")
    if file.is_dir():
        raise InputError(f"--look: {file}: expected the name of a file, got a folder")
    if not os.access(file.parent, os.W_OK):
        raise InputError(f"--look: {file}: cannot write there; expected a folder that exists, got {file.parent}")


def _inspect(args: argparse.Namespace) -> None:
    report = inspect_checkpoint(args.model)
    if args.json:
        print(json.dumps(report))
        return
    print(f"{report['directory']}: {report['layout']} layout, {report['tensors']} tensors, {_short(report['bytes'])}B")
    parts = "".join(f"; {part} {_short(count)}" for part, count in report["parts"].items())
    print(f"  parameters  {_short(report['parameters'])}{parts}")
    print("  dtypes      " + ", ".join(f"{dtype} x {count}" for dtype, count in report["dtypes"].items()))
    for part in ("text", "vision"):
        if report["config"][part]:
            print(f"  {part:<11} " + ", ".join(f"{k} {v}" for k, v in report["config"][part].items()))


def _check(args: argparse.Namespace) -> int:
    """Exit code 1 where a comparison is beyond its limit."""
    from mllama_jax.check import environment, findings, pace

    join(args)
    where, found = environment(), []
    if not args.json:
        print("\n".join(f"{name:<12} {value}" for name, value in where.items()) + "\n")
    for each in findings():
        found.append(each)
        if not args.json:
            print(f"{'ok  ' if each.ok else 'BAD '} {each.measured:<8.2g} of {each.limit:<6g} {each.name}", flush=True)
    decode = pace()
    if args.json:
        every = [{**dataclasses.asdict(each), "ok": each.ok} for each in found]
        print(json.dumps({**where, "findings": every, "decode": dataclasses.asdict(decode)}))
    bad = sum(not each.ok for each in found)
    if not args.json:
        told = f"{bad} beyond its limit: please report all of the above" if bad else "all within their limits"
        print(f"\n{decode.describe()}\n{len(found)} comparisons, {told}")
    return int(bad > 0)


def _short(n: int) -> str:
    """10642941475 -> "10.643 G"."""
    unit = next((unit for unit in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if n >= unit[1]), ("", 1))
    return f"{n / unit[1]:.3f} {unit[0]}"


def inspect_checkpoint(directory: str) -> dict[str, Any]:
    """What the headers of a checkpoint say: layout, configuration, counts of tensors, parameters, bytes and dtypes."""
    import math
    from collections import Counter

    from mllama_jax.convert.apply import check_shapes, read_config
    from mllama_jax.convert.sources import open_checkpoint

    checkpoint = open_checkpoint(directory)
    config = read_config(checkpoint)
    shapes = check_shapes(checkpoint, config)
    parts: Counter[str] = Counter()
    for path, shape in shapes.items():
        parts[path[0]] += math.prod(shape)
    return {
        "directory": directory,
        "layout": {"hf": "Hugging Face", "meta": "Meta", "orbax": "Orbax"}[checkpoint.layout],
        "tensors": len(checkpoint.shapes),
        "parameters": sum(parts.values()),
        "parts": dict(parts),
        "bytes": sum(math.prod(shape) * checkpoint.dtypes[name].itemsize for name, shape in checkpoint.shapes.items()),
        "dtypes": dict(Counter(str(dtype) for dtype in checkpoint.dtypes.values())),
        "config": dataclasses.asdict(config),
    }


if __name__ == "__main__":
    sys.exit(main())
