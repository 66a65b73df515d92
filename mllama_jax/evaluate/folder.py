"""The folder of a run: its configuration, every answer as it comes, and the result when all are there.

run.json is written first; answers.jsonl grows a batch at a time; result.json comes last, when answers.jsonl has been
put in the order of the data. A killed run goes on from its answers and ends with the same two files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllama_jax.errors import InputError

Record = dict[str, Any]  # an answer with all that belongs to it
RUN, ANSWERS, RESULT = "run.json", "answers.jsonl", "result.json"


class Folder:
    """A run's folder, new or one to go on with. Raises InputError where it holds a run of another configuration."""

    def __init__(self, path: Path, configuration: Mapping[str, Any]):
        self.path, self.configuration = path, configuration
        if path.exists() and not path.is_dir():
            raise InputError(f"{path}: is a file; expected a new folder, or that of a run to go on with")
        if (path / RUN).exists():
            _same(path, _read(path / RUN), json.loads(json.dumps(configuration)))
        elif path.exists() and any(path.iterdir()):
            raise InputError(f"{path}: holds other files; expected a new folder, or that of a run to go on with")
        else:
            _made(path)
            _write(path / RUN, _text(configuration))

    def answered(self) -> dict[str, Record]:
        """The answers that are there, by id. A last line that a kill cut short is left out."""
        file = self.path / ANSWERS
        content = file.read_bytes() if file.exists() else b""
        found = {}
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break
            record = _parse(line, f"{file} line {number}")
            found[record["id"]] = record
        return found

    def keep(self, records: Iterable[Record]) -> None:
        """Let the answers be these."""
        _write(self.path / ANSWERS, _lines(records))

    def add(self, records: Iterable[Record]) -> None:
        """Add answers, on disk when this returns."""
        try:
            with open(self.path / ANSWERS, "ab") as file:
                file.write(_lines(records).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                f"{self.path / ANSWERS}: cannot be written: {error.strerror}; mend it and run the same command again"
            ) from None

    def finish(self, records: Sequence[Record], summary: Mapping[str, Any]) -> None:
        """Write the answers in order and the result."""
        self.keep(records)
        digest = hashlib.sha256(_lines(records).encode()).hexdigest()
        _write(self.path / RESULT, _text({"configuration": self.configuration, **summary, "answers_sha256": digest}))


def read_result(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Result and answers of a finished run; InputError where it is not finished, or files are not whole."""
    if not (path / RESULT).exists():
        told = (
            "is of a run that has not ended; run its command again" if (path / RUN).exists() else "is no run's folder"
        )
        raise InputError(f"{path}: {told}")
    result = _read(path / RESULT)
    try:
        content = (path / ANSWERS).read_bytes()
    except OSError as error:
        raise InputError(f"{path / ANSWERS}: cannot be read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != result.get("answers_sha256"):
        raise InputError(f"{path / ANSWERS}: is not what {RESULT} was made of; run its command again")
    return result, [json.loads(line) for line in content.splitlines()]


def _same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differ = [
        f"{key}: {_short(before.get(key))} there, {_short(now.get(key))} now"
        for key in {**now, **before}
        if before.get(key) != now.get(key)
    ]
    if differ:
        raise InputError(f"{path}: holds another run ({'; '.join(differ)}); choose another --output")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read(file: Path) -> dict[str, Any]:
    return _parse(file.read_bytes(), str(file))


def _parse(content: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{where}: is damaged or cut short; delete it and run the command again")
    return found


def _lines(records: Iterable[Record]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _made(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made: {error.strerror}; choose another place") from None


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    beside = file.with_name(f"{file.name}.new")
    try:
        with open(beside, "w", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        beside.replace(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror}; choose another place or make room") from None
