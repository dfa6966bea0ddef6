"""docs/deploy.md names every file of `cluster/` and `launch/`, and the values in them that a user has to change."""

from __future__ import annotations

import re

import pytest
from deployment import ROOT, SCRIPTS, complaints, text

GUIDE = "docs/deploy.md"
ROWS = {
    name: re.findall(r"`([^`]+)`", values)
    for name, values in re.findall(r"(?m)^\| \[`(.+?)`\]\(.+?\) \|.+?\| (.+) \|$", text(GUIDE))
}
FOLDERS = (ROOT / "cluster", ROOT / "launch")
FILES = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_named(name: str) -> None:
    assert f"`{name}`" in text(GUIDE)


@pytest.mark.parametrize("name", ROWS)
def test_values_to_change(name: str) -> None:
    values = ROWS[name]
    assert 2 <= len(values) <= 4
    content = text(name)
    for value in values:
        assert re.search(rf"(?<![\w-]){re.escape(value)}(?![\w-])", content), value
    marked = set(re.findall(r"(?:ami-)?CHANGE-ME(?:-[a-z]+)*", content))
    assert marked <= set(values), "a value that has to be changed, and the guide does not say so"


def test_links() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text(GUIDE)):
        assert (ROOT / "docs" / target).exists(), target


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck(name: str) -> None:
    assert complaints("shellcheck", name) == ""
    assert (ROOT / name).stat().st_mode & 0o111


def test_nothing_turns_authentication_off() -> None:
    for name in FILES:
        assert not re.search(r"AUTH_MODE\W+disabled|mode: disabled", text(name)), name
