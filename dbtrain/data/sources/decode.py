"""Encoded images (PNG, JPEG, ...) -> uint8 arrays of one shape."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from dbtrain.data.columns import ImageShape, Rows
from dbtrain.data.sources.base import SourceOptions, image_rows, one_line
from dbtrain.errors import UserError

_BATCH = 256
_GREY_MODES = ("1", "L", "LA")

# What Pillow's decoders raise for files that are not what they should be.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class Encoded(NamedTuple):
    """One image as it is stored."""

    data: bytes | Path
    """Its bytes, or the file that holds them."""
    where: str
    """What to call it in an error message."""
    label: int


class Decoder:
    """Turns encoded images into arrays of the shape that the first image and the options decide."""

    def __init__(self, first: Encoded, options: SourceOptions):
        picture = open_upright(first)
        self._size = options.size
        self._forced = options.channels is not None
        channels = options.channels or (1 if picture.mode in _GREY_MODES else 3)
        width, height = (options.size, options.size) if options.size is not None else picture.size
        if width != height:
            raise UserError(
                f"is {width} x {height} pixels, not square",
                field="image",
                value=first.where,
                mend="pass --size N to resize and cut every image to N x N",
            )
        self.image = ImageShape(channels=channels, height=height, width=width)

    def decode(self, encoded: Encoded) -> npt.NDArray[np.uint8]:
        """One image as (C, H, W).

        Raises:
            UserError: it is corrupt, or does not have the shape of the others.
        """
        picture = open_upright(encoded)
        wanted = (self.image.width, self.image.height)
        if self.image.channels == 1 and picture.mode not in _GREY_MODES and not self._forced:
            raise UserError(
                "is a colour image, while the first image of the source is grey",
                field="image",
                value=encoded.where,
                mend="pass --channels 3 to store all in colour, or --channels 1 for grey",
            )
        picture = picture.convert("L" if self.image.channels == 1 else "RGB")
        if self._size is not None and picture.size != wanted:
            picture = ImageOps.fit(picture, wanted, Image.Resampling.BICUBIC)
        if picture.size != wanted:
            found = f"{picture.size[0]} x {picture.size[1]} pixels"
            raise UserError(
                f"is {found}, while the first image is {wanted[0]} x {wanted[1]}",
                field="image",
                value=encoded.where,
                mend="pass --size N to resize and cut every image to N x N",
            )
        pixels = np.asarray(picture)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def batches(self, items: Iterable[Encoded]) -> Iterator[Rows]:
        """Decode in order, a few hundred images at a time, on all cores (decoders release Python's lock)."""
        stream = iter(items)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            while chunk := list(islice(stream, _BATCH)):
                images = np.stack(list(pool.map(self.decode, chunk)))
                yield image_rows(images, np.array([item.label for item in chunk], dtype=np.int64))


def open_upright(encoded: Encoded) -> Image.Image:
    """Decode the pixels, upright."""
    try:
        data = encoded.data.read_bytes() if isinstance(encoded.data, Path) else encoded.data
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        picture.load()
    except _DECODER_ERRORS as error:
        reason = one_line(error)
        if isinstance(error, UnidentifiedImageError):
            reason = "no known image format"
        raise UserError(
            f"is a corrupt image: {reason}", field="image", value=encoded.where, mend="mend or remove it"
        ) from None
    if picture.mode.startswith(("I", "F")):
        raise UserError(
            f"has pixels of more than 8 bits (mode {picture.mode})",
            field="image",
            value=encoded.where,
            mend="convert it to 8 bits a channel",
        )
    return picture
