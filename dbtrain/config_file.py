"""Reading a `RunConfig`: YAML in, dotted overrides, and one clear sentence about the first mistake."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.model_config import ModelConfig, config_class


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply overrides of the form `a.b=value` (the value is YAML), validate.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, or a value has the wrong type or range.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            "no such configuration file", field="CONFIG", value=str(path), mend="give the YAML file of a run"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"cannot be read: {reason}", field="CONFIG", value=str(path), mend="give the YAML file of a run"
        ) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: PyYAML's answer to a date such as 2026-99-99
        raise UserError(f"is not YAML: {' '.join(str(error).split())}", field="CONFIG", value=str(path)) from None
    if not isinstance(raw, dict):
        problem = "is empty" if raw is None else f"holds a {type(raw).__name__}, not sections"
        mend = "write sections such as model and training; configs/demo/vit.yaml is an example"
        raise UserError(problem, field="CONFIG", value=str(path), mend=mend)
    for text in overrides:
        _apply_override(raw, text)
    return parse_config(raw)


def parse_config(raw: Mapping[str, Any]) -> RunConfig:
    """Validate plain data. Raises UserError with the first mistake: its field, its value and the mend."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, raw) from None


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Lines `field: ours -> theirs` for every leaf in which two nested mappings differ."""
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}: {a!r} -> {b!r}"


def _apply_override(raw: dict[str, Any], text: str) -> None:
    dotted, equals, value = text.partition("=")
    *parents, leaf = dotted.split(".")
    if not equals or not leaf or not all(parents):
        raise UserError(
            "is not of the form section.field=value", field="--set", value=text, mend="write training.steps=500"
        )
    target = raw
    for name in parents:
        child = target.setdefault(name, {})
        if child is None:
            child = target[name] = {}
        if not isinstance(child, dict):
            raise UserError(f"{name} is a value, not a section", field="--set", value=text)
        target = child
    try:
        target[leaf] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        raise UserError("the value is not YAML", field="--set", value=text) from None


def _explain(error: ValidationError, raw: Mapping[str, Any]) -> UserError:
    """The first mistake of a pydantic error as one sentence; an unknown key gets the nearest known one."""
    mistakes = error.errors(include_url=False)
    # A misspelt required key is both unknown and missing; only the former says what to do.
    unknown = ("extra_forbidden", "invalid_key")
    first = next((one for one in mistakes if one["type"] in unknown), mistakes[0])
    path = [" ".join(str(part).split()) for part in first["loc"]]
    field = ".".join(path) or None
    if first["type"] in unknown:
        known = _known_keys(path[:-1], raw)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        mend = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
        return UserError("is not a known key", field=field, mend=mend)
    if first["type"] == "missing":
        return UserError("is required and was not given", field=field, mend=f"add {field} to the configuration")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("model_type", "model_attributes_type"):
        message = f"has to be a section with keys such as {', '.join(_known_keys(path, raw)[:3])}"
    value = None if isinstance(first["input"], Mapping) else first["input"]
    return UserError(message[:1].lower() + message[1:], field=field, value=value)


def _known_keys(path: Sequence[str], raw: Mapping[str, Any]) -> list[str]:
    section: type[BaseModel] = RunConfig
    for name in path:
        if name not in section.model_fields:
            return []
        if section is RunConfig and name == "model":
            section = _model_section(raw)
            continue
        annotation = section.model_fields[name].annotation
        options = [annotation, *get_args(annotation)]
        section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(section.model_fields)


def _model_section(raw: Mapping[str, Any]) -> type[BaseModel]:
    """The class of the section `model`, which depends on the family; what all have in common where it is unknown."""
    model = raw.get("model")
    try:
        return config_class(model.get("family", "vit") if isinstance(model, Mapping) else "vit")
    except ValueError:
        return ModelConfig
