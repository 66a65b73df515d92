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
SCHEMA = json.loads((ROOT / "tests/data/schemas/leaderworkerset.json").read_text())


@pytest.fixture
def manifest() -> list[dict[str, Any]]:
    """A server, and the service by which it is found."""
    return list(yaml.safe_load_all((ROOT / "deploy/leaderworkerset.yaml").read_text()))


@pytest.fixture
def group(manifest: list[dict[str, Any]]) -> dict[str, Any]:
    return manifest[0]["spec"]["leaderWorkerTemplate"]


def test_the_manifest_keeps_to_its_schema(manifest: list[dict[str, Any]]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for each in manifest:
        jsonschema.validate(each, SCHEMA)


def test_a_misspelt_manifest_does_not(manifest: list[dict[str, Any]]) -> None:
    for wrong in ({"sizes": 4}, {"restartPolicy": "RecreateGroup"}, {"size": "4"}):
        changed = copy.deepcopy(manifest[0])
        changed["spec"]["leaderWorkerTemplate"].update(wrong)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(changed, SCHEMA)


def test_there_is_a_process_on_every_host_of_the_slice(group: dict[str, Any]) -> None:
    for template in ("leaderTemplate", "workerTemplate"):
        pod = group[template]["spec"]
        selector = pod["nodeSelector"]
        chip = re.fullmatch(r"tpu-(v6e)-slice", selector["cloud.google.com/gke-tpu-accelerator"])
        assert chip is not None
        chips = topology(f"{chip[1]}:{selector['cloud.google.com/gke-tpu-topology']}").chips
        assert group["size"] * pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips


def test_all_run_one_command_of_ours(group: dict[str, Any]) -> None:
    (leader,), (worker,) = (group[name]["spec"]["containers"] for name in ("leaderTemplate", "workerTemplate"))
    assert leader["args"] == worker["args"]
    args = build_parser().parse_args(leader["args"])
    assert (args.command, args.join, args.model) == ("serve", "auto", "gs://BUCKET/90b")
    mounted = {mount["name"] for mount in leader["volumeMounts"]}
    assert mounted == {volume["name"] for volume in group["leaderTemplate"]["spec"]["volumes"]}


def test_clients_reach_process_0_once_it_is_ready(manifest: list[dict[str, Any]], group: dict[str, Any]) -> None:
    """By a service of another name than the one that the controller makes for the set."""
    (leader,) = group["leaderTemplate"]["spec"]["containers"]
    args, probe = build_parser().parse_args(leader["args"]), leader["readinessProbe"]["httpGet"]
    service = manifest[1]
    assert args.host == "0.0.0.0"
    assert (probe["path"], probe["port"]) == ("/ready", args.port)
    assert service["spec"]["ports"][0]["targetPort"] == leader["ports"][0]["containerPort"] == args.port
    own = "leaderworkerset.sigs.k8s.io"
    assert service["spec"]["selector"] == {f"{own}/name": manifest[0]["metadata"]["name"], f"{own}/worker-index": "0"}
    assert service["metadata"]["name"] != manifest[0]["metadata"]["name"]


def test_the_readme_gives_commands_of_ours() -> None:
    commands = re.findall(r"mllama (?:check|generate|serve) --join auto[^\"\n]*", (ROOT / "README.md").read_text())
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
    extra, others = re.search(r"^ARG EXTRA=(\w+)$", text, re.MULTILINE), re.search(r"\[\$EXTRA,(\w+)\]", text)
    assert extra is not None
    assert others is not None
    assert {extra[1], others[1]} <= set(project["optional-dependencies"])
    assert 'ENTRYPOINT ["mllama"]' in text
    assert "mllama" in project["scripts"]
