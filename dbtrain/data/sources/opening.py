"""The source that a name, path or URI stands for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dbtrain import hub
from dbtrain.data.sources.base import TEST_NAMES, Source, SourceOptions
from dbtrain.data.sources.folders import IMAGE_SUFFIXES, ClassFolders
from dbtrain.data.sources.latents import Latents, latent_column
from dbtrain.data.sources.parquet import ParquetImages, image_column
from dbtrain.data.sources.tables import ARROW, PARQUET, SPLIT_NAME, TableFiles, Tables
from dbtrain.data.text.documents import Documents, JsonLines, TableText, TextFiles, text_column, topics
from dbtrain.data.text.source import PackedText, SplitDocuments
from dbtrain.errors import UserError

_TEXT = (".txt", ".md")
_LINES = (".jsonl",)
_IMAGE_OPTIONS = ("size", "channels")
_TEXT_OPTIONS = ("length", "tokenizer", "vocab_size")
# Files that stand beside a data set and are no part of it.
_ABOUT = ("readme", "license", "licence")


def open_source(source: str, options: SourceOptions) -> Source:
    """`digits` or `topics`, a data set of the Hugging Face hub (`hf:...`), a file, folder or URI of Parquet or Arrow, a
    text file, JSON lines, or a folder of text files or class folders.

    Raises:
        UserError: there is no such source, nothing in it can be read, or an option does not apply to it.
    """
    if source == "digits":
        from dbtrain.data.sources.digits import Digits  # brings a library that the others do not need

        options.check_only((), "the digits")
        return Digits()
    if source == "topics":
        options.check_only(_TEXT_OPTIONS, "the topics")
        return PackedText(source, SplitDocuments(topics(), None), options)
    if hub.on_hub(source):
        from dbtrain.data.sources.hub import HubTables  # as above

        return _open_tables(HubTables(source, options.subset), replace(options, subset=None))
    if "://" in source:
        return _open_tables(TableFiles(source), options)
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(
            "there is no such file or folder",
            field="SOURCE",
            value=source,
            mend="give `digits`, `topics`, a Parquet or text file, a folder, or hf:owner/name",
        )
    path = path.resolve()
    files = [path] if path.is_file() else _files(path)
    suffixes = {file.suffix.lower() for file in files}
    if not suffixes.isdisjoint((*PARQUET, *ARROW)):
        return _open_tables(TableFiles(source), options)
    if not suffixes.isdisjoint(_LINES):
        lines = [file for file in files if file.suffix.lower() in _LINES]
        others = [file for file in files if file.suffix.lower() in _TEXT and not _is_about(file)]
        if others:
            raise UserError(
                f"has JSON lines ({lines[0].name}) and text files ({others[0].name})",
                field="SOURCE",
                value=source,
                mend="give a folder with one of the two",
            )
        return _open_text(path, lines, options, lines=True)
    if path.is_file() and path.suffix.lower() not in _TEXT:
        if not _is_table(path):
            raise UserError(
                "is neither text (.txt, .md), JSON lines (.jsonl), Parquet nor Arrow",
                field="SOURCE",
                value=source,
                mend="if it is text, give it one of these endings",
            )
        return _open_tables(TableFiles(source), options)
    if suffixes.isdisjoint(_TEXT) or not suffixes.isdisjoint(IMAGE_SUFFIXES):
        options.check_only(_IMAGE_OPTIONS, "class folders of images")
        return ClassFolders(path, options)
    return _open_text(path, [file for file in files if file.suffix.lower() in _TEXT], options, lines=False)


def _is_about(file: Path) -> bool:
    return file.stem.lower().startswith(_ABOUT)


def _is_table(file: Path) -> bool:
    """Whether a file without a telling name begins as tables do."""
    try:
        with file.open("rb") as opened:
            return opened.read(6).startswith((b"PAR1", b"ARROW1"))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", field="file", value=file) from None


def _files(root: Path) -> list[Path]:
    """All files below a folder by relative path, but for hidden ones; links to folders are followed, loops are not."""
    found: list[Path] = []
    seen: set[str] = set()
    for folder, inside, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        inside[:] = [name for name in inside if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _open_tables(tables: Tables, options: SourceOptions) -> Source:
    """What the columns of tables show: images, latents or text; text in any case where its column is named."""
    image, latent = image_column(tables.schema), latent_column(tables.schema)
    if options.text_column is None and image is not None:
        options.check_only((*_IMAGE_OPTIONS, "label_column"), "Parquet of images")
        return ParquetImages(tables, image, options)
    if options.text_column is None and latent is not None:
        options.check_only(("label_column",), "latents")
        return Latents(tables, latent, options)
    text = text_column(tables.schema, options.text_column)
    if text is None:
        raise tables.error(
            "has no column of images (structs of bytes and path), of latents (fixed-shape tensors, one column, or one"
            f" called latent) or of text (strings, one column, or one called text); its columns are"
            f" {', '.join(tables.schema.names)}",
            "give such a column, or name that of text with --text-column",
        )
    options.check_only((*_TEXT_OPTIONS, "text_column"), "Parquet of text")
    test = next((tables.groups[name] for name in TEST_NAMES if name in tables.groups), None)
    documents = SplitDocuments(
        TableText(tables, tables.train, text), None if test is None else TableText(tables, test, text)
    )
    return PackedText(tables.name, documents, options)


def _open_text(path: Path, files: Sequence[Path], options: SourceOptions, *, lines: bool) -> PackedText:
    options.check_only((*_TEXT_OPTIONS, *(["text_column"] if lines else [])), "text files")
    root = path if path.is_dir() else path.parent

    def read(group: Sequence[Path]) -> Documents:
        return JsonLines(group, options.text_column) if lines else TextFiles(group)

    train, test = _splits(root, files, str(path))
    return PackedText(str(path), SplitDocuments(read(train), None if test is None else read(test)), options)


def _splits(root: Path, files: Sequence[Path], name: str) -> tuple[Sequence[Path], Sequence[Path] | None]:
    """Files for training and testing, where the names of the files or folders right below the root tell both."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        match = SPLIT_NAME.match(file.relative_to(root).parts[0])
        groups.setdefault(match[1] if match else "", []).append(file)
    test = next((groups[split] for split in TEST_NAMES if split in groups), None)
    if "train" not in groups or test is None:
        return files, None
    others = [file for file in groups.get("", []) if not _is_about(file)]
    if others:
        raise UserError(
            f"has files for training and testing, and {others[0].relative_to(root)}, which is for neither",
            field="SOURCE",
            value=name,
            mend="move it into one of the splits, or away",
        )
    return groups["train"], test
