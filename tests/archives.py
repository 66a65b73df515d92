"""What the tests of checkpoint files share: hand-made torch archives, and errors of one line."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mllama_jax.errors import InputError


def fault(action: Callable, *arguments: object) -> str:
    """The message of the InputError that `action(*arguments)` raises; it is one line."""
    with pytest.raises(InputError) as caught:
        action(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def torch_archive(path: Path, program: bytes, members: Mapping[str, bytes] | None = None, compression: int = 0) -> Path:
    """A zip archive like torch.save's around any pickle, with further members."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in {"data.pkl": program, **(members or {})}.items():
            archive.writestr(f"archive/{name}", data)
    return path
