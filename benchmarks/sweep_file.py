"""The file of a sweep: what it may say, and the runs that follow from it, all validated before any of them starts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dbtrain.config import RunConfig
from dbtrain.config_file import load_config
from dbtrain.data.prepare import ensure_prepared
from dbtrain.errors import UserError
from dbtrain.plan import Kind
from dbtrain.training.planner import make_plan

ROOT = Path(__file__).resolve().parents[1]

Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1)]
"""Each once."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("seeds", "values", check_fields=False)
    @classmethod
    def _each_once(cls, values: list[Any]) -> list[Any]:
        twice = [value for index, value in enumerate(values) if value in values[:index]]
        if twice:
            raise ValueError(f"{twice[0]!r} is there twice")
        return values


class Tune(_Section):
    """One field that every row chooses for itself, all from the same values and with the same seeds."""

    field: str = Field(min_length=1)
    """Dotted name of the field."""
    values: list[Any] = Field(min_length=1)
    """What is tried."""
    seeds: Seeds
    """Of the tuning runs; none of them is reported."""


class Row(_Section):
    """One line of the table."""

    name: str = Field(min_length=1)
    """Its first cell, and the beginning of its run directories' names."""
    kind: Kind = "blocks"
    """Block by block, or the network trained end to end."""
    set: list[str] = []
    """Overrides of this row."""
    tune: bool = True
    """Whether the row takes part in `tune`."""

    @property
    def slug(self) -> str:
        """The name as a part of a folder's name."""
        return _slug(self.name)


class SweepFile(_Section):
    """The whole file."""

    config: Path
    """Configuration of a run, relative to the repository's root."""
    seeds: Seeds
    """Of the reported runs."""
    set: list[str] = []
    """Overrides of all rows."""
    figures: list[str] | None = None
    """Columns of the table; every figure when not given."""
    tune: Tune | None = None
    """The same search for every row."""
    rows: list[Row] = Field(min_length=1)
    """The lines of the table."""

    @model_validator(mode="after")
    def _consistent(self) -> SweepFile:
        slugs = [row.slug for row in self.rows]
        for index, row in enumerate(self.rows):
            if not row.slug:
                raise ValueError(f"the row {row.name!r} needs a letter or a digit in its name")
            if row.slug in slugs[:index]:
                raise ValueError(f"the names of the rows have to differ in letters and digits: {row.name!r}")
        both = [] if self.tune is None else [seed for seed in self.tune.seeds if seed in self.seeds]
        if both:
            raise ValueError(f"seed {both[0]} is tuned on and reported; take other seeds for tune.seeds")
        return self

    def tunes(self, row: Row) -> bool:
        """Whether that row is tuned."""
        return self.tune is not None and row.tune


@dataclass(frozen=True)
class Job:
    """One run."""

    row: str
    """Name of its row."""
    kind: Kind
    value: str | None
    """The tuned field's value, as YAML; none in a row that is not tuned."""
    seed: int
    folder: str
    """Name of the run directory."""
    config: RunConfig


@dataclass(frozen=True)
class RowJobs:
    """The runs of a row."""

    row: Row
    tuning: tuple[Job, ...]
    """Every value with every tuning seed; none in a row that is not tuned."""
    reported: Mapping[str | None, tuple[Job, ...]]
    """By value; None is the only one in a row that is not tuned."""


