"""Writes docs/configuration.md from the configuration's own classes: every field, its default and what it is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dbtrain import model_config
from dbtrain.config import RunConfig
from dbtrain.model_config import ModelConfig

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
FAMILIES = ("vit", "dit", "causal_lm", "recurrent_lm", "masked_lm")
HEAD = """# Configuration

Every field of a configuration file, with its default. Unknown fields are refused, with the nearest one that there is.
`--set SECTION.FIELD=VALUE` overrides any of them on the command line; `configs/` has complete files.
`python benchmarks/configuration_page.py` writes this page from the classes that check a configuration.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    sections: list[tuple[str, type[BaseModel]]] = []
    alone = []
    for name, field in RunConfig.model_fields.items():
        if name == "model":
            continue
        section = _section(field.annotation)
        if section is None:
            alone.append(_row(name, field))
        else:
            sections.append((name, section))
    parts.append(_table("## At the top", "", alone))
    parts.append("## `model`\n\nA family has the fields that stand under its name.\n")
    for families, kinds in _kinds().items():
        shared = families == FAMILIES
        rows = [
            _row(f"model.{name}", field)
            for kind in kinds
            for name, field in kind.model_fields.items()
            if name in inspect.get_annotations(kind) and (kind is ModelConfig or name != "family")
        ]
        names = "all families" if shared else ", ".join(f"`{name}`" for name in families)
        parts.append(_table(f"### {names}", "" if shared else inspect.getdoc(kinds[-1]) or "", rows))
    for name, section in sections:
        parts.append(_table(f"## `{name}`", inspect.getdoc(section) or "", list(_rows(name, section))))
    others = [
        f"- `{family}`: {', '.join(_settings(defaults))}"
        for family in FAMILIES
        if (defaults := model_config.config_class(family).defaults)
    ]
    parts.append("## Defaults that a family changes\n\n" + "\n".join(others) + "\n")
    return "\n".join(parts)


def _kinds() -> dict[tuple[str, ...], list[type[ModelConfig]]]:
    """Families, most of them first, and the classes of the section `model` that these and no others have."""
    users: dict[type[ModelConfig], tuple[str, ...]] = {}
    for family in FAMILIES:
        for kind in reversed(model_config.config_class(family).__mro__):
            if issubclass(kind, ModelConfig):
                users[kind] = (*users.get(kind, ()), family)
    found: dict[tuple[str, ...], list[type[ModelConfig]]] = {}
    for kind, families in users.items():
        found.setdefault(families, []).append(kind)
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _section(annotation: Any) -> type[BaseModel] | None:
    """The class of a nested section, optional ones included."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _rows(prefix: str, section: type[BaseModel]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        nested = _section(field.annotation)
        if nested is None or field.default is None:
            yield _row(f"{prefix}.{name}", field)
        if nested is not None:
            yield from _rows(f"{prefix}.{name}", nested)


def _row(name: str, field: Any) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    shown = "has to be given" if default is PydanticUndefined else f"`{_text(default)}`"
    if get_origin(field.annotation) is Literal:
        shown += "".join(f", `{choice}`" for choice in get_args(field.annotation) if choice != default)
    about = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"| `{name}` | {shown} | {about} |"


def _table(head: str, about: str, rows: list[str]) -> str:
    said = f"{' '.join(about.split())}\n\n" if about else ""
    return f"{head}\n\n{said}| field | default, other values | what it is |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _text(value: Any) -> str:
    """As YAML has it."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _settings(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"`{prefix}{name}: {_text(value)}`"


if __name__ == "__main__":
    PAGE.write_text(page())
