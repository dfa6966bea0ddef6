"""Sampled images as files: an .npz for programs and a PNG grid for people."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dbtrain.errors import UserError
from dbtrain.inference.sample_images import ImageSampler, Samples
from dbtrain.storage import temporary_name

GRID_IMAGES = 256
"""At most as many of the first samples are shown in the grid."""
_TILE = 64
"""Smaller images are enlarged to about as many pixels."""
_GAP = 2
"""Least number of white pixels between images; one of theirs where they are enlarged."""


def save_samples(
    sampler: ImageSampler, folder: str | Path, samples: Samples, labels: Sequence[int] | None = None
) -> list[Path]:
    """Write `samples.npz` and, for images, `samples.png` into `folder`, which is made if need be.

    The .npz holds `arr_0`, uint8 (N, H, W, C), and for labelled samples `arr_1`, int64 (N,): the layout in which the
    evaluation suite of Dhariwal, Nichol 2021 takes samples, and that is quickly turned into files for torch-fidelity.
    Latents are float32 (N, C, H, W) there. The PNG shows images of a class side by side, small ones enlarged.

    Args:
        samples: what `sampler.sample` gave,
        labels: when it was given these.

    Returns:
        the files written.

    Raises:
        UserError: the folder cannot be written to.
    """
    where = Path(folder).expanduser()
    check_folder(where)
    arrays: dict[str, npt.NDArray[Any]] = {"arr_0": samples}
    if (chosen := sampler.labels_for(len(samples), labels)) is not None:
        arrays["arr_1"] = chosen.numpy()
    written = [where / "samples.npz"]
    try:
        where.mkdir(parents=True, exist_ok=True)
        _write(written[0], lambda file: np.savez(file, allow_pickle=False, **arrays))
        if samples.dtype == np.uint8:
            written.append(where / "samples.png")
            sheet = grid(samples, arrays.get("arr_1"))
            _write(written[1], lambda file: sheet.save(file, "PNG"))
    except OSError as error:
        raise _unwritable(where, error.strerror or str(error)) from None
    return written


def check_folder(folder: str | Path) -> None:
    """Whether files may be written into `folder`, or it may be made; drawing many images takes long.

    Raises:
        UserError: they may not.
    """
    where = Path(folder).expanduser()
    nearest = next(path for path in (where, *where.absolute().parents) if path.exists())
    for refused, number in ((not nearest.is_dir(), errno.ENOTDIR), (not os.access(nearest, os.W_OK), errno.EACCES)):
        if refused:
            raise _unwritable(where, os.strerror(number))


def _unwritable(folder: Path, reason: str) -> UserError:
    return UserError(f"cannot be written to: {reason}", field="--out", value=folder, mend="choose another folder")


def _write(path: Path, save: Callable[[IO[bytes]], None]) -> None:
    """The file under its name once it is whole; what stood there stays if it cannot be."""
    temporary = path.with_name(temporary_name(path.name))
    try:
        with temporary.open("xb") as file:
            save(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def grid(
    images: npt.NDArray[Any], labels: npt.NDArray[np.int64] | None = None, columns: int | None = None
) -> Image.Image:
    """The first `GRID_IMAGES` of `images`, uint8 (N, H, W, C) with 1 or 3 channels, on white.

    Every class begins a new row, lowest id first; without labels, or with no two of a class, they fill a square,
    or rows of `columns` in the order in which they are.
    """
    images = images[:GRID_IMAGES]
    n, height, width, channels = images.shape
    classes = np.zeros(n, np.int64) if labels is None or columns is not None else labels[:n]
    most = int(np.bincount(classes).max())
    square = math.isqrt(n - 1) + 1
    by_class = 1 < most < n
    columns = columns or (most if by_class else square)
    order = np.argsort(classes, kind="stable")
    rows = [order[classes[order] == label] for label in np.unique(classes)] if by_class else _cut(order, columns)
    enlarge = max(1, _TILE // max(height, width))
    gap = max(enlarge, _GAP)
    tile_h, tile_w = height * enlarge + gap, width * enlarge + gap
    sheet = np.full((len(rows) * tile_h + gap, columns * tile_w + gap, channels), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, index in enumerate(row):
            tile = images[index].repeat(enlarge, axis=0).repeat(enlarge, axis=1)
            top, left = r * tile_h + gap, c * tile_w + gap
            sheet[top : top + len(tile), left : left + tile.shape[1]] = tile
    return Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet)


def _cut(order: npt.NDArray[np.int64], size: int) -> list[npt.NDArray[np.int64]]:
    return [order[first : first + size] for first in range(0, len(order), size)]
