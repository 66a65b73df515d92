"""`mllama convert` and `mllama verify`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mllama_jax.config import QUANTIZATIONS
from mllama_jax.errors import InputError

LAYOUTS = {"orbax": "ours", "hf": "Hugging Face", "meta": "Meta"}


def add_commands(commands: Any) -> None:
    """Add both to the subparsers of the command line."""
    convert = commands.add_parser("convert", help="write a checkpoint in another layout")
    convert.add_argument("source", help="checkpoint directory, of any layout, or a name on huggingface.co")
    convert.add_argument("target", help="new or empty directory; a stopped conversion goes on")
    convert.add_argument("--to", choices=LAYOUTS, default="orbax", help="orbax (ours, default), hf or meta")
    convert.add_argument("--dtype", help="bfloat16, float32 or float16; each tensor's own by default")
    convert.add_argument("--shards", type=int, default=1, help="Meta's model-parallel files: 1, 2, 4 or 8")
    convert.add_argument("--revision", help="of a name on huggingface.co; the newest by default")
    convert.add_argument("--text-only", action="store_true", help="the decoder alone, a plain Llama 3.1 model")
    convert.add_argument("--text-from", metavar="DIR", help="take the decoder from this text-only checkpoint")
    convert.add_argument("--lora", metavar="DIR", help="merge this LoRA adapter (PEFT's safetensors layout)")
    convert.add_argument("--quantize", choices=QUANTIZATIONS, help="of the decoder's weights; in our layout only")
    convert.set_defaults(run=_convert)

    verify = commands.add_parser("verify", help="check a checkpoint against its manifest; count NaN and infinity")
    verify.add_argument("model", help="checkpoint directory")
    verify.set_defaults(run=_verify)

    for command in (convert, verify):
        command.add_argument("--json", action="store_true", help="print one JSON object")


def _convert(args: argparse.Namespace) -> None:
    from mllama_jax.convert.run import convert

    names = ("to", "dtype", "shards", "revision", "text_only", "text_from", "lora", "quantize")
    report = convert(args.source, args.target, **{name: getattr(args, name) for name in names})
    if args.json:
        print(json.dumps(report))
        return
    seconds, size = report["seconds"], report["bytes"]
    print(f"{args.target}: {LAYOUTS[args.to]} layout, {report['tensors']} tensors, {size / 1e9:.3f} GB in {seconds} s")
    if report["resumed"]:
        print(f"  of which {report['resumed']} tensors were there from an earlier run")
    for note in report["notes"]:
        print(f"  {note}")


def _verify(args: argparse.Namespace) -> None:
    from mllama_jax.convert.verify import verify

    report = verify(args.model)
    if args.json:
        print(json.dumps(report))
    else:
        _print(report)
    if report["damaged"]:
        raise InputError(f"{args.model}: {len(report['damaged'])} damaged: {', '.join(list(report['damaged'])[:4])}")


def _print(report: dict[str, Any]) -> None:
    size, seconds = report["bytes"], report["seconds"]
    print(f"{report['directory']}: {report['tensors']} tensors, {size / 1e9:.3f} GB read in {seconds} s")
    if not report["manifest"]:
        print("  no manifest: nothing to compare with; `mllama convert --to orbax` writes one")
    elif not report["damaged"]:
        print("  every tensor and file is what was written")
    if not report["nan"] and not report["infinite"]:
        print("  no NaN, no infinity")
    for kind in ("nan", "infinite"):
        for name, count in report[kind].items():
            print(f"  {count} {kind} in {name}")
    for name, reason in report["damaged"].items():
        print(f"  damaged: {name}: {reason}")
