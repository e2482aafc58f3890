"""What people see of data: text that does nothing but appear, sizes, and small tables for notebooks."""

import html
import unicodedata
from collections.abc import Sequence

CELL_WIDTH = 80  # characters of a cell that a notebook shows
_UNSHOWN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # controls, bidi marks, lone surrogates, line separators


def shown(value: object, width: int | None = None) -> str:
    r"""Text that does nothing but appear: one line, with control characters as escapes.

    Parameters
    ----------
    value : anything with a str().
    width : longest text; what is longer ends in "…".

    Examples
    --------
    >>> shown("red \x1b[31mcat")
    'red \\x1b[31mcat'
    """
    text = "".join(_escaped(character) for character in str(value))
    return text if width is None or len(text) <= width else text[: width - 1] + "…"


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _UNSHOWN:
        return character
    return character.encode("unicode_escape").decode("ascii")


def size_text(n_bytes: float | int) -> str:
    """Bytes in the largest decimal unit that leaves at least 1.

    Examples
    --------
    >>> size_text(1_234_567_890), size_text(512)
    ('1.2 GB', '512 bytes')
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes:.0f} bytes"


def time_text(seconds: float) -> str:
    """Seconds, in the unit that a person would use.

    Examples
    --------
    >>> time_text(0.3), time_text(90.0), time_text(4e3), time_text(9e5)
    ('0.3 s', '90 s', '66.7 min', '10.4 days')
    """
    for unit, scale, least in (("days", 86_400, 172_800), ("h", 3600, 7200), ("min", 60, 120)):
        if seconds >= least:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds:.{3 if seconds >= 100 else 2}g} s"


def html_table(caption: str, rows: Sequence[Sequence[object]], header: Sequence[str] = ()) -> str:
    """A small table for `_repr_html_`: escaped, without scripts or colours of its own.

    Notebooks style the class "dataframe" themselves, dark or light. Cells under a header are set to the right, as
    numbers are, and without one to the left, as text is.

    Parameters
    ----------
    caption : a line above the table.
    rows : cells, of which the first names its row.
    header : names of the columns.

    Examples
    --------
    >>> html_table("Two", [("rows", 3)])
    '<div><div>Two</div><table class="dataframe"><tbody><tr><th style="text-align:left">rows</th>...
    """
    side = "right" if header else "left"
    sides = ["left", *[side] * max((len(row) - 1 for row in rows), default=len(header))]
    head = "".join(_cell("th", name, place) for name, place in zip(header, sides, strict=False))
    body = "".join(
        f"<tr>{''.join(_cell('td' if n else 'th', cell, sides[n]) for n, cell in enumerate(row))}</tr>" for row in rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if header else ""
    return (
        f"<div><div>{html.escape(shown(caption))}</div>"
        f'<table class="dataframe">{head}<tbody>{body}</tbody></table></div>'
    )


def _cell(kind: str, value: object, side: str) -> str:
    text = html.escape(shown(f"{value:.4g}" if isinstance(value, float) else value, CELL_WIDTH))
    return f'<{kind} style="text-align:{side}">{text.replace("  ", 2 * "&nbsp;")}</{kind}>'  # indented as it came
