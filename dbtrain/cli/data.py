"""`dbtrain prepare`: data into shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from dbtrain.cli.output import AsJson, emit_json, err, whole_number


def prepare(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="`digits`, a folder of class folders, or image Parquet (file, folder or URI).",
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
            help="Resize and centre-crop to this many pixels.",
            show_default=False,
        ),
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(
            "--channels",
            metavar="1|3",
            parser=whole_number("--channels"),
            help="1 for grey, 3 for colour.",
            show_default=False,
        ),
    ] = None,
    label_column: Annotated[
        str | None, typer.Option("--label-column", help="Parquet column of class ids.", show_default=False)
    ] = None,
    cold: Annotated[bool, typer.Option("--cold", help="Keep zstd copies that training can restore from.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace shards that are there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn images into memory-mapped Arrow shards."""
    from dbtrain.data.prepare import prepare as prepare_shards

    folder = to or Path("data") / (name or _name_of(source))
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        tasks: dict[str, int] = {}

        def advance(split: str, done: int, total: int) -> None:
            if split not in tasks:
                tasks[split] = bar.add_task(split, total=total)
            bar.update(tasks[split], completed=done)  # type: ignore[arg-type]

        manifest = prepare_shards(
            source,
            folder,
            size=size,
            channels=channels,
            label_column=label_column,
            cold=cold,
            overwrite=overwrite,
            progress=advance,
        )
    rows = {split: files.rows for split, files in manifest.splits.items()}
    if as_json:
        emit_json(
            {
                "path": str(folder),
                "rows": rows,
                "classes": len(manifest.class_names),
                "image": manifest.image.model_dump(),
                "sha256": manifest.facts().sha256,
            }
        )
        return
    counts = ", ".join(f"{count} {split}" for split, count in rows.items())
    image, classes = manifest.image, len(manifest.class_names)
    typer.echo(f"{folder}: {counts} images of {image}, {classes} classes")
    for line in (
        "in the configuration:",
        f"  data: {{source: {name or folder.name}, path: {folder}}}",
        f"  model: {{image_size: {image.height}, channels: {image.channels}, num_classes: {classes}}}",
    ):
        err.print(line, soft_wrap=True, markup=False)


def _name_of(source: str) -> str:
    """`photos` for photos/, ../photos, photos.parquet and s3://bucket/photos."""
    last = source.rstrip("/").rpartition("/")[2] if "://" in source else Path(source).expanduser().resolve().name
    return last.removesuffix(".parquet") or "images"
