"""Parquet and Arrow files on any pyarrow filesystem, grouped by split.

Files are named after their split: train-00000-of-00004.parquet, or a folder train/.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from dbtrain.data.sources.base import one_line
from dbtrain.errors import UserError

PARQUET = (".parquet",)
ARROW = (".arrow", ".feather")
SPLIT_NAME = re.compile(r"(train|test|validation|valid|val)(?![A-Za-z])")

_READ_ROWS = 256
_FILE_MAGIC = b"ARROW1"


class Tables(Protocol):
    """Tables of one data set, grouped by split; all have the same columns."""

    name: str
    """What the manifest calls them."""
    groups: dict[str, list[str]]
    """Paths by the split they belong to; '' for those that belong to none."""
    train: list[str]
    """Paths of the training rows."""
    schema: pa.Schema

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Names of the class ids in a column, if they are known."""
        ...

    def batches(self, path: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Some columns of a table, a few hundred rows at a time."""
        ...

    def rows(self, path: str) -> int:
        """Number of rows of a table."""
        ...

    def error(self, problem: str, mend: str) -> UserError:
        """A mistake in the source as a whole."""
        ...


class TableFiles:
    """The table files below a path or URI; all have the same columns."""

    def __init__(self, source: str):
        self.source = source
        self._files, paths, self.name = _list(source)
        self.groups = _by_split(paths)
        """Paths by the split their names tell, in the order of their names; '' for those that tell none."""
        self.train = self.groups.get("train") or self.groups.get("") or []
        """Paths of the training files."""
        if not self.train:
            raise self.error(f"has no training files, only {', '.join(sorted(self.groups))}", "name them train-*")
        self.schema = self._schema(self.train[0])

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Names in the schema's `huggingface` metadata, if it has any for this column."""
        try:
            raw = json.loads((self.schema.metadata or {})[b"huggingface"])
            names = raw["info"]["features"][column]["names"]
        except (KeyError, TypeError, ValueError):
            return None
        return tuple(str(name) for name in names) or None

    def batches(self, path: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Some columns of a file, a few hundred rows at a time.

        Raises:
            UserError: the file is damaged or lacks a column.
        """
        missing = [name for name in columns if name not in self._schema(path).names]
        if missing:
            raise self.error(f"{path} has no column {missing[0]!r}", "all files need the same columns")
        try:
            if path.endswith(ARROW):
                for batch in self._arrow(path):
                    for first in range(0, batch.num_rows, _READ_ROWS):
                        yield batch.select(columns).slice(first, _READ_ROWS)
            else:
                yield from self._parquet(path).iter_batches(batch_size=_READ_ROWS, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise _corrupt(path, error) from None

    def rows(self, path: str) -> int:
        """Number of rows of a file."""
        try:
            if path.endswith(ARROW):
                return sum(batch.num_rows for batch in self._arrow(path))
            return int(self._parquet(path).metadata.num_rows)
        except (OSError, pa.ArrowException) as error:
            raise _corrupt(path, error) from None

    def error(self, problem: str, mend: str) -> UserError:
        """A mistake in the source as a whole."""
        return UserError(problem, field="SOURCE", value=self.source, mend=mend)

    def _schema(self, path: str) -> pa.Schema:
        try:
            if path.endswith(ARROW):
                schema: pa.Schema = self._reader(path).schema
                return schema
            return self._parquet(path).schema_arrow
        except (OSError, pa.ArrowException) as error:
            raise _corrupt(path, error) from None

    def _parquet(self, path: str) -> pq.ParquetFile:
        return pq.ParquetFile(self._files.open_input_file(path))

    def _reader(self, path: str) -> Any:
        file = self._files.open_input_file(path)
        whole = file.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        file.seek(0)
        return pa.ipc.open_file(file) if whole else pa.ipc.open_stream(file)

    def _arrow(self, path: str) -> Iterator[pa.RecordBatch]:
        reader = self._reader(path)
        if isinstance(reader, pa.ipc.RecordBatchFileReader):
            return (reader.get_batch(index) for index in range(reader.num_record_batches))
        return iter(reader)


def _corrupt(path: str, error: BaseException) -> UserError:
    kind = "Arrow" if path.endswith(ARROW) else "Parquet"
    return UserError(
        f"is not readable as {kind}: {one_line(error)}",
        field="file",
        value=path,
        mend="copy it again from its origin",
    )


def _list(source: str) -> tuple[fs.FileSystem, list[str], str]:
    """The filesystem, the table files below `source` in order, and the absolute name of the source."""
    name = source if "://" in source else str(Path(source).expanduser().resolve())
    try:
        files, base = fs.FileSystem.from_uri(name)
        info = files.get_file_info(base)
        if info.type == fs.FileType.Directory:
            inside = files.get_file_info(fs.FileSelector(base, recursive=True))
            found = sorted(item.path for item in inside if item.is_file and item.size)
            # Beside Parquet, Arrow files are usually a library's cache of the same rows.
            paths = [path for path in found if path.endswith(PARQUET)] or [
                path for path in found if path.endswith(ARROW)
            ]
        else:
            paths = [base] if info.is_file else []
    except (OSError, pa.ArrowException, ValueError) as error:
        raise UserError(f"cannot be reached: {one_line(error)}", field="SOURCE", value=source) from None
    if not paths:
        raise UserError(
            "holds no Parquet or Arrow files with anything in them",
            field="SOURCE",
            value=source,
            mend="give a file or folder of Parquet",
        )
    return files, paths, name


def _by_split(paths: list[str]) -> dict[str, list[str]]:
    """Files by the split that their name, or else their folder's, begins with; the others under ''."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        pure = PurePosixPath(path)
        match = SPLIT_NAME.match(pure.name)
        if match is None and len(paths) > 1:
            match = SPLIT_NAME.match(pure.parent.name)
        groups.setdefault(match[1] if match else "", []).append(path)
    return groups
