"""The four names of torchvision that llama-models' image transform uses, so that its tests need no torchvision."""

import contextlib
import sys
import types
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image


class ToTensor:
    """Picture -> float32 [3, H, W] in 0..1."""

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(255)


class Normalize:
    def __init__(self, mean, std, inplace=False):
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels - self.mean) / self.std


def resize(picture: Image.Image, size: tuple[int, int], interpolation: str) -> Image.Image:
    """torchvision resizes pictures through Pillow too; `size` is (height, width)."""
    if interpolation != "bilinear":
        raise NotImplementedError(interpolation)
    return picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """Answer `import torchvision` with the names above, for a while: transformers must not take it for the real one."""
    torchvision = types.ModuleType("torchvision")
    transforms = types.ModuleType("torchvision.transforms")
    functional = types.ModuleType("torchvision.transforms.functional")
    functional.resize = resize
    transforms.functional, transforms.ToTensor, transforms.Normalize = functional, ToTensor, Normalize
    transforms.InterpolationMode = types.SimpleNamespace(BILINEAR="bilinear")
    torchvision.transforms = transforms
    modules = {module.__name__: module for module in (torchvision, transforms, functional)}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
