"""`dbtrain prepare`: a source of images, latents or text -> a folder of shards, all or nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dbtrain.config import RunConfig
from dbtrain.data.cold import restore_cold
from dbtrain.data.columns import Rows
from dbtrain.data.files import partial_folder, publish, unwritable
from dbtrain.data.fits import check_fits
from dbtrain.data.manifest import MANIFEST_FILE, SPLITS, TOKENIZER_FILE, Manifest, Split, SplitFiles
from dbtrain.data.moments import FloatMoments, Moments, PixelMoments
from dbtrain.data.node_cache import read_manifest
from dbtrain.data.shard_writer import SplitWriter, write_file
from dbtrain.data.sources import Source, SourceOptions
from dbtrain.data.sources.opening import open_source
from dbtrain.data.text.source import PackedText
from dbtrain.data_config import BUILT_IN_SOURCES
from dbtrain.errors import UserError
from dbtrain.model_config import TextModelConfig

DEFAULT_SHARD_BYTES = 256 * 1000 * 1000

Progress = Callable[[Split, int, int | None], None]
"""Called with the split, its rows written so far and its rows in all, if that is known (it is not for text)."""


def prepare(
    source: str,
    out: Path,
    *,
    size: int | None = None,
    channels: int | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    length: int | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    subset: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    cold: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write the shards of `source` to the folder `out`; memory is bounded by one shard.

    The folder appears under its name only when it is complete and durable; interruptions leave nothing.

    Args:
        source: `digits`, `topics`, Parquet of images, latents or text (file, folder, pyarrow filesystem URI), Arrow
            files of latents, a text file or JSON lines, a folder of text files or class folders of images, or a data
            set of the Hugging Face hub (`hf:owner/name`, `hf:owner/name:split`, `hf:./folder` in its layout).
        out: the new folder.
        size: resize the shorter side of every image to this many pixels and cut the centre square.
        channels: 1 for grey, 3 for colour; that of the first image when not given.
        label_column: column of the class ids of images or latents, where its type does not show it.
        text_column: column of the documents in JSON lines or Parquet.
        length: tokens in a window of text; 256 when not given.
        tokenizer: `byte` (when not given), `bpe` to train one on the training text, or the path of a tokenizer.json.
        vocab_size: number of token ids of a tokenizer that is trained; 4096 when not given.
        subset: configuration of a data set of the hub that has several.
        shard_bytes: upper bound on the size of one shard.
        cold: keep zstd copies of the shards as well, from which training restores shards that were deleted.
        overwrite: replace shards that are in `out` already.
        progress: told after every few hundred rows.

    Raises:
        UserError: the source is missing, empty or corrupt, an option does not apply to it, `out` is taken, or the
            disk is full or read-only.
    """
    out = out.expanduser().absolute()
    options = SourceOptions(
        size=size,
        channels=channels,
        label_column=label_column,
        text_column=text_column,
        length=length,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        subset=subset,
    )
    replace = _check_free(out, overwrite)
    try:
        opened = open_source(source, options)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", field="SOURCE", value=source) from None
    try:
        with partial_folder(out) as folder:
            manifest = _write(opened, folder, shard_bytes, cold, progress)
            if isinstance(opened, PackedText):
                write_file(folder / TOKENIZER_FILE, opened.tokenizer.to_bytes())
            write_file(folder / MANIFEST_FILE, manifest.to_json().encode())
            publish(folder, out, replace=replace)
    except OSError as error:
        raise unwritable(error, "--out", out) from None
    return manifest


def ensure_prepared(config: RunConfig, progress: Progress | None = None) -> Manifest:
    """The manifest of the run's data, which `local_shards` then opens.

    In a folder, a built-in source is prepared on first use, and deleted shards are restored from their cold copies.
    Of a URI the manifest alone is read.

    Raises:
        UserError: there is no data, it is damaged, or it does not fit the model; the message has the mend.
    """
    source = config.data.source
    manifest = read_manifest(config.data) if config.data.remote else _prepared_here(config, progress)
    if source in BUILT_IN_SOURCES and manifest.source != source:
        raise UserError(
            f"{config.data.location} holds data prepared from {manifest.source!r}",
            field="data.source",
            value=source,
            mend="set data.source to a name of your own, or data.path to another folder",
        )
    check_fits(manifest.facts(), config)
    return manifest


def _prepared_here(config: RunConfig, progress: Progress | None) -> Manifest:
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
            # Text fits a model only if it is cut to the model's windows.
            length = config.model.length if isinstance(config.model, TextModelConfig) and source == "topics" else None
            prepare(source, folder, length=length, progress=progress)
        except UserError:
            # Another run may have prepared the same folder meanwhile; then its work is as good as ours.
            if not (folder / MANIFEST_FILE).exists():
                raise
    manifest = Manifest.load(folder)
    restore_cold(folder)
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


def _write(source: Source, folder: Path, shard_bytes: int, cold: bool, progress: Progress | None) -> Manifest:
    channels = source.columns[0].shape[0]
    moments: Moments | None = None
    if source.kind != "text":
        moments = PixelMoments(channels) if source.kind == "image" else FloatMoments(channels)
    splits: dict[Split, SplitFiles] = {}
    for split in SPLITS:
        writer = SplitWriter(folder, split, source.columns, shard_bytes, cold)
        done, total = 0, source.rows(split)
        for rows in source.batches(split):
            _check_labels(rows, source)
            if split == "train" and moments is not None:
                moments.add(rows["image"])
            writer.append(rows)
            done += len(rows[source.columns[0].name])
            if progress is not None:
                progress(split, done, total)
        files = writer.finish()
        if files is None:
            raise UserError(
                f"holds no {source.kind}s for the split {split!r}", field="SOURCE", value=source.name, mend="add some"
            )
        splits[split] = files
    mean, std = moments.result() if moments is not None else ((), ())
    return Manifest(
        source=source.name,
        kind=source.kind,
        columns=source.columns,
        class_names=source.class_names,
        splits=splits,
        mean=mean,
        std=std,
        text=source.facts() if isinstance(source, PackedText) else None,
    )


def _check_labels(rows: Rows, source: Source) -> None:
    if "label" not in rows:
        return
    labels, last = rows["label"], max(len(source.class_names), 1) - 1
    wrong = labels[(labels < 0) | (labels > last)]
    if wrong.size:
        raise UserError(f"has the class id {wrong[0]}, outside 0..{last}", field="SOURCE", value=source.name)


__all__ = ["DEFAULT_SHARD_BYTES", "Progress", "ensure_prepared", "prepare"]
