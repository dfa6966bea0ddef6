"""A report as a program reads it: what each section says, and everything that a browser could load or run."""

from __future__ import annotations

from html.parser import HTMLParser

_EMPTY = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """Parsed HTML."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        """(tag, name, value)."""
        self.ids: list[str] = []
        self.tables: dict[str, list[list[list[str]]]] = {}
        """Rows of cells of each table, by section."""
        self.words: dict[str, str] = {}
        """All text of a section; that outside is under the empty name."""
        self._section = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def rows(self, section: str, table: int = 0) -> dict[str, list[str]]:
        """A table's rows by their first cell."""
        return {row[0]: row[1:] for row in self.tables[section][table]}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take in a tag."""
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in _EMPTY:
            self._open.append(tag)
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
        elif tag == "table":
            self.tables.setdefault(self._section, []).append([])
        elif tag == "tr":
            self.tables[self._section][-1].append([])
        elif tag in ("td", "th"):
            self.tables[self._section][-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take in a tag of SVG that ends itself."""
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        """Every tag ends in its turn."""
        assert self._open.pop() == tag, tag
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        """Take in text."""
        self.words[self._section] = self.words.get(self._section, "") + data
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[self._section][-1][-1][-1] += data


def assert_harmless(page: Page) -> None:
    """Nothing runs, nothing is loaded, and no link leaves the page or goes nowhere."""
    assert not {"script", "iframe", "object", "embed", "link", "form", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name != "style", tag
        if name in ("href", "src", "xlink:href", "srcset", "action"):
            inside = value.startswith("data:image/png;base64,") if tag == "img" else value[1:] in page.ids
            assert inside, (tag, name, value)
    [policy] = [v for t, n, v in page.attributes if (t, n) == ("meta", "content") and "default-src" in v]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
