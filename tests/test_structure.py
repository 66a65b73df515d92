"""The dependency direction of the packages, and that importing the project needs no torch or transformers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each part may import of the project, beside itself.
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "model": {"config", "errors"},
    "processing": {"config", "errors"},
    "sharding": {"config", "errors", "model", "generate"},  # the planner compiles the programs of `generate`
    "convert": {"config", "errors", "model"},
    "generate": {"config", "errors", "model", "processing"},
}


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def sources(name: str) -> list[Path]:
    folder = ROOT / name if name in ("convert", "sharding") else ROOT / "mllama_jax" / name
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


@pytest.mark.parametrize("name", ALLOWED)
def test_imports_go_one_way(name: str) -> None:
    for path in sources(name):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mllama_jax"):
                imported = part(node.module or "")
                assert imported in ALLOWED[name] | {name}, f"{path} imports {node.module}"


@pytest.mark.parametrize("name", ["convert", "sharding"])
def test_linked_packages_are_never_imported_by_their_short_name(name: str) -> None:
    for path in [
        *ROOT.glob("mllama_jax/**/*.py"),
        *ROOT.glob("tests/**/*.py"),
        *sources("convert"),
        *sources("sharding"),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(module.split(".")[0] == name for module in modules), path


def test_no_oracle_at_run_time() -> None:
    """Neither torch nor anything else that only tests use is imported, wherever it may be installed."""
    for path in [*ROOT.glob("mllama_jax/**/*.py"), *sources("convert"), *sources("sharding")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if path.name == "bench_peer.py":  # the peer itself, which `bench --versus` runs in a process of its own
                continue
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names = {module.split(".")[0] for module in modules} | ({"mllama_jax.bench_peer"} & set(modules))
            assert not names & {
                "torch",
                "torchvision",
                "transformers",
                "tiktoken",
                "llama_models",
                "tests",
                "mllama_jax.bench_peer",
            }, path
