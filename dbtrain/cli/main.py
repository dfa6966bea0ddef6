"""The `dbtrain` command. Each verb is thin: it reads options, calls the library, and prints.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 the run failed or was stopped,
2 the user's mistake, which is one message without a traceback. PyTorch and Ray are imported inside the verbs, so that
`--help` and mistakes answer at once.
"""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Sequence
from types import FrameType

import typer

import dbtrain
from dbtrain.cli import data, exporting, jobs, live, planning, reporting, results, sampling, training, watching
from dbtrain.cli.output import ToStandardError, report, report_mistake
from dbtrain.errors import RunInterrupted, UserError

DONE, FAILED, MISTAKE = 0, 1, 2
"""Exit codes."""
_INTERRUPTED = 130  # what Typer makes of a KeyboardInterrupt
# Typer brings its own copy of click, older versions import it: this is the class of either.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="dbtrain",
    help="Train a transformer as independent denoising blocks, one Ray worker a block.",
    epilog="Start with:  dbtrain train configs/demo/vit.yaml --run runs/demo",
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command(epilog="Example:  dbtrain prepare photos/ --size 64 --out data/photos")(data.prepare)
app.command(epilog="Example:  dbtrain plan configs/vit-cifar100.yaml --blocks 4 --memory 2GB")(planning.plan)
app.command(epilog="Example:  dbtrain train configs/demo/vit.yaml --run runs/a --set training.steps=500")(
    training.train
)
app.command(epilog="Example:  dbtrain baseline configs/demo/vit.yaml --run runs/a-baseline")(training.baseline)
app.command(epilog="Example:  dbtrain submit my.yaml --address http://head:8265 --run /shared/runs/a --follow")(
    jobs.submit
)
app.command(epilog="Example:  dbtrain status runs/a   or   dbtrain status NAME --address http://head:8265")(jobs.status)
app.command(epilog="Example:  dbtrain stop runs/a   or   dbtrain stop NAME --address http://head:8265")(live.stop)
app.command(epilog="Example:  dbtrain scale runs/a block=3 replicas=2")(live.scale)
app.command(epilog="Example:  dbtrain monitor runs/a   or   dbtrain monitor runs/a --web")(watching.monitor)
app.command(epilog="Example:  dbtrain assemble runs/a")(results.assemble)
app.command(epilog="Example:  dbtrain evaluate runs/a --baseline runs/a-baseline")(results.evaluate)
app.command(epilog="Example:  dbtrain predict runs/a one.png two.png")(results.predict)
app.command(epilog="Example:  dbtrain sample runs/lm --prompt 'The '   or   dbtrain sample runs/dit --count 64")(
    sampling.sample
)
app.command(epilog="Example:  dbtrain export runs/lm --out exported/lm")(exporting.export)
app.command(epilog="Example:  dbtrain compare runs/a runs/a-baseline")(results.compare)
app.command(epilog="Example:  dbtrain figures runs/a --baseline runs/a-baseline")(results.figures)
app.command(epilog="Example:  dbtrain report runs/a runs/a-baseline")(reporting.report)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dbtrain {dbtrain.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Train a transformer as independent denoising blocks, one Ray worker a block."""


def run(arguments: Sequence[str]) -> int:
    """Carry out one command line and return its exit code; exceptions that come out are bugs."""
    try:
        code = app(list(arguments) or ["--help"], prog_name="dbtrain", standalone_mode=False)
    except UserError as mistake:
        report_mistake(mistake)
        return MISTAKE
    except RunInterrupted as interrupted:
        report(str(interrupted))
        return FAILED
    except _UsageError as error:
        report_mistake(_explain(error))
        return MISTAKE
    except typer.Abort:
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        report("interrupted; the same command can be given again")
        return FAILED
    return code or DONE


def main() -> None:
    """Entry point of the installed command."""
    # Whatever warns also logs; the log's line says what happened, without a line of our code.
    logging.getLogger("dbtrain").addHandler(ToStandardError(logging.WARNING))
    warnings.filterwarnings("ignore", module=r"dbtrain\.")
    # Training has handlers of its own; other verbs shall clean up when they are ended, as on Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = run(sys.argv[1:])
        # Nothing is left to clean up: an exception raised while Python shuts down would only print a traceback.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
    except KeyboardInterrupt:  # a signal between the end of the verb and the line above
        code = FAILED
    sys.exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _explain(error: Exception) -> UserError:
    """A mistake in the command line itself, such as a missing argument, in one sentence."""
    parameter, context = getattr(error, "param", None), getattr(error, "ctx", None)
    # The whole message of a known parameter would name it again; that of an unknown one suggests the nearest.
    text: str = error.message if parameter is not None else error.format_message()  # type: ignore[attr-defined]
    text = " ".join(text.split()).removeprefix("Value error, ").rstrip(".")
    field = None if parameter is None else parameter.get_error_hint().strip("'\"")
    verb = "dbtrain" if context is None else context.command_path
    problem = text or "is required and was not given"
    return UserError(problem[:1].lower() + problem[1:], field=field, mend=f"`{verb} --help` shows what it takes")


if __name__ == "__main__":
    main()
