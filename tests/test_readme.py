"""The README's Python runs as it stands, on the small checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

README = (Path(__file__).parents[1] / "README.md").read_text()
REAL = "Llama-3.2-11B-Vision-Instruct"


def test_python_blocks_run(
    small_directory: Path,
    picture: Callable[..., Image.Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture(1).save(tmp_path / "photo.jpg")
    (tmp_path / REAL).symlink_to(small_directory)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    names: dict = {"picture": picture(2), "tokens": [[512, 768, 5, 6]]}
    for block in blocks:
        exec(block, names)
    assert names["answer"].finish_reason in ("stop", "length")
    assert capsys.readouterr().out


def test_pictures_and_folders_are_there() -> None:
    root = Path(__file__).parents[1]
    for path in re.findall(r"""(?:src=")?(mllama_jax/assets/[\w./-]+)""", README):
        assert (root / path).exists(), path
