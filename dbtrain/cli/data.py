"""`dbtrain prepare`: data into shards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from dbtrain.cli.output import AsJson, emit_json, err, whole_number
from dbtrain.errors import UserError
from dbtrain.hub import on_hub

if TYPE_CHECKING:
    from dbtrain.data.manifest import Manifest


def prepare(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="`digits`, `topics`, class folders of images, text files, JSON lines, Parquet (file, folder, URI), or"
            " hf:OWNER/NAME[:SPLIT].",
            show_default=False,
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the shards; data/NAME by default.", show_default=False),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name for `data.source`; the source's own by default.", show_default=False),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            "--size",
            metavar="PIXELS",
            parser=whole_number("--size"),
            help="Images: resize and centre-crop to this many pixels.",
            show_default=False,
        ),
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(
            "--channels",
            metavar="1|3",
            parser=whole_number("--channels"),
            help="Images: 1 for grey, 3 for colour.",
            show_default=False,
        ),
    ] = None,
    label_column: Annotated[
        str | None, typer.Option("--label-column", help="Images, latents: column of class ids.", show_default=False)
    ] = None,
    text_column: Annotated[
        str | None, typer.Option("--text-column", help="Text: column of the documents.", show_default=False)
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            "--length",
            metavar="TOKENS",
            parser=whole_number("--length"),
            help="Text: tokens in a window; 256 by default.",
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            metavar="byte|bpe|FILE",
            help="Text: bytes (the default), BPE trained on the text, or a tokenizer.json.",
            show_default=False,
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            "--vocab-size",
            metavar="N",
            parser=whole_number("--vocab-size"),
            help="Text: token ids of a trained tokenizer; 4096 by default.",
            show_default=False,
        ),
    ] = None,
    subset: Annotated[
        str | None,
        typer.Option("--subset", metavar="CONFIG", help="hf: which of several configurations.", show_default=False),
    ] = None,
    cold: Annotated[bool, typer.Option("--cold", help="Keep zstd copies that training can restore from.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace shards that are there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn images, latents or text into memory-mapped Arrow shards."""
    from dbtrain.data.prepare import prepare as prepare_shards

    folder = to or Path("data") / (name or _name_of(source))
    if re.match(r"\w+:/", str(folder)):  # what a path leaves of the two slashes
        raise UserError(
            "is a URI, and shards are prepared in a folder of this machine",
            field="--out",
            value=folder,
            mend="give a folder, and copy the folder to where all machines see it when it is done",
        )
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        tasks: dict[str, int] = {}

        def advance(split: str, done: int, total: int | None) -> None:
            if split not in tasks:
                tasks[split] = bar.add_task(split, total=total)
            bar.update(tasks[split], completed=done)  # type: ignore[arg-type]

        manifest = prepare_shards(
            source,
            folder,
            size=size,
            channels=channels,
            label_column=label_column,
            text_column=text_column,
            length=length,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            subset=subset,
            cold=cold,
            overwrite=overwrite,
            progress=advance,
        )
    if as_json:
        emit_json({"path": str(folder), **_facts(manifest)})
        return
    said, model = _describe(manifest)
    typer.echo(f"{folder}: {said}")
    for line in (
        "in the configuration:",
        f"  data: {{source: {name or folder.name}, path: {folder}}}",
        f"  model: {{{', '.join(f'{key}: {value}' for key, value in model.items())}}}",
    ):
        err.print(line, soft_wrap=True, markup=False)


def _facts(manifest: Manifest) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "kind": manifest.kind,
        "rows": {split: files.rows for split, files in manifest.splits.items()},
        "sha256": manifest.facts().sha256,
    }
    if manifest.text is not None:
        return facts | {"text": manifest.text.model_dump()}
    return facts | {"classes": len(manifest.class_names), "image": manifest.image.model_dump()}


def _describe(manifest: Manifest) -> tuple[str, dict[str, int]]:
    """What was made, and the fields of the `model` section that follow from it."""
    counts = ", ".join(f"{files.rows} {split}" for split, files in manifest.splits.items())
    text = manifest.text
    if text is not None:
        dropped = sum(part.dropped for part in text.splits.values())
        documents = sum(part.documents for part in text.splits.values())
        made = f"{counts} windows of {text.length} tokens from {documents} documents ({dropped} tokens left over)"
        said = f"{made}, {text.tokenizer} tokenizer of {text.vocab_size} ids"
        model = {"length": text.length, "vocab_size": text.vocab_size}
        last = text.separator == text.vocab_size - 1  # which is what a model takes for granted
        return said, model if last else {**model, "separator": text.separator}
    image, classes = manifest.image, len(manifest.class_names)
    model = {"image_size": image.height, "channels": image.channels}
    return (
        f"{counts} {manifest.kind}s of {image}, {classes or 'no'} classes",
        model | ({"num_classes": classes} if classes else {}),
    )


def _name_of(source: str) -> str:
    """`photos` for photos/, ../photos, photos.parquet, s3://bucket/photos and hf:owner/photos:train."""
    if on_hub(source):
        from dbtrain.data.sources.hub import parse

        source = parse(source).path
    last = source.rstrip("/").rpartition("/")[2] if "://" in source else Path(source).expanduser().resolve().name
    for suffix in (".parquet", ".arrow", ".feather", ".txt", ".md", ".jsonl"):
        last = last.removesuffix(suffix)
    return last or "data"
