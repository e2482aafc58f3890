"""Rows of keys, predictions and labels from anywhere, block by block: a source larger than the RAM is no trouble."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Shaped
from numpy import ndarray

from residual_memory.errors import CorruptFile, InvalidInput
from residual_memory.memory.attributes import EXPIRES, NEVER, TEXTS
from residual_memory.memory.format import Manifest, decoded_strings
from residual_memory.types import Task, TopM
from residual_memory.validation import as_ids, as_keys, as_labels, as_predictions

BLOCK_BYTES = 4 << 20
TOP_M = ("indices", "probabilities", "rest")
CARRIED = (EXPIRES, *TEXTS)
COLUMNS = ("keys", "predictions", *TOP_M, "labels", "ids", "groups", *CARRIED)


@dataclass(frozen=True)
class Block:
    """Some rows of a source, in its order.

    Attributes
    ----------
    first : row number of the first.
    keys, predictions : as the source has them; predictions of one axis are one output.
    labels, ids, groups : None where the source has none.
    owners, tags, snippets : of each row, empty where it has none; None where the source has none.
    expires : seconds since 1970, `NEVER` where a row does not expire; None likewise.
    """

    first: int
    keys: Shaped[ndarray, "b ..."]
    predictions: "Shaped[ndarray, 'b ...'] | TopM"
    labels: Shaped[ndarray, "b ..."] | None = None
    ids: Shaped[ndarray, " b"] | None = None
    groups: Shaped[ndarray, " b"] | None = None
    owners: Sequence[str] | None = None
    expires: Int64[ndarray, " b"] | None = None
    tags: Sequence[tuple[str, ...]] | None = None
    snippets: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def row_ids(self) -> Shaped[ndarray, " b"]:
        """The ids, which are the row numbers where the source gives none."""
        return np.arange(self.first, self.first + len(self)) if self.ids is None else as_ids(self.ids, len(self))

    @property
    def whole(self) -> Shaped[ndarray, "b ..."]:
        """The predictions, of a source that has whole ones."""
        assert not isinstance(self.predictions, TopM)
        return self.predictions

    @property
    def arguments(self) -> dict[str, Any]:
        """What `Memory.append` takes."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "first"}

    @property
    def carried(self) -> dict[str, Any]:
        """What its rows carry beside the numbers, of what `Memory.append` takes."""
        return {name: value for name in CARRIED if (value := getattr(self, name)) is not None}

    def taken(self, rows: Bool[ndarray, " b"]) -> "Block":
        """Some of the rows; the number of the first stays."""
        return replace(self, **{name: _taken(value, rows) for name, value in self.arguments.items()})


class Rows(ABC):
    """Keys and predictions of examples, perhaps with labels, ids, groups and what rows carry, read block by block.

    Attributes
    ----------
    name : for messages.
    columns : what a block has, of keys, predictions, labels, ids, groups, owners, expires, tags and snippets.
    top_m : whether predictions are `TopM`.
    manifest : of the memory that the rows were exported from; None for rows of any other origin.
    """

    name: str
    n_rows: int
    columns: frozenset[str]
    top_m: bool = False
    manifest: Manifest | None = None

    @abstractmethod
    def blocks(self, *, first: int = 0, size: int | None = None) -> Iterator[Block]:
        """The rows from `first` on, in blocks of at most `size`."""

    def require(self, column: str, why: str) -> None:
        """Refuse a source without this column."""
        if column not in self.columns:
            raise InvalidInput(
                f"{self.name} holds no {column}, which {why} needs; it has {', '.join(sorted(self.columns))}"
            )

    def checked(self, block: Block, task: Task, n_outputs: int | None, dim: int | None = None) -> Block:
        """The block with its numbers validated; an error names the rows of the source.

        Parameters
        ----------
        task, n_outputs, dim : of the memory that the rows are for.
        """
        try:
            keys = as_keys(block.keys, dim)
            said: Any = as_predictions(block.predictions, task, n_outputs)
            width = _width(said) if n_outputs is None else n_outputs
            labels = None if block.labels is None else as_labels(block.labels, task, width, len(keys))
            if len(said) != len(keys):
                raise InvalidInput(f"there are {len(said):,} predictions for {len(keys):,} keys")
            return replace(block, keys=keys, predictions=said, labels=labels)
        except InvalidInput as error:
            last = block.first + len(block) - 1
            raise type(error)(f"in rows {block.first:,} to {last:,} of {self.name}: {error}") from None


