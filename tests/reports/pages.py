"""A report as a browser takes it: its tags, what it asks for, and its text."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

LINKS = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")


@dataclass
class Page:
    """What a page is made of.

    Attributes
    ----------
    tags : all of them.
    links : what it would fetch, or go to.
    handlers : attributes that would run something.
    text : of the elements, those that CSS is in left out.
    lines : the text element by element.
    """

    tags: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    handlers: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.lines).split())

    @property
    def pictures(self) -> list[str]:
        return [link for link in self.links if link.startswith("data:image/png;base64,")]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.page.tags.append(tag)
        self.page.links += [value or "" for name, value in attrs if name in LINKS]
        self.page.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        if self.page.tags and self.page.tags[-1] != "style" and data.strip():
            self.page.lines.append(data.strip())


def read(text: str) -> Page:
    """The page, which is seen to run nothing and to ask for nothing from outside."""
    reader = _Reader()
    reader.feed(text)
    page = reader.page
    assert not {"script", "iframe", "object", "embed", "link", "form", "base"} & set(page.tags)
    assert not page.handlers
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert "url(" not in text.replace("url(#", "")
    assert "@import" not in text
    return page
