"""`dbtrain sample`: images or text from an assembled model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.progress import Progress

from dbtrain.cli.output import AsJson, emit_json, err
from dbtrain.cli.results import Device
from dbtrain.errors import UserError
from dbtrain.hub import on_hub

if TYPE_CHECKING:
    from dbtrain.inference.generate import TextGenerator
    from dbtrain.inference.sample_images import ImageSampler
    from dbtrain.inference.unmask import TextUnmasker

_IMAGES = ("--count", "--label", "--steps", "--solver", "--guidance", "--seed", "--out")
_CONTINUED = ("--prompt", "--tokens", "--temperature", "--top-p", "--greedy", "--readout", "--steps", "--seed")
_UNMASKED = ("--count", "--infill", "--temperature", "--top-p", "--steps", "--seed")
_GAP = "[["
_DIGITS = 9
"""Of a gap's length, at most."""


def sample(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model folder, run directory, or hf:OWNER/NAME.", show_default=False)
    ],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="Text to go on from; may be given again.")
    ] = None,
    infill: Annotated[
        str | None,
        typer.Option("--infill", metavar="TEXT", help="Text with gaps: [[12]] is 12 tokens to fill in (masked LM)."),
    ] = None,
    count: Annotated[int | None, typer.Option("--count", help="How many; 64 images or 1 text by default.")] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="CLASS", help="Class name of the images; all in turn.")
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="At most so many tokens after the prompt.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps of the chain, instead of chain.steps.")] = None,
    solver: Annotated[str | None, typer.Option("--solver", metavar="euler|heun", help="For images.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="For images; 1 turns it off.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="For text; 1 by default.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="For text: smallest set of this probability.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="For text: always the likeliest token.")] = False,
    readout: Annotated[str | None, typer.Option("--readout", help="For text, instead of chain.readout.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the samples; 0 by default.")] = None,
    to: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of the images; MODEL/samples by default.")
    ] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Draw images (a PNG grid and an .npz), or write text."""
    given = {
        "--prompt": prompt,
        "--infill": infill,
        "--count": count,
        "--label": label,
        "--tokens": tokens,
        "--steps": steps,
        "--solver": solver,
        "--guidance": guidance,
        "--temperature": temperature,
        "--top-p": top_p,
        "--greedy": greedy or None,
        "--readout": readout,
        "--seed": seed,
        "--out": to,
    }
    options = {name: value for name, value in given.items() if value is not None}

    import dbtrain
    from dbtrain.models import family_of

    front = dbtrain.load(model, device)
    task = family_of(front.model.config).task
    if task == "classify":
        raise UserError("classifies images and makes none", field="MODEL", value=model, mend="use `dbtrain predict`")
    takes = {"generate_images": _IMAGES, "generate_text": _CONTINUED, "unmask_text": _UNMASKED}[task]
    for name, value in options.items():
        if name not in takes:
            raise UserError(
                f"is of no use to a {front.model.config.model.family}",
                field=name,
                value=value,
                mend=f"it takes {', '.join(takes)}",
            )
    if task == "generate_images":
        result = _draw(cast("ImageSampler", front), model, options)
    elif task == "generate_text":
        result = _continue(cast("TextGenerator", front), options)
    else:
        result = _unmask(cast("TextUnmasker", front), options)
    if as_json:
        emit_json(result)
        return
    for path in result.get("files", []):
        typer.echo(path)
    for sampled in result.get("texts", []):
        typer.echo(sampled["prompt"] + sampled["text"] if "prompt" in sampled else sampled["text"])
        typer.echo()


def _draw(sampler: ImageSampler, model: str, options: dict[str, Any]) -> dict[str, Any]:
    from dbtrain.inference.sample_files import check_folder, save_samples
    from dbtrain.storage import Storage

    folder, home = options.get("--out"), None if on_hub(model) else Storage.open(model).local_path
    if folder is None:
        if home is None:
            raise UserError("is needed where the model is not on this machine's disks", field="--out")
        folder = (home if "://" in model else Path(model)) / "samples"
    check_folder(folder)
    count = options.get("--count", 64)
    labels = None if "--label" not in options else sampler.label_ids(options["--label"])
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("sampling", total=count)
        images = sampler.sample(
            count,
            labels,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            **_keywords(options, "--steps", "--solver", "--guidance", "--seed"),
        )
    files = save_samples(sampler, folder, images, labels)
    return {"files": [str(path) for path in files], "count": count}


def _continue(generator: TextGenerator, options: dict[str, Any]) -> dict[str, Any]:
    prompts = options.get("--prompt")
    if not prompts:
        raise UserError("is needed: the text to go on from", field="--prompt", mend="--prompt 'The '")
    keywords = _keywords(options, *(name for name in _CONTINUED if name != "--prompt"))
    answers = generator.generate(prompts, **keywords)
    return {"texts": [{"prompt": asked, "text": said} for asked, said in zip(prompts, answers, strict=True)]}


def _unmask(unmasker: TextUnmasker, options: dict[str, Any]) -> dict[str, Any]:
    keywords = _keywords(options, "--temperature", "--top-p", "--steps", "--seed")
    if "--infill" not in options:
        return {"texts": [{"text": text} for text in unmasker.generate(options.get("--count", 1), **keywords)]}
    if "--count" in options:
        raise UserError("goes with free samples alone", field="--count", mend="leave out --count or --infill")
    return {"texts": [{"text": unmasker.infill(_parts(options["--infill"]), **keywords)}]}


def _parts(text: str) -> list[str | int]:
    """`to [[3]] be` -> ["to ", 3, " be"]."""
    first, *rest = text.split(_GAP)
    parts: list[str | int] = [first] if first else []
    for piece in rest:
        number, closed, after = piece.partition("]]")
        if not closed or not (number.isascii() and number.isdigit() and len(number) <= _DIGITS):
            raise UserError(
                "has a gap that is not closed, or not a number", field="--infill", value=text, mend="write [[12]]"
            )
        parts += [int(number), after] if after else [int(number)]
    return parts


def _keywords(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Options as the keyword arguments of the library."""
    return {name[2:].replace("-", "_"): options[name] for name in names if name in options}
