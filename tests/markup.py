"""HTML of our pages, parsed and checked."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from urllib.parse import urlsplit

EMPTY = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}  # have no end tag


class Page(HTMLParser):
    """The elements and the words of a page, each end tag with its start."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag}: an attribute twice"
        if tag not in EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, *tags: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag in tags]

    def check(self) -> None:
        """Assert that the page is safe under its policy, and fit for a screen reader."""
        ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        assert len({*ids}) == len(ids), f"an id twice: {sorted(ids)}"
        assert all(urlsplit(script["src"]).path == "/static/live.js" for script in self.all("script"))
        assert not self.all("style", "iframe", "object", "embed", "base")
        for tag, attributes in self.elements:
            assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
            for name in ("aria-labelledby", "aria-describedby", "for", "list"):
                assert {*attributes.get(name, "").split()} <= {*ids}, (tag, attributes)
        labelled = {label["for"] for label in self.all("label")}
        for field in self.all("input", "select", "textarea"):
            assert field.get("type") == "hidden" or field["id"] in labelled, field
        assert all("alt" in image for image in self.all("img"))
        levels = [int(tag[1]) for tag, _ in self.elements if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(later <= earlier + 1 for earlier, later in pairwise(levels)), levels
        assert all("scope" in head for head in self.all("th"))
        assert [element["lang"] for element in self.all("html")] == ["en"]
        assert {"main", "title"} <= {tag for tag, _ in self.elements}
