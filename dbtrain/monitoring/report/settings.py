"""A configuration beside the defaults: what somebody chose, and what they left as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dbtrain.config import RunConfig


@dataclass(frozen=True)
class Setting:
    """One field of a configuration."""

    field: str
    """Dotted name, as `--set` takes it."""
    value: str
    default: str | None
    """Of the run's family; None where there is none and a value has to be given."""
    about: str
    """What the field is."""

    @property
    def chosen(self) -> bool:
        """Whether it is not what one gets without a word."""
        return self.value != self.default


def settings(config: RunConfig) -> list[Setting]:
    """Every field, in the order of the configuration."""
    return list(_of(config, "", type(config.model).defaults))


def _of(section: BaseModel, prefix: str, family: dict[str, Any]) -> Iterator[Setting]:
    """The fields of `section`; `family` holds the defaults that go before the general ones."""
    for name, field in type(section).model_fields.items():
        value, own = getattr(section, name), family.get(name)
        if isinstance(value, BaseModel):
            yield from _of(value, f"{prefix}{name}.", own if isinstance(own, dict) else {})
            continue
        default = own if name in family else field.get_default(call_default_factory=True, validated_data={})
        text = None if default is PydanticUndefined else _text(default)
        yield Setting(prefix + name, _text(value), text, " ".join((field.description or "").split()))


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_text(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "none"
    return str(value)
