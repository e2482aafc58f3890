"""Text in windows of tokens: read document by document, packed end to end, never held whole."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer
from numpy import ndarray

from residual_memory.errors import InvalidInput
from residual_memory.validation import as_count

Tokens = Sequence[int] | Integer[ndarray, " _"]
Window = dict[str, Any]  # input_ids [t], documents [t], start, skip


@dataclass(frozen=True)
class TextFile:
    """The documents of a text file, one after the other: blocks of lines between blank lines.

    Parameters
    ----------
    path : UTF-8 text; without blank lines it is one document, held whole while it is read.

    Raises
    ------
    InvalidInput : while it is read, if it is not UTF-8.
    """

    path: str | os.PathLike[str]

    def __iter__(self) -> Iterator[str]:
        lines: list[str] = []
        with Path(self.path).open(encoding="utf-8") as file:
            try:
                for line in chain(file, [""]):
                    if line.strip():
                        lines.append(line)
                    elif lines:
                        yield "".join(lines).rstrip("\n")
                        lines = []
            except UnicodeDecodeError as error:
                raise InvalidInput(f"{self.path} is not text in UTF-8: {error.reason}; save it as UTF-8") from None


@dataclass(frozen=True)
class Encoded:
    """Documents as token numbers, encoded while they are read.

    Parameters
    ----------
    texts : can be read again from the beginning, as a list or a `TextFile` can.
    encode : from a text to its token numbers, for example ``lambda text: tokenizer(text).input_ids``.
    """

    texts: Iterable[str]
    encode: Callable[[str], Tokens]

    def __iter__(self) -> Iterator[Tokens]:
        return (self.encode(text) for text in self.texts)


class Windows:
    """Documents packed end to end and cut into windows that a language model can read: items for `build_memory`.

    Every item has `input_ids` [t], the document of each token in `documents` [t], the place of its first token in the
    whole stream in `start`, and in `skip` how many of its predictions an earlier window made already.

    Parameters
    ----------
    documents : of token numbers; read once for every pass over the windows.
    length : predictions a window makes; it has one token more. At most what the model can read.
    end : a token that closes every document, and so begins the next one; None adds none.
    stride : how far a window begins after the one before. The same as `length` (the default) reads every token once;
        less gives every prediction at least ``length − stride`` tokens of context, at the cost of as many passes more.
    first_document : number of the first document.

    Examples
    --------
    >>> for window in Windows([[5, 6, 7], [8, 9]], length=3, end=0):
    ...     print(window["input_ids"], window["documents"], window["start"])
    [5 6 7 0] [0 0 0 0] 0
    [0 8 9 0] [0 1 1 1] 3
    """

    def __init__(
        self,
        documents: Iterable[Tokens],
        length: int,
        *,
        end: int | None = None,
        stride: int | None = None,
        first_document: int = 0,
    ) -> None:
        self.length, self.stride = as_count("length", length), as_count("stride", length if stride is None else stride)
        if self.stride > self.length:
            raise InvalidInput(
                f"stride is {self.stride}, expected at most the length, {self.length}: no token is left out"
            )
        self._documents, self._end, self._first = documents, end, first_document

    def __iter__(self) -> Iterator[Window]:
        tokens, owners = np.zeros(0, np.int64), np.zeros(0, np.int64)
        start, waiting, n_waiting, skip = 0, [], 0, 0
        for number, document in enumerate(self._documents, self._first):
            piece = _numbers(document, number)
            piece = piece if self._end is None else np.append(piece, self._end)
            waiting.append((piece, np.full(len(piece), number)))
            n_waiting += len(piece)
            if len(tokens) + n_waiting <= self.length:
                continue
            tokens = np.concatenate([tokens, *(piece for piece, _ in waiting)])
            owners = np.concatenate([owners, *(owner for _, owner in waiting)])
            waiting, n_waiting = [], 0
            while len(tokens) > self.length:
                yield self._window(tokens, owners, start, skip)
                tokens, owners = tokens[self.stride :], owners[self.stride :]
                start, skip = start + self.stride, self.length - self.stride
        tokens = np.concatenate([tokens, *(piece for piece, _ in waiting)])
        owners = np.concatenate([owners, *(owner for _, owner in waiting)])
        if len(tokens) > skip + 1:
            yield self._window(tokens, owners, start, skip)

    def _window(self, tokens: ndarray, owners: ndarray, start: int, skip: int) -> Window:
        size = self.length + 1
        return {"input_ids": tokens[:size], "documents": owners[:size], "start": start, "skip": skip}


def _numbers(document: Tokens, number: int) -> Int64[ndarray, " t"]:
    """A document as an array of token numbers."""
    array = np.asarray(document)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        kind = "a str" if isinstance(document, str) else f"{array.dtype} of shape {array.shape}"
        raise InvalidInput(
            f"document {number} is {kind}, expected token numbers on one axis; "
            "Encoded(texts, encode) makes them of texts"
        )
    return array.astype(np.int64)
