"""What `deploy/` holds is what clusters and our commands accept."""

from __future__ import annotations

import copy
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from mllama_jax.cli import build_parser
from mllama_jax.sharding.mesh import topology

ROOT = Path(__file__).parents[1]
SCHEMA = json.loads((ROOT / "tests/data/schemas/jobset.json").read_text())


@pytest.fixture
def manifest() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy/jobset.yaml").read_text())


def job(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def test_the_manifest_keeps_to_its_schema(manifest: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(manifest, SCHEMA)


def test_a_misspelt_manifest_does_not(manifest: dict[str, Any]) -> None:
    for wrong in ({"paralelism": 4}, {"completionMode": "indexed"}, {"backoffLimit": "0"}):
        changed = copy.deepcopy(manifest)
        job(changed).update(wrong)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(changed, SCHEMA)


def test_there_is_a_process_on_every_host_of_the_slice(manifest: dict[str, Any]) -> None:
    pod = job(manifest)["template"]["spec"]
    selector = pod["nodeSelector"]
    chip = re.fullmatch(r"tpu-(v6e)-slice", selector["cloud.google.com/gke-tpu-accelerator"])
    assert chip is not None
    chips = topology(f"{chip[1]}:{selector['cloud.google.com/gke-tpu-topology']}").chips
    assert job(manifest)["completionMode"] == "Indexed"
    assert job(manifest)["parallelism"] == job(manifest)["completions"]
    assert job(manifest)["completions"] * pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips


def test_the_command_is_one_of_ours(manifest: dict[str, Any]) -> None:
    (container,) = job(manifest)["template"]["spec"]["containers"]
    args = build_parser().parse_args(container["args"])
    assert args.join == "auto"
    assert args.model == "gs://BUCKET/90b"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job(manifest)["template"]["spec"]["volumes"]}


def test_the_readme_gives_commands_of_ours() -> None:
    commands = re.findall(r"mllama (?:check|generate) --join auto[^\"\n]*", (ROOT / "README.md").read_text())
    assert len(commands) == 2
    for command in commands:
        assert build_parser().parse_args(shlex.split(command)[1:]).join == "auto"


def test_the_image_holds_the_package() -> None:
    """Everything that it copies is there, all that the package is built from is copied, and its extra exists."""
    text = (ROOT / "deploy/Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for name in line.split()[:-1]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    links = {path.resolve().name for path in (ROOT / "mllama_jax").iterdir() if path.is_symlink()}
    assert copied == {"pyproject.toml", project["readme"], *project["license-files"], "mllama_jax", *links}
    assert all((ROOT / name).exists() for name in copied)
    extra = re.search(r"^ARG EXTRA=(\w+)$", text, re.MULTILINE)
    assert extra is not None
    assert extra[1] in project["optional-dependencies"]
    assert 'ENTRYPOINT ["mllama"]' in text
    assert "mllama" in project["scripts"]
