"""Names on huggingface.co, from a server on this machine that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from mllama_jax.convert.hub import local
from mllama_jax.convert.run import convert
from tests.archives import fault
from tests.test_convert import assert_same, read

NAME, COMMIT = "meta-llama/Llama-3.2-11B-Vision", "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """The files of one repository; `status` and `code` are what every request is refused with."""

    def __init__(self, directory: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.directory, self.status, self.code = directory, 200, ""
        self.got: list[str] = []
        self.cuts: dict[str, int] = {}  # bytes after which the next download of a file breaks off

    def files(self) -> list[str]:
        return [str(path.relative_to(self.directory)) for path in self.directory.rglob("*") if path.is_file()]


class Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path, hub = self.path.partition("?")[0], self.server
        if hub.status != 200:
            return self.send(hub.status, b"{}", {"X-Error-Code": hub.code, "X-Error-Message": "refused"})
        if path.startswith(f"/api/models/{NAME}/revision/"):
            siblings = [{"rfilename": name} for name in hub.files()]
            info = {"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            return self.send(200, json.dumps(info).encode())
        if path.startswith(f"/api/models/{NAME}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": (hub.directory / name).stat().st_size, "oid": self.etag(name)}
                for name in hub.files()
            ]
            return self.send(200, json.dumps(tree).encode())
        name = path.removeprefix(f"/{NAME}/resolve/{COMMIT}/")
        if name not in hub.files():
            return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        content = (hub.directory / name).read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self.etag(name)}"', "Accept-Ranges": "bytes"}
        if not body:
            return self.send(200, content, headers, body=False)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        hub.got.append(f"{name}@{start}" if start else name)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(206 if start else 200, content[start:], headers, cut=hub.cuts.pop(name, 0))
        return None

    def etag(self, name: str) -> str:
        return hashlib.sha1((self.server.directory / name).read_bytes()).hexdigest()

    def send(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, body: bool = True, cut: int = 0
    ) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content[: cut or len(content)])
            self.close_connection = True


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    directory = tmp_path / "repository"
    (directory / "original").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "LICENSE.txt", "README.md", "pytorch_model.bin"):
        (directory / name).write_text(name * 10)
    (directory / "original/params.json").write_text("{}")
    server = Hub(directory)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()
    server.server_close()


def test_a_name_is_downloaded_once_and_only_what_is_needed(hub: Hub) -> None:
    directory = Path(local(NAME))
    assert directory.name == COMMIT
    assert sorted(path.name for path in directory.iterdir()) == sorted(hub.got)
    assert sorted(hub.got) == ["LICENSE.txt", "config.json", "model.safetensors", "tokenizer.json"]
    assert (directory / "config.json").read_text() == "config.json" * 10
    hub.got.clear()
    assert local(NAME, COMMIT) == directory
    assert hub.got == []


def test_a_download_that_breaks_off_goes_on(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50)
    hub.cuts["model.safetensors"] = 100
    directory = local(NAME)
    assert "model.safetensors@100" in hub.got
    assert Path(directory, "model.safetensors").read_text() == "model.safetensors" * 10


def test_convert_takes_names(hub: Hub, small_directory: Path, tmp_path: Path) -> None:
    hub.directory = small_directory
    report = convert(NAME, tmp_path / "target", to="orbax")
    assert (report["from"], report["source"].split("/")[-1]) == ("hf", COMMIT)
    assert_same(read(tmp_path / "target")[1], read(small_directory)[1])


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "is gated: accept its licence at https://huggingface.co/meta-llama/Llama-3.2-11B-Vision,"),
        (404, "RepoNotFound", "is no directory here and no model that huggingface.co shows you; check the name"),
        (404, "RevisionNotFound", "has no revision 'v9'"),
        (500, "", "cannot be downloaded ("),
    ],
)
def test_refusals_are_one_line(hub: Hub, status: int, code: str, message: str) -> None:
    hub.status, hub.code = status, code
    assert f"{NAME}: {message}" in fault(local, NAME, "v9")


def test_offline_is_one_line(hub: Hub) -> None:
    hub.shutdown()
    hub.server_close()
    message = fault(local, NAME)
    assert message.startswith(f"{NAME}: cannot be downloaded (")
    assert message.endswith("connect and try again, or give a directory")


def test_directories_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local("a/b") == "a/b"
    assert local(Path("absent/b")) == Path("absent/b")
    assert local("gs://bucket/path") == "gs://bucket/path"
    assert "revision 'v1' is for names on huggingface.co" in fault(local, "a/b", "v1")