def _taken(values: Any, rows: Bool[ndarray, " b"]) -> Any:
    if isinstance(values, TopM):
        return TopM(values.indices[rows], values.probabilities[rows], values.rest[rows])
    if values is None or isinstance(values, ndarray):
        return values if values is None else values[rows]
    return [value for value, wanted in zip(values, rows.tolist(), strict=True) if wanted]


def _width(predictions: Any) -> int:
    if isinstance(predictions, TopM):
        raise InvalidInput("top-m predictions do not tell how many classes there are; give n_outputs")
    return int(predictions.shape[1])


def task_of(block: Block) -> Task:
    """The task that rows with labels are of, by their types."""
    labels: Any = block.labels
    wide = isinstance(block.predictions, TopM) or (block.predictions.ndim == 2 and block.predictions.shape[1] > 1)
    return "classification" if labels.dtype.kind in "iu" and labels.ndim == 1 and wide else "regression"


def block_of(first: int, values: Mapping[str, Any]) -> Block:
    """A block of the columns that `needed` named."""
    named = dict(values)
    if "indices" in named:
        indices, listed, rest = (named.pop(name) for name in TOP_M)
        signed = indices.astype(np.int64) if indices.dtype.kind == "u" else indices
        named["predictions"] = TopM(signed, listed, rest)
    return Block(first, **named)


def needed(name: str, present: Iterable[str], written: Mapping[str, str] | None = None) -> list[str]:
    """The columns to read of those that a file has.

    Parameters
    ----------
    name : of the file, for messages.
    present : the file's names.
    written : what the file calls a column, where that is not its name.

    Raises
    ------
    InvalidInput : naming a column that is missing, and one of a similar name.
    """
    calls = {column: column for column in COLUMNS} | dict(written or {})
    there = list(present)
    listed = any(calls[column] in there for column in TOP_M) and calls["predictions"] not in there
    said = TOP_M if listed else ("predictions",)
    for column in ("keys", *said):
        if calls[column] not in there:
            close = difflib.get_close_matches(calls[column], there, 1, 0.5)
            hint = f"; is {close[0]!r} meant to be it?" if close else ""
            found = ", ".join(map(repr, sorted(there))) or "nothing"
            raise InvalidInput(f"{name} holds no {calls[column]!r}, it has {found}{hint}")
    wanted = ("keys", *said, "labels", "ids", "groups", *CARRIED)
    return [column for column in wanted if calls[column] in there]


def held(columns: Iterable[str]) -> frozenset[str]:
    """What a block has of these columns: top-m ones are its predictions."""
    return frozenset("predictions" if column in TOP_M else column for column in columns)


def texts(encoded: ndarray, where: str) -> ndarray:
    """The strings of a column of bytes.

    Raises
    ------
    CorruptFile : if they are none.
    """
    try:
        return decoded_strings(encoded)
    except UnicodeDecodeError as error:
        raise CorruptFile(f"{where} holds what is no text in UTF-8: {error}; write it again") from None


def moments(values: ndarray, where: str) -> Int64[ndarray, " b"]:
    """Seconds since 1970 of a column of numbers.

    Raises
    ------
    InvalidInput : naming a value that is none.
    """
    if values.dtype.kind not in "iuf" or values.ndim != 1:
        raise InvalidInput(f"{where} is {values.dtype} {values.shape}, expected seconds since 1970, one a row")
    bad = ~((values >= 0) & ((values < 2.0**63) if values.dtype.kind == "f" else (values <= NEVER)))
    if bad.any():
        raise InvalidInput(f"{where} holds {values[bad][0].item()!r}, which is no moment; give seconds since 1970")
    return values.astype(np.int64)
