"""Whatever a caller calls an image -> uint8 pixels of the shape a model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dbtrain.data.sources.decode import Encoded, open_upright
from dbtrain.errors import UserError

ImageLike = str | Path | Image.Image | npt.NDArray[np.uint8] | Tensor
"""A file, a PIL image, a uint8 array (H, W) or (H, W, C), or a uint8 tensor (C, H, W) or (H, W)."""

_SHAPES = "has to be uint8 and (H, W) or (H, W, C) as an array, (C, H, W) as a tensor, with 1, 3 or 4 channels"
_MEND = "convert it to 8 bits a channel, one image at a time"


def as_list(images: Sequence[ImageLike] | ImageLike) -> list[ImageLike]:
    """One image as a list of one."""
    if isinstance(images, str | Path | Image.Image | Tensor | np.ndarray):
        return [images]
    return list(images)


def to_tensor(image: ImageLike, size: int, channels: int) -> Tensor:
    """uint8 (channels, size, size); resized as `dbtrain prepare --size` does, cutting what is not square.

    Raises:
        UserError: the file is missing or is no image, or an array has another type or shape than an image.
    """
    if isinstance(image, Tensor):
        image = _from_tensor(image)
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if not isinstance(image, Image.Image):
        image = _from_file(Path(image))
    if image.mode.startswith(("I", "F")):
        raise UserError("has pixels of more than 8 bits", field="image", value=f"mode {image.mode}", mend=_MEND)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    pixels = np.array(image, dtype=np.uint8).reshape(size, size, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _from_tensor(tensor: Tensor) -> npt.NDArray[Any]:
    if tensor.dtype != torch.uint8:
        raise UserError(_SHAPES, field="image", value=f"{tensor.dtype} {tuple(tensor.shape)}", mend=_MEND)
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return array.transpose(1, 2, 0) if array.ndim == 3 else array


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    known = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not known or array.size == 0:
        raise UserError(_SHAPES, field="image", value=f"{array.dtype} {array.shape}", mend=_MEND)
    return Image.fromarray(np.ascontiguousarray(array))


def _from_file(path: Path) -> Image.Image:
    if not path.is_file():
        raise UserError("no such image file", field="image", value=path)
    return open_upright(Encoded(path, str(path), 0))