def read_sweep(path: Path, seeds: Sequence[int] | None = None, rows: Sequence[str] | None = None) -> SweepFile:
    """The file, with other seeds and with the rows of these names alone where they are given.

    Raises:
        UserError: it cannot be read, a field is wrong, or there is no such row.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot be read: {reason}", field="SWEEP", value=path, mend="give a sweep's YAML") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"is not YAML: {' '.join(str(error).split())}", field="SWEEP", value=path) from None
    if not isinstance(raw, dict):
        mend = "write config, seeds and rows; benchmarks/sweeps holds examples"
        raise UserError("holds no sections", field="SWEEP", value=path, mend=mend)
    if seeds is not None:
        raw["seeds"] = list(seeds)
    try:
        sweep = SweepFile.model_validate(raw)
    except ValidationError as error:
        raise _explain(error) from None
    known = [row.name for row in sweep.rows]
    for name in rows or []:
        if name not in known:
            raise UserError("is no row of the sweep", field="--rows", value=name, mend=f"known: {', '.join(known)}")
    chosen = [row for row in sweep.rows if rows is None or row.name in rows]
    return sweep.model_copy(update={"rows": chosen})


def expand(sweep: SweepFile, overrides: Sequence[str] = ()) -> list[RowJobs]:
    """The runs of every row; `overrides` come last. Built-in data is prepared on the way, nothing is trained.

    Raises:
        UserError: with one line for each row that cannot be trained.
    """
    if not (ROOT / sweep.config).is_file():
        mend = "give a path relative to the root of the repository"
        raise UserError("no such configuration file", field="config", value=sweep.config, mend=mend)
    found, mistakes = [], []
    for row in sweep.rows:
        try:
            jobs = jobs_of(sweep, row, overrides)
            first = next(iter(jobs.reported.values()))[0]
            make_plan(first.config, row.kind, ensure_prepared(first.config).facts())
            found.append(jobs)
        except UserError as error:
            where = f"row {row.name!r}" if error.field is None else f"row {row.name!r}: {error.field}"
            mistakes.append(UserError(error.problem, field=where, value=error.value, mend=error.mend))
    if mistakes:
        raise UserError("\n".join(map(str, mistakes)))
    return found


def jobs_of(sweep: SweepFile, row: Row, overrides: Sequence[str] = ()) -> RowJobs:
    """The runs of one row; no data is looked at."""
    if not sweep.tunes(row):
        _check_free(["seed"], [*sweep.set, *row.set, *overrides])
        return RowJobs(row, (), {None: tuple(_job(sweep, row, None, seed, overrides) for seed in sweep.seeds)})
    assert sweep.tune is not None
    _check_free(["seed"], sweep.set)
    _check_free(["seed", sweep.tune.field], [*row.set, *overrides])
    values = [_as_yaml(value) for value in sweep.tune.values]
    tuning = tuple(_job(sweep, row, value, seed, overrides) for value in values for seed in sweep.tune.seeds)
    return RowJobs(
        row,
        tuning,
        {value: tuple(_job(sweep, row, value, seed, overrides) for seed in sweep.seeds) for value in values},
    )


def _job(sweep: SweepFile, row: Row, value: str | None, seed: int, overrides: Sequence[str]) -> Job:
    tuned = [] if value is None or sweep.tune is None else [f"{sweep.tune.field}={value}"]
    config = load_config(ROOT / sweep.config, [*sweep.set, *row.set, *tuned, f"seed={seed}", *overrides]).located()
    named = [] if value is None else [_slug(value)]
    # The digest keeps what an edited sweep file means away from the runs of the file as it was.
    folder = "-".join([row.slug, *named, f"seed{seed}", config.digest()[:10]])
    return Job(row.name, row.kind, value, seed, folder if row.kind == "blocks" else f"{folder}-e2e", config)


def _check_free(fields: Sequence[str], overrides: Sequence[str]) -> None:
    """Nobody else may set what the sweep itself sets."""
    for text in overrides:
        field = text.partition("=")[0]
        if field in fields:
            mend = "use --seeds, or the sweep's seeds" if field == "seed" else "give the row tune: false"
            raise UserError("is set by the sweep", field="set", value=text, mend=mend)


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def _explain(error: ValidationError) -> UserError:
    """The first mistake; an unknown key before others, for a misspelt one is missing as well."""
    mistakes = error.errors(include_url=False)
    first = next((one for one in mistakes if one["type"] == "extra_forbidden"), mistakes[0])
    field = ".".join(map(str, first["loc"])) or "SWEEP"
    if first["type"] == "extra_forbidden":
        return UserError("is not a known key", field=field, mend="the sweeps in benchmarks/sweeps show what there is")
    if first["type"] == "missing":
        return UserError("is required and was not given", field=field, mend=f"add {field} to the sweep")
    message = first["msg"].removeprefix("Value error, ")
    value = None if isinstance(first["input"], Mapping) else first["input"]
    return UserError(message[:1].lower() + message[1:], field=field, value=value)
