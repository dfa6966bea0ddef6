"""A folder of class folders: root/train/<class>/* with root/test/<class>/*, or root/<class>/* alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from dbtrain.data.columns import Rows
from dbtrain.data.manifest import Split
from dbtrain.data.sources.base import HELD_OUT, TEST_NAMES, SourceOptions, holdout
from dbtrain.data.sources.decode import Decoder, Encoded
from dbtrain.errors import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}

_LAYOUT = "a folder of class folders is root/<class>/*.png, or root/train/<class>/*.png with root/test/..."


class ClassFolders:
    """Image files whose folder names their class; without a test folder, a tenth of each is held out."""

    kind: Literal["image"] = "image"

    def __init__(self, root: Path, options: SourceOptions):
        self.name = str(root)
        train = root / "train"
        test = next((root / name for name in TEST_NAMES if (root / name).is_dir()), None)
        if train.is_dir() != (test is not None):
            raise UserError(
                f"has a {'train' if test is None else test.name} folder without the other split",
                field="SOURCE",
                value=root,
                mend=_LAYOUT,
            )
        self.class_names = tuple(_folders(train if test is not None else root))
        if not self.class_names:
            raise UserError("holds no class folders with images", field="SOURCE", value=root, mend=_LAYOUT)
        self._splits: dict[Split, list[tuple[Path, int]]]
        if test is not None:
            self._splits = {"train": self._files(train), "test": self._files(test)}
        else:
            files = self._files(root)
            held = holdout(np.array([label for _, label in files], dtype=np.int64), HELD_OUT)
            self._splits = {
                "train": [file for file, out in zip(files, held, strict=True) if not out],
                "test": [file for file, out in zip(files, held, strict=True) if out],
            }
        path, label = (self._splits["train"] or self._splits["test"])[0]
        self._decoder = Decoder(Encoded(path, str(path), label), options)
        self.columns = self._decoder.image.columns()

    def rows(self, split: Split) -> int:
        """Number of images in a split."""
        return len(self._splits[split])

    def batches(self, split: Split) -> Iterator[Rows]:
        """All images of a split, by class name, then file name."""
        return self._decoder.batches(Encoded(path, str(path), label) for path, label in self._splits[split])

    def _files(self, root: Path) -> list[tuple[Path, int]]:
        unknown = sorted(set(_folders(root)) - set(self.class_names))
        if unknown:
            raise UserError(
                f"has the class {unknown[0]!r}, which the training folder does not have",
                field="SOURCE",
                value=root,
                mend="give both splits the same class folders",
            )
        found = []
        for label, name in enumerate(self.class_names):
            inside = (root / name).rglob("*")
            files = sorted(path for path in inside if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
            if not files and (root / name).is_dir():
                raise UserError(
                    "the class folder holds no images",
                    field="SOURCE",
                    value=root / name,
                    mend="fill or remove it",
                )
            found += [(path, label) for path in files]
        return found


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
