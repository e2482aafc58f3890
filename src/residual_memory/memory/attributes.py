"""What rows may carry beside the numbers: whose they are, until when, tags, and a snippet of what they were made of.

A text column lies in a segment as the bytes of all rows, one after the other, and where each row ends. A segment whose
rows carry nothing has no such column.
"""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt8
from numpy import ndarray

from residual_memory.errors import CorruptFile, InvalidInput

NEVER = int(np.iinfo(np.int64).max)
TEXTS = ("owners", "tags", "snippets")
ENDS = "_ends"
EXPIRES = "expires"
SEPARATOR = "\n"  # of tags, before and after each

Columns = Mapping[str, ndarray]


@dataclass(frozen=True)
class Texts:
    """A text for each row.

    Attributes
    ----------
    flat : the bytes of all rows in UTF-8, one after the other.
    ends : where each row's end.
    """

    flat: UInt8[ndarray, " bytes"]
    ends: Int64[ndarray, " n"]

    def __len__(self) -> int:
        return len(self.ends)

    @staticmethod
    def of(values: Sequence[str]) -> "Texts":
        """Texts of these strings."""
        coded = [value.encode() for value in values]
        ends = np.cumsum([len(value) for value in coded], dtype=np.int64)
        return Texts(np.frombuffer(b"".join(coded), np.uint8), ends)

    @staticmethod
    def none(n: int) -> "Texts":
        """Of rows that carry nothing; takes no room."""
        return Texts(np.zeros(0, np.uint8), np.broadcast_to(np.int64(0), n))

    @staticmethod
    def joined(parts: Sequence["Texts"]) -> "Texts":
        """The rows of all, in order."""
        shifts = np.cumsum([0, *(len(part.flat) for part in parts)], dtype=np.int64)
        ends = [part.ends + shift for part, shift in zip(parts, shifts, strict=False)]
        return Texts(np.concatenate([part.flat for part in parts]), np.concatenate(ends))

    @property
    def starts(self) -> Int64[ndarray, " n"]:
        """Where each row's bytes begin."""
        return np.concatenate([np.zeros(1, np.int64), self.ends])[:-1]

    def take(self, rows: Int64[ndarray, " b"]) -> "Texts":
        """The texts of these rows."""
        starts = np.where(rows > 0, self.ends[np.maximum(rows - 1, 0)], 0)
        lengths = self.ends[rows] - starts
        ends = np.cumsum(lengths)
        places = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
        return Texts(self.flat[places], ends)

    def decoded(self) -> list[str]:
        """The strings.

        Raises
        ------
        CorruptFile : if they are not what was stored.
        """
        content, ends = self.flat.tobytes(), self.ends.tolist()
        try:
            return [content[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]
        except UnicodeDecodeError as error:
            raise CorruptFile(f"a text of a row is none: {error}") from error

    def equal_to(self, value: str) -> Bool[ndarray, " n"]:
        """Which rows have just this text."""
        wanted = np.frombuffer(value.encode(), np.uint8)
        equal = self.ends - self.starts == len(wanted)
        rows = np.flatnonzero(equal)
        if len(wanted) and len(rows):
            equal[rows] = (self.flat[self.starts[rows, None] + np.arange(len(wanted))] == wanted).all(axis=1)
        return equal

    def having(self, tag: str) -> Bool[ndarray, " n"]:
        """Which rows have the tag."""
        found = np.zeros(len(self), bool)
        if not tag or SEPARATOR in tag:
            return found
        content, wanted = self.flat.tobytes(), f"{SEPARATOR}{tag}{SEPARATOR}".encode()
        place = content.find(wanted)
        while place >= 0:
            found[np.searchsorted(self.ends, place, side="right")] = True
            place = content.find(wanted, place + 1)
        return found


@dataclass(frozen=True)
class Attributes:
    """What some rows carry.

    Attributes
    ----------
    owners : whose each row is; "" where nobody said.
    expires : seconds since 1970 from which a row should be forgotten; `NEVER` where nobody said.
    tags : of each row.
    snippets : of what each row was made of; "" where nobody said.
    """

    owners: list[str]
    expires: Int64[ndarray, " b"]
    tags: list[tuple[str, ...]]
    snippets: list[str]


def attribute_columns(
    n: int,
    *,
    owners: str | Sequence[str] | None,
    expires: Any,
    tags: Sequence[str] | Sequence[Sequence[str]] | None,
    snippets: Sequence[str] | None,
) -> dict[str, ndarray]:
    """The columns of what n rows carry, as `Memory.append` takes it; none for what is not given.

    Raises
    ------
    InvalidInput : if there is not one for each row, or it is of another type.
    """
    columns: dict[str, ndarray] = {}
    if owners is not None:
        columns |= _text_column("owners", [owners] * n if isinstance(owners, str) else _strings("owners", owners, n))
    if expires is not None:
        columns[EXPIRES] = _seconds(expires, n)
    if tags is not None:
        columns |= _text_column("tags", [_tag_text(some) for some in _tag_lists(tags, n)])
    if snippets is not None:
        columns |= _text_column("snippets", _strings("snippets", snippets, n))
    return columns


def texts_in(table: Columns, name: str, n: int) -> Texts:
    """The texts of a segment's n rows.

    Raises
    ------
    CorruptFile : if the ends are not those of n texts.
    """
    if name not in table:
        return Texts.none(n)
    texts = Texts(table[name], table[name + ENDS])
    ends = texts.ends
    if len(ends) and (ends[0] < 0 or ends[-1] != len(texts.flat) or (ends[1:] < ends[:-1]).any()):
        raise CorruptFile(f"the column {name!r} does not end where its rows do")
    return texts


def expires_in(table: Columns, n: int) -> Int64[ndarray, " n"]:
    """When a segment's n rows expire."""
    return table[EXPIRES] if EXPIRES in table else np.broadcast_to(np.int64(NEVER), n)


def carried(tables: Sequence[Columns], rows: Sequence[Int64[ndarray, " _"]]) -> dict[str, ndarray]:
    """The columns of what these rows of each table carry, joined; none of what no table has."""
    columns: dict[str, ndarray] = {}
    counts = [len(table["ids"]) for table in tables]
    if any(EXPIRES in table for table in tables):
        parts = [expires_in(table, n)[some] for table, n, some in zip(tables, counts, rows, strict=True)]
        columns[EXPIRES] = np.concatenate(parts)
    for name in TEXTS:
        if any(name in table for table in tables):
            texts = [texts_in(table, name, n).take(some) for table, n, some in zip(tables, counts, rows, strict=True)]
            joined = Texts.joined(texts)
            columns |= {name: joined.flat, name + ENDS: joined.ends}
    return columns


def is_attribute(name: str) -> bool:
    """Whether a column is of what rows carry."""
    return name == EXPIRES or name.removesuffix(ENDS) in TEXTS


def tags_of(text: str) -> tuple[str, ...]:
    """The tags in a stored text."""
    return tuple(tag for tag in text.split(SEPARATOR) if tag)


def as_seconds(moment: Any) -> int:
    """A moment, as a number of seconds since 1970 or as a datetime, which needs a time zone.

    Raises
    ------
    InvalidInput : if it is none.
    """
    if isinstance(moment, datetime.datetime):
        if moment.tzinfo is None:
            raise InvalidInput(f"{moment.isoformat()} has no time zone; use datetime.now(timezone.utc), for example")
        moment = moment.timestamp()
    if isinstance(moment, bool | np.bool_) or not isinstance(moment, int | float | np.integer | np.floating):
        raise InvalidInput(f"{moment!r} is no moment, expected a datetime or seconds since 1970")
    if not 0 <= moment <= NEVER:
        raise InvalidInput(f"{moment!r} is no moment, expected seconds since 1970")
    return min(int(moment), NEVER)


def _seconds(expires: Any, n: int) -> Int64[ndarray, " n"]:
    if isinstance(expires, ndarray):
        expires = expires.tolist()
    several = isinstance(expires, Sequence)
    values = [as_seconds(moment) for moment in expires] if several else [as_seconds(expires)] * n
    if len(values) != n:
        raise InvalidInput(f"expires has {len(values):,} moments for {n:,} rows")
    return np.array(values, np.int64)


def _listed(name: str, values: Any) -> list[Any]:
    try:
        return list(values.tolist() if isinstance(values, ndarray) else values)
    except TypeError:
        raise InvalidInput(f"{name} holds {values!r}, expected a list of strings") from None


def _strings(name: str, values: Any, n: int) -> list[str]:
    listed = _listed(name, values)
    if isinstance(values, str) or len(listed) != n:
        raise InvalidInput(f"{name} has {len(listed):,} entries, expected a string for each of {n:,} rows")
    for value in listed:
        if not isinstance(value, str):
            raise InvalidInput(f"{name} holds {value!r}, expected strings")
    return listed


def _tag_lists(tags: Any, n: int) -> Iterator[Sequence[str]]:
    if isinstance(tags, str):
        raise InvalidInput(f"tags is the string {tags!r}, expected a list of tags, or one list a row")
    listed = _listed("tags", tags)
    if all(isinstance(tag, str) for tag in listed):
        return iter([listed] * n)
    if len(listed) != n or any(isinstance(some, str) for some in listed):
        raise InvalidInput(f"tags has {len(listed):,} entries, expected a list of tags for each of {n:,} rows")
    return (_listed("tags", some) for some in listed)


def _tag_text(tags: Sequence[str]) -> str:
    for tag in tags:
        if not isinstance(tag, str) or not tag or SEPARATOR in tag:
            raise InvalidInput(f"{tag!r} is no tag, expected a string without line breaks that is not empty")
    return "".join(f"{SEPARATOR}{tag}{SEPARATOR}" for tag in dict.fromkeys(tags))


def _text_column(name: str, values: Sequence[str]) -> dict[str, ndarray]:
    try:
        texts = Texts.of(values)
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{name} holds what is no text: {error}") from None
    return {name: texts.flat, name + ENDS: texts.ends}
