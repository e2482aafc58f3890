"""Text in windows: every token is predicted once, wherever windows begin and documents end."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray

from residual_memory.errors import InvalidInput
from residual_memory.windows import Encoded, TextFile, Windows

DOCUMENTS = [[5, 6, 7], [8], [], [9, 10, 11, 12, 13], [14, 15]]
TEXTS = st.lists(st.lists(st.integers(0, 99), max_size=7), max_size=6)


def stream(documents: list[list[int]], end: int | None = None, first: int = 0) -> tuple[ndarray, ndarray]:
    """All tokens end to end, and the document of each."""
    closed = [[*document, *([] if end is None else [end])] for document in documents]
    owners = [[number] * len(document) for number, document in enumerate(closed, first)]
    return np.array(list(chain(*closed)), int), np.array(list(chain(*owners)), int)


def predicted(windows: Windows) -> list[int]:
    """Places in the stream that the windows predict, in their order."""
    return [
        place
        for window in windows
        for place in range(window["start"] + 1 + window["skip"], window["start"] + len(window["input_ids"]))
    ]


@given(TEXTS, st.integers(1, 6), st.integers(1, 6), st.sampled_from([None, 77]), st.integers(0, 3))
def test_every_token_but_the_first_is_predicted_exactly_once(
    documents: list[list[int]], length: int, stride: int, end: int | None, first: int
) -> None:
    tokens, owners = stream(documents, end, first)
    windows = Windows(documents, length, end=end, stride=min(stride, length), first_document=first)
    assert predicted(windows) == list(range(1, len(tokens)))
    for window in windows:
        place = slice(window["start"], window["start"] + len(window["input_ids"]))
        np.testing.assert_array_equal(window["input_ids"], tokens[place])
        np.testing.assert_array_equal(window["documents"], owners[place])


@given(TEXTS, st.integers(1, 6), st.integers(1, 6))
def test_a_stride_gives_every_prediction_after_the_first_window_its_context(
    documents: list[list[int]], length: int, stride: int
) -> None:
    stride = min(stride, length)
    for window in Windows(documents, length, stride=stride):
        assert len(window["input_ids"]) <= length + 1
        assert window["skip"] == (length - stride if window["start"] else 0)


def test_windows_share_the_token_between_them() -> None:
    found = [window["input_ids"].tolist() for window in Windows([list(range(8))], length=3)]
    assert found == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7]]


def test_the_end_token_closes_every_document_and_belongs_to_it() -> None:
    (window,) = Windows(DOCUMENTS, length=50, end=0)
    assert window["input_ids"].tolist() == [5, 6, 7, 0, 8, 0, 0, 9, 10, 11, 12, 13, 0, 14, 15, 0]
    assert window["documents"].tolist() == [0, 0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3, 3, 4, 4, 4]


def test_empty_documents_keep_their_number() -> None:
    (window,) = Windows(DOCUMENTS, length=50, first_document=10)
    assert window["documents"].tolist() == [10, 10, 10, 11, 13, 13, 13, 13, 13, 14, 14]


def test_what_is_left_after_a_full_window_is_a_short_one_if_it_has_a_prediction() -> None:
    lengths = {n: [len(window["input_ids"]) for window in Windows([range(n)], length=4)] for n in (4, 5, 6, 9, 10)}
    assert lengths == {4: [4], 5: [5], 6: [5, 2], 9: [5, 5], 10: [5, 5, 2]}


@pytest.mark.parametrize("documents", [[], [[]], [[], []], [[5]], [[], [5], []]])
def test_a_text_without_a_prediction_has_no_window(documents: list[list[int]]) -> None:
    assert list(Windows(documents, length=4)) == []


def test_texts_of_one_token_still_make_predictions_when_they_are_packed() -> None:
    found = [window["input_ids"].tolist() for window in Windows([[5], [6], [7]], length=1)]
    assert found == [[5, 6], [6, 7]]


def test_windows_can_be_read_again() -> None:
    windows = Windows(DOCUMENTS, length=3, stride=2, end=0)
    first, second = list(windows), list(windows)
    assert len(first) == len(second) > 3
    for one, other in zip(first, second, strict=True):
        np.testing.assert_equal(one, other)


def test_documents_are_read_as_they_are_needed() -> None:
    read = []

    def documents() -> Iterator[list[int]]:
        for number in range(100):
            read.append(number)
            yield [number] * 10

    window = next(iter(Windows(documents(), length=15)))
    assert len(window["input_ids"]) == 16
    assert read == [0, 1]


@pytest.mark.parametrize("kind", [tuple, np.array, lambda tokens: np.array(tokens, np.uint16), range])
def test_documents_may_be_any_kind_of_row_of_numbers(kind: Any) -> None:
    (window,) = Windows([kind(4)] if kind is range else [kind([0, 1, 2, 3])], length=9, end=9)
    assert window["input_ids"].dtype == np.int64
    assert window["input_ids"].tolist() == [0, 1, 2, 3, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length is 0, expected at least 1"),
        ({"length": 4, "stride": 0}, "stride is 0, expected at least 1"),
        ({"length": 4, "stride": 5}, "stride is 5, expected at most the length, 4"),
        ({"length": 2.5}, r"length is 2.5, expected a whole number"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_lengths_and_strides_that_leave_tokens_out_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Windows(DOCUMENTS, **options)


@pytest.mark.parametrize(
    ("documents", "found"),
    [(["a text"], "a str"), ([[1.5, 2.0]], "float64"), ([[[1], [2]]], r"shape \(2, 1\)"), ([5, 6, 7], r"shape \(\)")],
    ids=["text", "fractions", "nested", "one document"],
)
@pytest.mark.usefixtures("unchecked")
def test_documents_that_are_no_rows_of_token_numbers_are_refused(documents: list[Any], found: str) -> None:
    with pytest.raises(InvalidInput, match=f"document 0 is .*{found}.*, expected token numbers on one axis; "):
        list(Windows(documents, length=3, end=0))


# ---------------------------------------------------------------------- text


@pytest.mark.parametrize(
    "content",
    [
        b"one\ntwo\n\nthree\n",
        b"one\r\ntwo\r\n\r\nthree\r\n",
        b"one\ntwo\n\nthree",
        b"\n\n \none\ntwo\n\n\n\t\nthree\n\n \n\n",
    ],
    ids=["plain", "CRLF", "no newline at the end", "blank lines everywhere"],
)
def test_documents_of_a_file_are_the_blocks_between_blank_lines(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    assert list(TextFile(tmp_path / "text.txt")) == ["one\ntwo", "three"]


@pytest.mark.parametrize("content", ["", "\n", " \n\n\t\n"])
def test_a_file_without_words_has_no_documents(content: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(content)
    assert list(TextFile(tmp_path / "text.txt")) == []


def test_a_file_is_utf8_and_keeps_its_spaces(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("  naïve — 漢字  \n", encoding="utf-8")
    assert list(TextFile(tmp_path / "text.txt")) == ["  naïve — 漢字  "]


def test_a_file_encoded_and_packed_can_be_read_again(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("ab\n\nc\n")
    windows = Windows(Encoded(TextFile(str(tmp_path / "text.txt")), lambda text: list(text.encode())), 9, end=0)
    for _ in range(2):
        (window,) = windows
        assert window["input_ids"].tolist() == [97, 98, 0, 99, 0]
