"""Pictures: equal to transformers' processor to the bit, opened upright, refused in one line."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from mllama_jax.config import ASPECT_RATIOS, VisionConfig
from mllama_jax.errors import InputError
from mllama_jax.processing.image import MAX_PIXELS, MEAN, STD, choose_canvas, normalise, open_image, preprocess
from mllama_jax.processing.image import split_tiles as split
from tests.processing import DATA, PICTURES, TILE, digest, noise

VISION = VisionConfig(tile=TILE)


def test_pixels_equal_transformers_to_the_bit() -> None:
    golden = json.loads((DATA / "pictures.json").read_text())
    pixels = [preprocess([noise(*picture)], VISION) for picture in PICTURES]
    ours = [[*picture, int(ids[0]), digest(tiles[0])] for picture, (tiles, ids) in zip(PICTURES, pixels, strict=True)]
    assert ours == golden
    assert {row[3] for row in golden} == set(range(1, 9))


def test_normalise_rounds_like_float64_scaling() -> None:
    every = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=0)
    scaled = (every.astype(np.float64) * (1 / 255)).astype(np.float32)
    normalise(every, ours := np.empty(every.shape, np.float32))
    assert np.array_equal(ours, (scaled - MEAN) / STD)


@pytest.mark.parametrize(
    ("height", "width", "canvas"),
    [
        (1, 1, (1, 1)),
        (560, 560, (1, 1)),
        (561, 560, (2, 1)),  # least upscaling
        (561, 561, (2, 2)),
        (560, 1120, (1, 2)),  # (1, 2) and (2, 2) enlarge alike: least area
        (560, 1121, (1, 3)),
        (3000, 3000, (2, 2)),  # least downscaling
        (300, 9000, (1, 4)),
        (9000, 300, (4, 1)),
        (1700, 600, (3, 1)),
    ],
)
def test_canvas(height: int, width: int, canvas: tuple[int, int]) -> None:
    assert choose_canvas(height, width, 560, 4) == canvas


def test_fewer_tiles_keep_the_aspect_ratio_ids() -> None:
    tiles, ratio = split(noise(4 * TILE, 2 * TILE), TILE, max_tiles=2)
    assert len(tiles) == 2
    assert ASPECT_RATIOS[ratio - 1] == (1, 2)


def test_tiles_go_row_by_row_and_the_rest_is_black() -> None:
    picture = noise(2 * TILE, 2 * TILE - 10)
    tiles, _ = split(picture, TILE, 4)
    canvas = np.zeros((2 * TILE, 2 * TILE, 3), np.uint8)
    canvas[: 2 * TILE - 10] = np.asarray(picture)
    for i, tile in enumerate(tiles):
        row, column = divmod(i, 2)
        part = canvas[row * TILE :, column * TILE :][:TILE, :TILE]
        assert np.array_equal(tile, part.transpose(2, 0, 1))


def test_preprocess_batches_pictures_and_leaves_absent_tiles_zero() -> None:
    pictures = [noise(30, 40), noise(300, 60), noise(500, 500)]
    pixels, ids = preprocess(pictures, VISION)
    assert (pixels.shape, pixels.dtype, ids.dtype) == ((3, 4, 3, TILE, TILE), np.float32, np.int32)
    for row, ratio, picture in zip(pixels, ids, pictures, strict=True):
        alone, alone_id = preprocess([picture], VISION)
        assert np.array_equal(row, alone[0])
        assert ratio == alone_id[0]
        assert not row[np.prod(ASPECT_RATIOS[ratio - 1]) :].any()
    empty, none = preprocess([], VISION)
    assert (empty.shape, none.shape) == ((0, 4, 3, TILE, TILE), (0,))


# ---- Opening ------------------------------------------------------------------------------------------------------


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def same(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def png_header(width: int, height: int) -> bytes:
    """A PNG file that declares a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def test_a_path_its_bytes_and_the_picture_open_alike(tmp_path: Path) -> None:
    picture = noise(30, 20)
    file = tmp_path / "a.png"
    file.write_bytes(encoded(picture))
    for source in (file, str(file), file.read_bytes(), picture):
        opened = open_image(source)
        assert opened.mode == "RGB"
        assert same(opened, picture)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_pictures_are_turned_upright(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture = noise(30, 20)
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(picture, form, exif=exif, **options)
    turned = {
        2: ImageOps.mirror,
        3: lambda p: p.rotate(180),
        4: ImageOps.flip,
        5: lambda p: ImageOps.mirror(p.rotate(-90, expand=True)),
        6: lambda p: p.rotate(-90, expand=True),
        7: lambda p: ImageOps.mirror(p.rotate(90, expand=True)),
        8: lambda p: p.rotate(90, expand=True),
    }.get(orientation, lambda p: p)(picture)
    assert same(open_image(data), turned)
    assert same(open_image(open_image(data)), turned)


def test_the_transform_itself_knows_no_orientation() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    with Image.open(io.BytesIO(encoded(noise(30, 80), exif=exif))) as lying:
        assert np.array_equal(preprocess([lying], VISION)[0], preprocess([noise(30, 80)], VISION)[0])


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (5, 5), color) for color in ("red", "lime", "blue")]
    for form in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert open_image(data).getpixel((2, 2)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("picture", "pixel"),
    [
        (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("LA", (4, 4), (100, 255)), (100, 100, 100)),
        (Image.new("I;16", (4, 4), 200), (200, 200, 200)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_modes(picture: Image.Image, pixel: tuple[int, int, int]) -> None:
    assert open_image(encoded(picture)).getpixel((0, 0)) == pixel


def test_a_transparent_colour_is_white() -> None:
    data = encoded(Image.new("RGB", (4, 4), (10, 20, 30)), transparency=(10, 20, 30))
    assert open_image(data).getpixel((0, 0)) == (255, 255, 255)


NOISE = encoded(noise(60, 50))


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (b"", "got no data"),
        (b"hello, world, hello", "got data that begin with b'hello, world'"),
        (encoded(noise(9, 9), "PDF"), "got data that begin with b'%PDF"),
        (encoded(noise(9, 9), "EPS"), "got data that begin with b'%!PS"),  # Pillow would run Ghostscript
        (encoded(noise(32, 32), "ICO"), "got data that begin with"),  # hides a picture of any size
        (NOISE[:20], "got a broken header"),
        (NOISE[: len(NOISE) // 2], "expected a whole picture, got 'image file is truncated"),
        (encoded(noise(60, 50), "JPEG")[:-300], "expected a whole picture, got 'image file is truncated"),
        (png_header(12_000, 12_000), f"at most {MAX_PIXELS} pixels, got 12000x12000"),
        (png_header(60_000, 60_000), f"at most {MAX_PIXELS} pixels, got far more"),
        (png_header(9_600, 9_600), "expected a whole picture, got 'image file is truncated"),  # no warning about size
        (Image.new("La", (4, 4)), "mode 'La' cannot be turned into RGB"),
        (5, "expected a path, bytes or a PIL image, got int"),
        ("\0", "expected a readable picture file, got 'embedded null byte'"),
        ("no/such/picture.png", "'no/such/picture.png': no such file"),
        (Path(__file__).parent, "expected a readable picture file, got 'Is a directory'"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else type(value).__name__,
)
def test_refused_in_one_line(source: Any, problem: str) -> None:
    with pytest.raises(InputError) as refusal:
        open_image(source)
    assert problem in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(InputError, match="at least one pixel, got 0x4"):
        split(Image.new("RGB", (0, 4)), TILE, 4)


def test_a_broken_file_names_itself(tmp_path: Path) -> None:
    file = tmp_path / "half.png"
    file.write_bytes(NOISE[: len(NOISE) // 2])
    with pytest.raises(InputError, match=r"half\.png"):
        open_image(file)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_damaged_files_open_or_are_refused(form: str) -> None:
    whole = encoded(noise(40, 30), form)
    draw = np.random.default_rng(5)
    refused = 0
    for _ in range(60):
        data = bytearray(whole[: draw.integers(1, len(whole) + 1)])
        for position in draw.integers(0, len(data), 4):
            data[position] = draw.integers(0, 256)
        try:
            assert open_image(bytes(data)).mode == "RGB"
        except InputError as refusal:
            refused += "\n" not in str(refusal)
    assert refused > 20


def test_threads_leave_the_warning_filters_as_they_were() -> None:
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(open_image, [NOISE] * 64))) == 64
    assert list(warnings.filters) == before
