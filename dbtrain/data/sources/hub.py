"""Data sets of the Hugging Face hub, or folders in its layout, through its own library.

The library turns what it finds (Parquet, CSV, JSON, text, folders of images) into Arrow files in its cache and maps
them into memory; from there on they are tables like any other. It runs no code of a data set.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from dbtrain import hub
from dbtrain.data.sources.base import one_line
from dbtrain.errors import UserError

_READ_ROWS = 256
_FIELD = "SOURCE"
_FORM = "write hf:owner/name, hf:owner/name:SPLIT, or hf:./folder for one of this machine"


class HubSource(NamedTuple):
    """What `hf:...` stands for."""

    path: str
    """`owner/name`, or an absolute folder."""
    local: bool
    split: str | None
    """The one split to read; all when None."""


class HubTables:
    """The splits of a data set as tables, each under its own name."""

    def __init__(self, source: str, subset: str | None):
        self.source = source
        asked = parse(source)
        self._local = asked.local
        self.name = f"hf:{asked.path}" + (f":{asked.split}" if asked.split else "")
        if subset is not None:
            self.name += f" --subset {subset}"
        splits = _load(source, asked, subset)
        known = ", ".join(splits)
        if asked.split is not None:
            if asked.split not in splits:
                raise self.error(f"has no split {asked.split!r}", f"its splits: {known}")
            splits = {asked.split: splits[asked.split]}
        elif "train" not in splits:
            raise self.error("has no split 'train'", f"name one of its splits, as in {source}:SPLIT: {known}")
        self._parts = {f"hf:{asked.path}:{split}": rows for split, rows in splits.items()}
        names = list(self._parts)
        self.groups = {"": names} if asked.split else {s: [n] for s, n in zip(splits, names, strict=True)}
        self.train = self.groups["" if asked.split else "train"]
        self._features = splits[asked.split or "train"].features
        self.schema = pa.schema([field for field in self._features.arrow_schema if not self._foreign(field)])

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Names of a column of class ids, if it has any."""
        return tuple(getattr(self._features[column], "names", None) or ()) or None

    def rows(self, path: str) -> int:
        """Number of rows of a split."""
        return len(self._parts[path])

    def batches(self, path: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Some columns of a split, a few hundred rows at a time; images with their bytes.

        Raises:
            UserError: the split lacks a column, or an image's file is gone.
        """
        part = self._parts[path]
        missing = [name for name in columns if name not in part.column_names]
        if missing:
            raise self.error(f"{path} has no column {missing[0]!r}", "all splits need the same columns")
        for table in part.select_columns(columns).with_format("arrow").iter(_READ_ROWS):
            whole = table.combine_chunks()
            arrays = [
                self._embedded(column, whole.column(column).combine_chunks(), path) for column in whole.column_names
            ]
            yield pa.RecordBatch.from_arrays(arrays, names=whole.column_names)

    def error(self, problem: str, mend: str) -> UserError:
        """A mistake in the source as a whole."""
        return UserError(problem, field=_FIELD, value=self.source, mend=mend)

    def _foreign(self, field: pa.Field[Any]) -> bool:
        """Whether a column looks like images in Arrow and is known as something else: sound is stored the same way."""
        is_struct = pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        feature = self._features[field.name]
        return is_struct and not isinstance(feature, dict) and type(feature).__name__ != "Image"

    def _embedded(self, column: str, values: Any, path: str) -> Any:
        """Images of folders are stored as the names of files, which are read here."""
        feature = self._features[column]
        empty = values.field("bytes").is_null() if type(feature).__name__ == "Image" else None
        if empty is None or not empty.true_count:
            return values
        if not self._local:  # a stranger's table names files: of this machine only those that came with it
            names = [name for name in values.field("path").filter(empty).to_pylist() if name]
            elsewhere = [name for name in names if not _came_with_it(name)]
            if elsewhere:
                problem = f"has an image that is a file elsewhere: {elsewhere[0]}"
                raise UserError(problem, field=_FIELD, value=path, mend="look for a version with images inside")
        try:
            return feature.embed_storage(values)
        except OSError as error:
            problem = f"has an image that cannot be read: {one_line(error)}"
            raise UserError(problem, field=_FIELD, value=path, mend="mend or remove it") from None


def parse(source: str) -> HubSource:
    """`hf:owner/name[:split]` or `hf:./folder[:split]`; a folder begins with a dot, a slash or a tilde.

    Raises:
        UserError: it is neither, there is no such folder, or a folder here has the name of the data set.
    """
    text = source.removeprefix(hub.PREFIX)
    local = text.startswith((".", "/", "~"))
    whole = local and Path(text).expanduser().is_dir()  # whose name may have a colon
    place, colon, split = (text, "", "") if whole else text.partition(":") if not local else _last(text)
    if colon and not split:
        raise UserError("names no split after the colon", field=_FIELD, value=source, mend=_FORM)
    if local:
        folder = Path(place).expanduser()
        if not folder.is_dir():
            raise UserError("there is no such folder", field=_FIELD, value=source, mend=_FORM)
        return HubSource(str(folder.resolve()), True, split or None)
    if not hub.is_repository(place):
        raise UserError("is no data set of the hub", field=_FIELD, value=source, mend=_FORM)
    if Path(place).exists():  # the library would take it without a word
        raise UserError(
            f"could be the data set or the folder {place} of this machine",
            field=_FIELD,
            value=source,
            mend=f"write hf:./{place} for the folder; for the data set, start from another directory",
        )
    return HubSource(place, False, split or None)


def _last(text: str) -> tuple[str, str, str]:
    """What stands before and after the last colon, if any; a split's name has no slash."""
    place, colon, split = text.rpartition(":")
    return (place, colon, split) if colon and "/" not in split else (text, "", "")


def _came_with_it(name: str) -> bool:
    """Whether a file is one that the library fetched, perhaps inside an archive."""
    import datasets
    from huggingface_hub import constants

    place = name.rpartition("::")[2]
    whole = os.path.abspath(place)
    caches = [os.path.abspath(cache) for cache in (datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)]
    return place.startswith("hf://datasets/") or any(os.path.commonpath([whole, cache]) == cache for cache in caches)


def _load(source: str, asked: HubSource, subset: str | None) -> dict[str, Any]:
    """All splits, prepared in the library's cache."""
    try:
        import datasets
    except ImportError:
        raise hub.not_installed("datasets", _FIELD, source) from None
    try:
        with hub.quiet(), _quiet():
            # Older versions could run a data set's own Python: never.
            found = datasets.load_dataset(asked.path, name=subset, trust_remote_code=False)
    except Exception as error:  # whatever a library says of data and network that are not ours
        raise _refusal(error, source, asked, subset) from None
    return dict(found)


def _refusal(error: Exception, source: str, asked: HubSource, subset: str | None) -> UserError:
    said = one_line(error)
    if "scripts are no longer supported" in said or "trust_remote_code" in said:
        return UserError(
            "is a program that makes the data, and no programs of data sets are run",
            field=_FIELD,
            value=source,
            mend="look for a Parquet version, or run it yourself and prepare the files that it writes",
        )
    if isinstance(error, ValueError) and "onfig" in said:
        problem = "is no subset of it" if subset is not None else "is needed: the data set has several"
        if "Couldn't find cache" in said:
            problem = "is not in the cache, which alone was asked"
        return UserError(problem, field="--subset", value=subset, mend=said)
    made = type(error).__name__.startswith("DatasetGeneration")  # while its files were read
    cause = error.__cause__ if made and isinstance(error.__cause__, Exception) else error
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        problem, mend = f"cannot be kept in the cache: {cause.strerror}", "free some space, or set HF_HOME"
        return UserError(problem, field=_FIELD, value=source, mend=mend)
    if made or isinstance(cause, pa.ArrowException):
        problem = f"is damaged, or its files do not go together: {one_line(cause)}"
        return UserError(problem, field=_FIELD, value=source, mend="mend or remove the file")
    if asked.local:
        problem = f"cannot be loaded: {said or type(error).__name__}"
        return UserError(problem, field=_FIELD, value=source, mend="lay it out as the hub does, one data set a folder")
    return hub.refusal(error, _FIELD, source)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Progress bars of the library are for terminals alone; what its readers log is in the error as well."""
    import datasets

    readers = logging.getLogger("datasets.packaged_modules")
    level = readers.level
    readers.setLevel(logging.CRITICAL)
    hide = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        readers.setLevel(level)
        if hide:
            datasets.enable_progress_bars()
