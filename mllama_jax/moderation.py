"""`mllama moderate`: what Llama Guard 3 11B Vision says of a question, or of an answer to it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `moderate` to the subcommands of a parser."""
    parser = commands.add_parser(
        "moderate", help="ask Llama Guard 3 11B Vision whether a question or an answer is safe; exit code 1 if not"
    )
    parser.add_argument("model", help="checkpoint directory of the guard, gs:// too")
    parser.add_argument("--user", required=True, metavar="TEXT", help="what the user says")
    parser.add_argument("--agent", metavar="TEXT", help="the answer, which is judged then")
    parser.add_argument("--image", type=Path, default=[], action="append", help="a picture; may be given again")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Exit code 1 for what is unsafe."""
    from mllama_jax.cli import load_model, stage
    from mllama_jax.processing.image import open_image

    content: list[dict[str, Any]] = [{"type": "image", "image": open_image(path)} for path in args.image]
    conversation: list[dict[str, Any]] = [{"role": "user", "content": [*content, {"type": "text", "text": args.user}]}]
    if args.agent is not None:
        conversation.append({"role": "assistant", "content": args.agent})
    model = load_model(args)
    with stage("judging (compiles on first use)"):
        verdict = model.moderate(conversation)
    print(json.dumps(verdict.report()) if args.json else verdict)
    return int(not verdict.safe)
