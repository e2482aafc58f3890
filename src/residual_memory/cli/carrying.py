"""What rows carry, as a user types it: for rows that come in, and for rows that are meant."""

import datetime
import difflib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import typer

from residual_memory.errors import InvalidInput
from residual_memory.exchange import Block
from residual_memory.memory import Memory
from residual_memory.memory.attributes import NEVER, as_seconds, attribute_columns

Owner = Annotated[
    str | None,
    typer.Option("--owner", metavar="NAME", help="Whose the rows are, where the data do not say.", show_default=False),
]
Expires = Annotated[
    str | None,
    typer.Option(
        "--expires",
        metavar="MOMENT",
        help="When to forget the rows, where the data do not say: 2027-01-31, or 30d or 12h from now.",
        show_default=False,
    ),
]
Tags = Annotated[
    list[str] | None,
    typer.Option("--tag", metavar="TAG", help="A tag of rows that have none; may be repeated.", show_default=False),
]
Owners = Annotated[
    list[str] | None,
    typer.Option("--owner", metavar="NAME", help="Rows of this owner; may be repeated.", show_default=False),
]
WithTags = Annotated[
    list[str] | None,
    typer.Option("--tag", metavar="TAG", help="Rows with this tag; may be repeated.", show_default=False),
]

_SECONDS = {"d": 86_400, "h": 3_600}
_MOMENT = "a moment such as 2027-01-31, 2027-01-31T12:00+01:00 (without a zone in UTC), 30d or 12h"


@dataclass(frozen=True)
class Given:
    """What the rows of a call carry where the data do not say it themselves."""

    owner: str | None = None
    expires: int | None = None
    tags: tuple[str, ...] = ()

    @staticmethod
    def checked(owner: str | None, expires: str | None, tags: Sequence[str] | None) -> "Given":
        """What the options say.

        Raises
        ------
        InvalidInput : if a value is none that a row can carry.
        """
        if owner == "":
            raise InvalidInput("--owner is empty, expected a name; leave it out for rows of nobody")
        attribute_columns(1, owners=owner, expires=None, tags=tags, snippets=None)
        return Given(owner, None if expires is None else moment_of("--expires", expires), tuple(tags or ()))

    @property
    def options(self) -> dict[str, bool]:
        """The options, and whether each is given."""
        return {"--owner": self.owner is not None, "--expires": self.expires is not None, "--tag": bool(self.tags)}

    def marked(self, block: Block) -> Block:
        """The block whose rows carry that too, where they carry nothing of the kind."""
        n = len(block)
        changes: dict[str, Any] = {}
        if self.owner is not None:
            changes["owners"] = [owner or self.owner for owner in block.owners or [""] * n]
        if self.expires is not None:
            known = np.full(n, NEVER) if block.expires is None else block.expires
            changes["expires"] = np.where(known == NEVER, self.expires, known)
        if self.tags:
            changes["tags"] = [tags or self.tags for tags in block.tags or [()] * n]
        return replace(block, **changes)


def moment_of(option: str, text: str) -> int:
    """Seconds since 1970 of a date, of a date with a time, or of a time from now.

    Raises
    ------
    InvalidInput : if it is none.

    Examples
    --------
    >>> moment_of("--expires", "2027-01-31")
    1801353600
    """
    try:
        if ahead := re.fullmatch(r"(\d{1,18})([dh])", text.strip()):
            return as_seconds(int(time.time()) + int(ahead[1]) * _SECONDS[ahead[2]])
        moment = datetime.datetime.fromisoformat(text.strip())
        return as_seconds(moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC))
    except ValueError:  # InvalidInput too
        raise InvalidInput(f"{option} is {text!r}, expected {_MOMENT}") from None


def moment_text(seconds: int) -> str:
    """A moment for people."""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:,} s after 1970"


# ---------------------------------------------------------------------- rows that are meant


def where_of(
    memory: Memory,
    *,
    owners: Sequence[str] | None = None,
    tags: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    expired: bool = False,
) -> dict[str, Any]:
    """Conditions as `Memory.find` takes them; none for what is not given.

    Raises
    ------
    InvalidInput : if a group or a label is none that the memory can have.
    """
    where: dict[str, Any] = {}
    if owners:
        where["owner"] = list(owners)
    if tags:
        where["tag"] = list(tags)
    if groups:
        where["group"] = as_kind("group", groups, memory.snapshot.manifest.group_kind, memory)
    if labels and memory.layout.task == "regression":
        raise InvalidInput(f"{memory.path} is of a regression, whose rows have no label; leave --label out")
    if labels:
        where["label"] = [_label(text, memory) for text in labels]
    if expired:
        where["expired"] = True
    return where


def as_kind(what: str, wanted: Sequence[str], kind: str | None, memory: Memory) -> list[Any]:
    """Ids or groups as the memory has them: integers or strings."""
    if kind != "integer":
        return list(wanted)
    for text in wanted:
        if not re.fullmatch(r"\s*-?[0-9]{1,19}\s*" if what == "group" else r"\s*[0-9]{1,19}\s*", text):
            numbers = "whole numbers" if what == "group" else "whole numbers from 0"
            raise InvalidInput(f"{text!r} is not {_WITH_ARTICLE[what]} of {memory.path}, whose {what}s are {numbers}")
    return [int(text) for text in wanted]


_WITH_ARTICLE = {"id": "an id", "group": "a group"}


def _label(text: str, memory: Memory) -> int:
    """A class by its name or its number."""
    names = memory.class_names or ()
    if text in names:
        return names.index(text)
    if re.fullmatch(r"[0-9]{1,9}", text) and int(text) < memory.layout.n_outputs:
        return int(text)
    close = difflib.get_close_matches(text, names, 1, 0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    known = f"a number below {memory.layout.n_outputs:,}" + (" or the name of a class" if names else "")
    raise InvalidInput(f"--label is {text!r}, expected {known}{hint}")


def meant(memory: Memory, where: dict[str, Any]) -> str:
    """A question whether an owner or a tag that is there is meant by one that is not; "" where all are there."""
    held = memory.inventory()
    for name, there in (("owner", held.owners), ("tag", held.tags)):
        for text in where.get(name, ()):
            close = difflib.get_close_matches(text, list(there), 1, 0.5)
            if text not in there and close:
                return f"no row has the {name} {text!r}; did you mean {close[0]!r}?"
    return ""
