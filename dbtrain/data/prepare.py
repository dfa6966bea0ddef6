"""`dbtrain prepare`: a source of images -> a folder of shards, all or nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dbtrain.config import BUILT_IN_SOURCES, RunConfig
from dbtrain.data.cold import restore_cold
from dbtrain.data.files import partial_folder, publish, unwritable
from dbtrain.data.manifest import MANIFEST_FILE, Manifest, Split, SplitFiles
from dbtrain.data.shard_writer import HashingFile, SplitWriter
from dbtrain.data.sources import ImageSource, SourceOptions, open_source
from dbtrain.errors import UserError

DEFAULT_SHARD_BYTES = 256 * 1000 * 1000

Progress = Callable[[Split, int, int], None]
"""Called with the split, its rows written so far and its rows in all."""


def prepare(
    source: str,
    out: Path,
    *,
    size: int | None = None,
    channels: int | None = None,
    label_column: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    cold: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write the shards of `source` to the folder `out`; memory is bounded by one shard.

    The folder appears under its name only when it is complete and durable; interruptions leave nothing.

    Args:
        source: `digits`, image Parquet (file, folder, pyarrow filesystem URI), or a folder of class folders.
        out: the new folder.
        size: resize the shorter side of every image to this many pixels and cut the centre square.
        channels: 1 for grey, 3 for colour; that of the first image when not given.
        label_column: column of the class ids in Parquet, where its type does not show it.
        shard_bytes: upper bound on the size of one shard.
        cold: keep zstd copies of the shards as well, from which training restores shards that were deleted.
        overwrite: replace shards that are in `out` already.
        progress: told after every few hundred rows.

    Raises:
        UserError: the source is missing, empty or corrupt, `out` is taken, or the disk is full or read-only.
    """
    out = out.expanduser().absolute()
    if channels not in (None, 1, 3):
        raise UserError("has to be 1 or 3", field="--channels", value=channels)
    if size is not None and size < 1:
        raise UserError("has to be at least 1", field="--size", value=size)
    replace = _check_free(out, overwrite)
    options = SourceOptions(size=size, channels=channels, label_column=label_column)
    try:
        opened = open_source(source, options)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", field="SOURCE", value=source) from None
    try:
        with partial_folder(out) as folder:
            manifest = _write(opened, folder, shard_bytes, cold, progress)
            file = HashingFile(folder / MANIFEST_FILE)
            try:
                file.write(manifest.to_json().encode())
            finally:
                file.close()
            publish(folder, out, replace=replace)
    except OSError as error:
        raise unwritable(error, "--out", out) from None
    return manifest


def ensure_prepared(config: RunConfig, progress: Progress | None = None) -> Manifest:
    """The manifest of the run's data, ready to be opened with `ShardSet.open(config.data.shards, ...)`.

    A built-in source is prepared on first use, and deleted shards are restored from their cold copies.

    Raises:
        UserError: there is no data, it is damaged, or it does not fit the model; the message has the mend.
    """
    folder, source = config.data.shards, config.data.source
    if not (folder / MANIFEST_FILE).exists():
        if source not in BUILT_IN_SOURCES:
            raise UserError(
                f"there is no prepared data in {folder}",
                field="data.source",
                value=source,
                mend=f"make it with `dbtrain prepare SOURCE --out {folder}`, or set data.path",
            )
        try:
            prepare(source, folder, progress=progress)
        except UserError:
            # Another run may have prepared the same folder meanwhile; then its work is as good as ours.
            if not (folder / MANIFEST_FILE).exists():
                raise
    manifest = Manifest.load(folder)
    restore_cold(folder)
    _check_fits(manifest, config)
    return manifest


def _check_free(out: Path, overwrite: bool) -> bool:
    """Whether there is something to replace; only ever shards, never a user's other files."""
    if out.is_dir() and not any(out.iterdir()):
        return False
    if not out.exists():
        return False
    if not (out / MANIFEST_FILE).is_file():
        raise UserError(
            "is there already and holds no prepared data",
            field="--out",
            value=out,
            mend="choose another folder",
        )
    if not overwrite:
        raise UserError(
            f"holds data prepared from {_source_of(out)}",
            field="--out",
            value=out,
            mend="pass --overwrite to prepare it again, or choose another folder",
        )
    return True


def _source_of(folder: Path) -> str:
    try:
        return repr(Manifest.load(folder).source)
    except UserError:
        return "an unknown source"


def _write(source: ImageSource, folder: Path, shard_bytes: int, cold: bool, progress: Progress | None) -> Manifest:
    counts = np.zeros((source.image.channels, 256), dtype=np.int64)
    splits: dict[Split, SplitFiles] = {}
    names: tuple[Split, Split] = ("train", "test")
    for split in names:
        writer = SplitWriter(folder, split, source.image, shard_bytes, cold)
        done, total = 0, source.rows(split)
        for images, labels in source.batches(split):
            _check_labels(labels, source)
            if split == "train":
                counts += _histogram(images)
            writer.append(images, labels)
            done += len(labels)
            if progress is not None:
                progress(split, done, total)
        files = writer.finish()
        if files is None:
            raise UserError(
                f"holds no images for the split {split!r}", field="SOURCE", value=source.name, mend="add some"
            )
        splits[split] = files
    mean, std = _moments(counts)
    return Manifest(
        source=source.name,
        image=source.image,
        class_names=source.class_names,
        splits=splits,
        mean=mean,
        std=std,
    )


def _check_labels(labels: npt.NDArray[np.int64], source: ImageSource) -> None:
    wrong = labels[(labels < 0) | (labels >= len(source.class_names))]
    if wrong.size:
        raise UserError(
            f"has the class id {wrong[0]}, outside 0..{len(source.class_names) - 1}",
            field="SOURCE",
            value=source.name,
        )


def _histogram(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """How often each channel takes each value, (C, 256); exact."""
    channels = images.shape[1]
    return np.stack([np.bincount(images[:, index].ravel(), minlength=256) for index in range(channels)])


def _moments(counts: npt.NDArray[np.int64]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels in [0, 1], from its histogram."""
    values = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ values
    std = np.sqrt((share * (values[None] - mean[:, None]) ** 2).sum(axis=1))
    return tuple(mean.tolist()), tuple((np.where(std > 0, std, 1.0)).tolist())


def _check_fits(manifest: Manifest, config: RunConfig) -> None:
    image, model = manifest.image, config.model
    source = config.data.source
    if source in BUILT_IN_SOURCES and manifest.source != source:
        raise UserError(
            f"{config.data.shards} holds data prepared from {manifest.source!r}",
            field="data.source",
            value=source,
            mend="set data.source to a name of your own, or data.path to another folder",
        )
    classes = len(manifest.class_names)
    checks: tuple[tuple[str, int, int, str], ...] = (
        ("model.image_size", model.image_size, image.height, f"the images are {image.height} pixels high"),
        ("model.image_size", model.image_size, image.width, f"the images are {image.width} pixels wide"),
        ("model.channels", model.channels, image.channels, f"the images have {image.channels} channels"),
        ("model.num_classes", model.num_classes, classes, f"the data has class ids 0..{classes - 1}"),
    )
    for field, have, need, problem in checks:
        if have != need:
            raise UserError(f"{problem} in {config.data.shards}", field=field, value=have, mend=f"set {field}={need}")


__all__ = ["DEFAULT_SHARD_BYTES", "Progress", "ensure_prepared", "prepare"]
