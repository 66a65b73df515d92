"""Pictures into tiles: opening, canvas, resize, padding, normalisation. NumPy and Pillow only.

The transform equals transformers' Pillow processor (``MllamaImageProcessorPil``) to the bit, and so Meta's
``VariableSizeImageTransform`` wherever that has an answer: Meta drops transparency and refuses extreme shapes.

Axes: I images, C tiles, P pixels along the side of a tile.
"""

from __future__ import annotations

import io
import math
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mllama_jax.config import ASPECT_RATIOS, VisionConfig
from mllama_jax.errors import InputError

MAX_PIXELS = 1 << 27  # the largest phone sensors give 108 million; decoded, this is 400 MB

# Picture files only: Pillow's other readers run Ghostscript or hide a second, larger picture behind a small header.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)[:, None, None]
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)[:, None, None]


# ---- Opening ------------------------------------------------------------------------------------------------------


def open_image(source: str | os.PathLike[str] | bytes | Image.Image) -> Image.Image:
    """The first frame of a picture, decoded, upright (EXIF orientation) and in RGB.

    Raises `InputError` where there is no readable picture, or one of more than `MAX_PIXELS`, which is told from the
    header before anything is decoded.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "picture")
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), f"picture of {len(source)} bytes")
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"picture: expected a path, bytes or a PIL image, got {type(source).__name__}")
    name = repr(os.fspath(source))
    try:
        file = open(source, "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise InputError(f"{name}: no such file; expected a picture, check the path") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: expected a readable picture file, got '{_reason(error)}'; check the path") from None
    with file:
        return _read(file, name)


def _read(file: BinaryIO, name: str) -> Image.Image:
    expected = f"expected a picture ({', '.join(FORMATS)})"
    start = file.read(12)
    if not start:
        raise InputError(f"{name}: {expected}, got no data; save or fetch it again")
    file.seek(0)
    try:
        with _silence():
            image = Image.open(file, formats=_known_formats())
    except UnidentifiedImageError:
        raise InputError(f"{name}: {expected}, got data that begin with {start!r}; convert it first") from None
    except Image.DecompressionBombError:
        raise InputError(_too_large(name, "far more")) from None
    except Exception as error:  # a reader may trip over a broken header in any way
        raise InputError(
            f"{name}: {expected}, got a broken header ({_reason(error)}); save or fetch it again"
        ) from None
    with image:
        return _decode(image, name)


def _decode(image: Image.Image, name: str) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise InputError(_too_large(name, f"{image.width}x{image.height}"))
    try:
        image.load()
    except Exception as error:  # as for the header: broken data
        raise InputError(f"{name}: expected a whole picture, got '{_reason(error)}'; save or fetch it again") from None
    try:
        return to_rgb(_upright(image))
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _upright(image: Image.Image) -> Image.Image:
    with _silence():
        try:
            if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
                return image
            return ImageOps.exif_transpose(image)
        except Exception:  # broken metadata around a sound picture: shown as it lies, like everywhere else
            return image


_WARNINGS = threading.Lock()


@contextmanager
def _silence() -> Iterator[None]:
    """Keep Pillow's warnings about size and metadata in; the filters are one per process, hence the lock."""
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _known_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _too_large(name: str, got: str) -> str:
    return f"{name}: expected a picture of at most {MAX_PIXELS} pixels, got {got}; make it smaller first"


# ---- Transform ----------------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB, transparency composited on white (``convert_to_rgb`` in transformers)."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    try:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except ValueError:
        raise InputError(f"picture mode {image.mode!r} cannot be turned into RGB; convert the picture first") from None


def choose_canvas(height: int, width: int, tile: int, max_tiles: int) -> tuple[int, int]:
    """The grid (rows, columns) of tiles for a picture: least upscaling, else least downscaling, then least area."""
    grids = [(rows, columns) for rows, columns in ASPECT_RATIOS if rows * columns <= max_tiles]
    scales = [min(rows * tile / height, columns * tile / width) for rows, columns in grids]
    best = min((scale for scale in scales if scale >= 1), default=max(scales))
    return min((grid for grid, scale in zip(grids, scales, strict=True) if scale == best), key=math.prod)


def tiles_of(image: Image.Image, vision: VisionConfig) -> int:
    """Into how many tiles a picture is cut."""
    return math.prod(choose_canvas(image.height, image.width, vision.tile, vision.max_tiles))


def fit(height: int, width: int, canvas_height: int, canvas_width: int, tile: int) -> tuple[int, int]:
    """The size (height, width) a picture is resized to: undistorted, within its canvas, enlarged to a tile at most."""
    target_height = min(max(height, tile), canvas_height)
    target_width = min(max(width, tile), canvas_width)
    scale_height, scale_width = target_height / height, target_width / width
    if scale_width < scale_height:
        return min(max(math.floor(height * scale_width), 1), target_height), target_width
    return target_height, min(max(math.floor(width * scale_height), 1), target_width)


def split_tiles(image: Image.Image, tile: int, max_tiles: int) -> tuple[np.ndarray, int]:
    """A picture as uint8 tiles [n, 3, P, P] by rows, n <= `max_tiles` (1 to 4), and its aspect ratio id (1 to 8)."""
    if not image.width or not image.height:
        raise InputError(f"picture: expected at least one pixel, got {image.width}x{image.height}")
    rows, columns = grid = choose_canvas(image.height, image.width, tile, max_tiles)
    height, width = fit(image.height, image.width, rows * tile, columns * tile, tile)
    resized = to_rgb(image)
    if resized.size != (width, height):
        resized = resized.resize((width, height), Image.Resampling.BILINEAR)
    canvas = np.empty((rows * tile, columns * tile, 3), np.uint8)  # not zeros, which keep other threads waiting
    canvas[:height, :width], canvas[:height, width:], canvas[height:] = np.asarray(resized), 0, 0
    tiles = canvas.reshape(rows, tile, columns, tile, 3).transpose(0, 2, 4, 1, 3)
    return tiles.reshape(rows * columns, 3, tile, tile), ASPECT_RATIOS.index(grid) + 1


def normalise(tiles: np.ndarray, scaled: np.ndarray) -> None:
    """uint8 [..., 3, P, P] to float32 `scaled`, with CLIP's mean and standard deviation."""
    np.divide(tiles, np.float32(255), out=scaled)
    scaled -= MEAN
    scaled /= STD


def preprocess(images: Sequence[Image.Image], vision: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Pictures as the vision encoder takes them: float32 [I, C, 3, P, P], absent tiles zero, and int32 ids [I]."""
    pixels = np.zeros((len(images), vision.max_tiles, 3, vision.tile, vision.tile), np.float32)

    def fill(row: np.ndarray, image: Image.Image) -> int:
        tiles, aspect_ratio_id = split_tiles(image, vision.tile, vision.max_tiles)
        normalise(tiles, row[: len(tiles)])
        return aspect_ratio_id

    with ThreadPoolExecutor() as pool:  # Pillow and NumPy work outside the interpreter lock
        ids = list(pool.map(fill, pixels, images))
    return pixels, np.array(ids, np.int32)
