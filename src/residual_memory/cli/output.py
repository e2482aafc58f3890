"""One way to print: tables for people or one JSON object on stdout, all the rest on stderr.

Labels, ids and file names come from data: they are shown with control characters escaped, and no markup in them counts.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from residual_memory.display import shown

CELL_WIDTH = 48  # characters of a name that a table shows


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: Sequence[str] = ()) -> Table:
    """A plain table; the columns named in `numbers` are set to the right."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in header:
        right = name in numbers
        made.add_column(Text(name), justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in rows:
        made.add_row(*(Text(shown(cell, CELL_WIDTH)) for cell in row))
    return made


def facts(rows: Sequence[tuple[str, object]]) -> Table:
    """Names and values in two columns, without a header."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(Text(name), Text(shown(value)))
    return made


def report(result: Mapping[str, Any], *parts: str | Text | Table, as_json: bool) -> None:
    """Print a command's result: the parts for people, or the mapping as JSON."""
    if as_json:
        sys.stdout.write(json.dumps(plain(result), indent=2, allow_nan=False) + "\n")
        return
    console = Console(file=sys.stdout, markup=False, highlight=False, emoji=False)
    for part in parts:
        console.print(Text(shown(part)) if isinstance(part, str) else part, soft_wrap=isinstance(part, Text))


def unbroken(text: str) -> Text:
    """A line that is not wrapped at the width of the terminal: a command, to be copied in one piece."""
    return Text(shown(text))


def note(text: str) -> None:
    """Say something on the side."""
    print(shown(text), file=sys.stderr, flush=True)


def plain(value: Any) -> Any:
    """The same in JSON's own types; a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
