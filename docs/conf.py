"""Sphinx: MyST pages and an API reference from the docstrings. Build with `sphinx-build -W docs docs/_build/html`."""

import re
from collections.abc import Iterator
from typing import Any

from residual_memory import __version__

project = "residual-memory"
author = "The residual-memory developers"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"residual-memory {__version__}"
pygments_style = "friendly"
myst_heading_anchors = 3

default_role = "literal"  # in docstrings a single backtick is enough for code
add_module_names = False
autodoc_typehints = "none"  # shapes are read in the signatures of the source; here they would bury the names
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}

_SECTION = re.compile(r"^(Parameters|Attributes|Returns|Raises|References|Examples)$")
_ENTRY = re.compile(r"^(\S[^:]*?) : (.*)$")


def _sections(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The parts of a docstring under their underlined titles; the first part has none."""
    title, body = "", list[str]()
    for place, line in enumerate(lines):
        following = lines[place + 1] if place + 1 < len(lines) else ""
        if _SECTION.match(line) and following.startswith("---"):
            yield title, body
            title, body = line, []
        elif not (line.startswith("---") and not body):
            body.append(line)
    yield title, body


def _as_entries(body: list[str]) -> list[str]:
    """`name : text` lines, with what is indented under them, as a list."""
    written = []
    for line in body:
        entry = _ENTRY.match(line)
        if entry:
            written += ["", f"* ``{entry[1]}``: {entry[2]}"]
        else:
            written.append(f"  {line.strip()}" if line.strip() else "")
    return written


def house_style(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """From the source's docstrings to reStructuredText: titled sections, entries with their text on the same line."""
    if what == "module":
        lines[:] = []  # the pages introduce the modules
        return
    written: list[str] = []
    for title, body in _sections([line if "`" in line else line.replace("|", "\\|") for line in lines]):
        if title:
            written += ["", f".. rubric:: {title}", ""]
        written += _as_entries(body) if title in ("Parameters", "Attributes", "Raises") else body
    lines[:] = [*written, ""]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", house_style)
