"""Which rows are meant by what they carry, and what a memory holds of whom."""

import difflib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64
from numpy import ndarray

from residual_memory.errors import InvalidInput
from residual_memory.memory.attributes import NEVER, as_seconds, tags_of
from residual_memory.memory.snapshot import Snapshot

CONDITIONS = ("owner", "tag", "group", "label", "expired")

Where = Mapping[str, Any]


@dataclass(frozen=True)
class Inventory:
    """What a memory holds, and of whom; forgotten rows are left out.

    Attributes
    ----------
    rows, forgotten : rows in use, and rows that are masked but not yet erased.
    owners, tags, labels : how many rows each has, most first; "" is the owner of rows of which nobody said one.
        Labels are those of a classification.
    groups : how many there are.
    expired : rows past their moment, which `forget(where={"expired": True})` forgets.
    next_expiry : the first moment to come, in seconds since 1970; None where no row expires.
    snippets : rows that carry one.
    """

    rows: int
    forgotten: int
    owners: Mapping[str, int]
    tags: Mapping[str, int]
    labels: Mapping[int, int]
    groups: int
    expired: int
    next_expiry: int | None
    snippets: int


def matching(snapshot: Snapshot, where: Where) -> Int64[ndarray, " m"]:
    """The rows in use that meet all conditions, ascending.

    Raises
    ------
    InvalidInput : if a condition is none, or there is no condition at all.
    """
    if not isinstance(where, Mapping) or not where:
        raise InvalidInput(f"where is {where!r}, expected a dict of conditions such as {{'owner': 'alice'}}")
    met = snapshot.alive.copy()
    for name, wanted in where.items():
        if name not in CONDITIONS:
            close = difflib.get_close_matches(str(name), CONDITIONS, 1, 0.5)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InvalidInput(f"where has the condition {name!r}, expected {' or '.join(map(repr, CONDITIONS))}{hint}")
        met &= _met(snapshot, name, wanted)
    return np.flatnonzero(met)


def inventory(snapshot: Snapshot) -> Inventory:
    """Count what the rows in use carry."""
    alive = np.flatnonzero(snapshot.alive)
    tags: Counter[str] = Counter()
    for text, count in Counter(snapshot.texts("tags").take(alive).decoded()).items():
        for tag in tags_of(text):
            tags[tag] += count
    owners = Counter(snapshot.texts("owners").take(alive).decoded())
    expires = snapshot.expires[alive]
    now = int(time.time())
    to_come = expires[(expires > now) & (expires < NEVER)]
    snippets = snapshot.texts("snippets").take(alive)
    groups = snapshot.all_groups
    return Inventory(
        rows=len(snapshot),
        forgotten=len(snapshot.forgotten),
        owners=dict(owners.most_common()),
        tags=dict(tags.most_common()),
        labels=_label_counts(snapshot, alive),
        groups=0 if groups is None else len(np.unique(groups[alive])),
        expired=int((expires <= now).sum()),
        next_expiry=int(to_come.min()) if len(to_come) else None,
        snippets=int((snippets.ends > snippets.starts).sum()),
    )


def _label_counts(snapshot: Snapshot, rows: Int64[ndarray, " b"]) -> dict[int, int]:
    if snapshot.layout.task == "regression" or not len(rows):
        return {}
    classes, counts = np.unique(snapshot.targets(rows), return_counts=True)
    return dict(Counter(dict(zip(classes.tolist(), counts.tolist(), strict=True))).most_common())


def _met(snapshot: Snapshot, name: str, wanted: Any) -> Bool[ndarray, " n"]:
    if name == "expired":
        return _expired(snapshot, wanted)
    met = np.zeros(snapshot.n_rows, bool)
    if isinstance(wanted, ndarray):
        wanted = wanted.tolist()
    several = isinstance(wanted, Sequence | set | frozenset) and not isinstance(wanted, str | bytes)
    for value in wanted if several else [wanted]:
        met |= _equal(snapshot, name, value)
    return met


def _equal(snapshot: Snapshot, name: str, value: Any) -> Bool[ndarray, " n"]:
    if name in ("owner", "tag"):
        if not _is_text(value):
            raise InvalidInput(f"{name} is {value!r}, expected a string")
        texts = snapshot.texts(f"{name}s")
        return texts.equal_to(value) if name == "owner" else texts.having(value)
    if name == "label" and snapshot.layout.task == "regression":
        raise InvalidInput("the memory is of a regression, whose rows have values and no label; leave it out")
    column = snapshot.all_groups if name == "group" else snapshot.targets(np.arange(snapshot.n_rows))
    if column is None:
        raise InvalidInput("the rows of this memory have no group; leave it out")
    named = column.dtype.kind == "U"
    if not (_is_text(value) if named else isinstance(value, int | np.integer) and not isinstance(value, bool)):
        raise InvalidInput(f"{name} is {value!r}, expected {'a string' if named else 'a whole number'}")
    return np.asarray(column == value)


def _is_text(value: Any) -> bool:
    """Whether it is a string that a row may carry."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def _expired(snapshot: Snapshot, wanted: Any) -> Bool[ndarray, " n"]:
    if wanted is False:
        return snapshot.expires > int(time.time())
    moment = int(time.time()) if wanted is True else as_seconds(wanted)
    return (snapshot.expires <= moment) & (snapshot.expires < NEVER)
