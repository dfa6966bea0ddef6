"""Image Parquet as the Hugging Face hub keeps it, on any pyarrow filesystem.

An image is a struct {bytes, path}; its label an integer column whose class names stand in the schema's
`huggingface` metadata. Files are named after their split: train-00000-of-00004.parquet, or a folder train/.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from dbtrain.data.manifest import Split
from dbtrain.data.sources.base import Images, SourceOptions, holdout
from dbtrain.data.sources.decode import Decoder, Encoded
from dbtrain.errors import UserError

_SPLIT_NAME = re.compile(r"(train|test|validation|valid|val)(?![A-Za-z])")
_TEST_NAMES = ("test", "validation", "valid", "val")
_LABEL_NAMES = ("label", "fine_label")
_TEST_FRACTION = 0.1
_READ_ROWS = 256


class ParquetImages:
    """The images of one or more Parquet files; without a test split, a tenth of every class is held out."""

    def __init__(self, source: str, options: SourceOptions):
        self._source = source
        self._files, paths, self.name = _list(source)
        groups = _by_split(paths)
        train = groups.get("train") or groups.get("")
        if not train:
            raise self._error(f"has no training files, only {', '.join(sorted(groups))}", "name them train-*.parquet")
        schema = self._open(train[0]).schema_arrow
        self._image_column = self._find_image(schema)
        self._label_column = self._find_label(schema, options.label_column)
        labels = self._labels(train)
        if not labels.size:
            raise self._error("holds no training rows", "give image Parquet with rows")
        test, test_labels = self._test_files(groups)
        self.class_names = _class_names(schema, self._label_column) or tuple(
            str(label) for label in range(int(max(labels.max(), test_labels.max(initial=0))) + 1)
        )
        for part in (labels, test_labels):
            self._check_labels(part)
        self._paths: dict[Split, list[str]] = {"train": train, "test": test or train}
        self._held = None if test else holdout(labels, _TEST_FRACTION)
        self._rows: dict[Split, int] = {"train": len(labels), "test": len(test_labels)}
        if self._held is not None:
            self._rows = {"train": int((~self._held).sum()), "test": int(self._held.sum())}
        self._decoder = Decoder(next(self._read(train)), options)
        self.image = self._decoder.image

    def rows(self, split: Split) -> int:
        """Number of images in a split."""
        return self._rows[split]

    def batches(self, split: Split) -> Iterator[Images]:
        """All images of a split, in the order of the files' names and of the rows in them."""
        items: Iterator[Encoded] = self._read(self._paths[split])
        if self._held is not None:
            wanted = self._held if split == "test" else ~self._held
            items = (item for item, take in zip(items, wanted, strict=True) if take)
        return self._decoder.batches(items)

    def _test_files(self, groups: dict[str, list[str]]) -> tuple[list[str], npt.NDArray[np.int64]]:
        """Files and labels of the first test split that has labels (the hub marks hidden ones with -1)."""
        for name in _TEST_NAMES:
            if name in groups:
                labels = self._labels(groups[name])
                if labels.size and labels.min() >= 0:
                    return groups[name], labels
        return [], np.empty(0, dtype=np.int64)

    def _open(self, path: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._files.open_input_file(path))
        except (OSError, pa.ArrowException) as error:
            raise self._corrupt(path, error) from None

    def _batches(self, path: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
        file = self._open(path)
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing:
            raise self._error(f"{path} has no column {missing[0]!r}", "all files need the same columns")
        try:
            yield from file.iter_batches(batch_size=_READ_ROWS, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise self._corrupt(path, error) from None

    def _labels(self, paths: list[str]) -> npt.NDArray[np.int64]:
        parts = [np.empty(0, dtype=np.int64)]
        for path in paths:
            for batch in self._batches(path, [self._label_column]):
                column = batch.column(0)
                if column.null_count:
                    raise self._error(f"{path} has rows without {self._label_column!r}", "fill or remove them")
                parts.append(column.cast(pa.int64()).to_numpy())
        return np.concatenate(parts)

    def _check_labels(self, labels: npt.NDArray[np.int64]) -> None:
        last = len(self.class_names) - 1
        wrong = labels[(labels < 0) | (labels > last)]
        if wrong.size:
            raise self._error(
                f"has the class id {wrong[0]} in {self._label_column!r}, outside 0..{last}",
                "mend the labels, or the class names in the metadata",
            )

    def _read(self, paths: list[str]) -> Iterator[Encoded]:
        for path in paths:
            row = 0
            for batch in self._batches(path, [self._image_column, self._label_column]):
                images = cast(pa.StructArray, batch.column(self._image_column)).field("bytes").to_pylist()
                labels = batch.column(self._label_column).cast(pa.int64()).to_numpy().tolist()
                for data, label in zip(images, labels, strict=True):
                    where = f"{path}, row {row}"
                    if data is None:
                        raise UserError(
                            "has no bytes, only the path of a file elsewhere",
                            field="image",
                            value=where,
                            mend="store the images inside the Parquet files",
                        )
                    yield Encoded(data, where, label)
                    row += 1

    def _find_image(self, schema: pa.Schema) -> str:
        for field in schema:
            kind = field.type
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                return field.name
        raise self._error(
            f"has no image column, a struct {{bytes, path}}; its columns are {', '.join(schema.names)}",
            "give image Parquet in the layout of the Hugging Face hub",
        )

    def _find_label(self, schema: pa.Schema, wanted: str | None) -> str:
        names = [field.name for field in schema if pa.types.is_integer(field.type)]
        listed = ", ".join(names) or "none"
        if wanted is not None:
            if wanted in names:
                return wanted
            raise UserError(
                "is not an integer column of the source",
                field="--label-column",
                value=wanted,
                mend=f"integer columns: {listed}",
            )
        if len(names) == 1:
            return names[0]
        for name in _LABEL_NAMES:
            if name in names:
                return name
        raise self._error(
            f"does not show which column holds the class ids; integer columns: {listed}",
            "pass --label-column",
        )

    def _error(self, problem: str, mend: str) -> UserError:
        return UserError(problem, field="SOURCE", value=self._source, mend=mend)

    def _corrupt(self, path: str, error: BaseException) -> UserError:
        reason = " ".join(str(error).split())
        return UserError(
            f"is not readable as Parquet: {reason}",
            field="file",
            value=path,
            mend="copy it again from its origin",
        )


def _list(source: str) -> tuple[fs.FileSystem, list[str], str]:
    """The filesystem, the Parquet files below `source` in order, and the absolute name of the source."""
    name = source if "://" in source else str(Path(source).expanduser().resolve())
    try:
        files, base = fs.FileSystem.from_uri(name)
        info = files.get_file_info(base)
        if info.type == fs.FileType.Directory:
            inside = files.get_file_info(fs.FileSelector(base, recursive=True))
            paths = sorted(
                item.path for item in inside if item.is_file and item.path.endswith(".parquet") and item.size
            )
        else:
            paths = [base] if info.is_file else []
    except (OSError, pa.ArrowException, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot be reached: {reason}", field="SOURCE", value=source) from None
    if not paths:
        raise UserError(
            "holds no Parquet files with anything in them",
            field="SOURCE",
            value=source,
            mend="give a file or folder of image Parquet",
        )
    return files, paths, name


def _by_split(paths: list[str]) -> dict[str, list[str]]:
    """Files by the split that their name, or else their folder's, begins with; the others under ''."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        pure = PurePosixPath(path)
        match = _SPLIT_NAME.match(pure.name)
        if match is None and len(paths) > 1:
            match = _SPLIT_NAME.match(pure.parent.name)
        groups.setdefault(match[1] if match else "", []).append(path)
    return groups


def _class_names(schema: pa.Schema, label_column: str) -> tuple[str, ...] | None:
    """Names in the schema's `huggingface` metadata, if it has any for this column."""
    try:
        raw = json.loads((schema.metadata or {})[b"huggingface"])
        names = raw["info"]["features"][label_column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(str(name) for name in names) or None
