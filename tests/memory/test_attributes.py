"""What rows carry comes back as it was given, whatever happens to the memory, and is never somebody else's."""

import datetime
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from residual_memory.errors import CorruptFile, InvalidInput, ResidualMemoryError, UnknownId
from residual_memory.memory import Memory, segments
from residual_memory.memory.attributes import NEVER, Attributes, Texts, as_seconds
from tests.memory.test_format import forge, parsed, rows_of, with_header
from tests.problems import Problem, classification, empty_memory, memory_of

UTC = datetime.UTC
SOON = datetime.datetime(2030, 5, 1, 12, tzinfo=UTC)
LATER = datetime.datetime(2031, 5, 1, 12, tzinfo=datetime.timezone(datetime.timedelta(hours=-3)))
TEXTS = ["", "x" * 4096, "☂ и 🦜", "a\0b", "line\nbreak", "\\", " "]

Carried = list[tuple[str, int, tuple[str, ...], str]]


def carried(memory: Memory, ids: Any = None) -> Carried:
    """What rows carry, row by row; of all rows where no ids are given."""
    found = memory.attributes(memory.ids if ids is None else ids)
    return list(zip(found.owners, found.expires.tolist(), found.tags, found.snippets, strict=True))


def add(memory: Memory, problem: Problem, rows: Any, **carrying: Any) -> None:
    some = problem.rows(rows)
    memory.append(some.keys, some.labels, some.predictions, **carrying)


NOTHING = ("", NEVER, (), "")


def mixed(problem: Problem, place: Path | None) -> tuple[Memory, dict[int, tuple[str, int, tuple[str, ...], str]]]:
    """Segments that carry everything, something and nothing; and what each row should carry."""
    memory = empty_memory(problem, place)
    add(memory, problem, slice(0, 7), owners=[f"o{n}" for n in range(7)], snippets=TEXTS, tags=["a", "ab", "a", "ü 🦜"])
    add(memory, problem, slice(7, 10))
    tags = [[], ["b"], ["a", "abc"], ["b"], ["bb"]]
    add(memory, problem, slice(10, 15), tags=tags, expires=[0, 5, SOON, LATER, NEVER])
    add(memory, problem, slice(15, 16), owners="zoë", expires=1.75)
    wanted: dict[int, tuple[str, int, tuple[str, ...], str]] = {}
    wanted |= {n: (f"o{n}", NEVER, ("a", "ab", "ü 🦜"), TEXTS[n]) for n in range(7)}
    wanted |= {n: NOTHING for n in range(7, 10)}
    moments = [0, 5, int(SOON.timestamp()), int(LATER.timestamp()), NEVER]
    wanted |= {10 + n: ("", moments[n], tuple(tags[n]), "") for n in range(5)}
    return memory, wanted | {15: ("zoë", 1, (), "")}


@pytest.mark.parametrize("merged", [0, segments.MERGE_BYTES])
def test_what_rows_carry_comes_back_through_every_change(
    problem: Problem, place: Path | None, merged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "MERGE_BYTES", merged)
    monkeypatch.setattr(segments, "FAN", 2)
    memory, wanted = mixed(problem, place)
    assert len(memory.snapshot.tables) == (4 if merged == 0 else 2)
    assert carried(memory) == list(wanted.values())
    assert carried(memory, [12, 3, 15, 3]) == [wanted[n] for n in (12, 3, 15, 3)]
    memory.forget([1, 8, 12])
    alive = [n for n in wanted if n not in (1, 8, 12)]
    assert carried(memory) == [wanted[n] for n in alive]
    with pytest.raises(UnknownId):
        memory.attributes([8])
    memory.compact()
    assert carried(memory) == [wanted[n] for n in alive]
    for n in range(16, 30):  # joined with the rows that are there, one by one
        add(memory, problem, [n], snippets=[str(n)] if n % 2 else None)
        wanted[n] = ("", NEVER, (), str(n) if n % 2 else "")
    alive += range(16, 30)
    assert carried(memory) == [wanted[n] for n in alive]
    if place is not None:
        memory.close()
        assert carried(Memory.open(place, verify=True)) == [wanted[n] for n in alive]


def test_rows_in_blocks_carry_what_appended_ones_would(
    problem: Problem, place: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1500)
    memory = empty_memory(problem, place)
    blocks = []
    for first in range(0, 60, 6):
        some = problem.rows(slice(first, first + 6))
        block: dict[str, Any] = {"keys": some.keys, "labels": some.labels, "predictions": some.predictions}
        blocks.append({**block, "owners": f"o{first}", "tags": ["x"]} if first % 12 else block)
    memory.extend(blocks)
    assert len(memory.snapshot.tables) > 1
    wanted = [(f"o{6 * (n // 6)}", NEVER, ("x",), "") if n // 6 % 2 else NOTHING for n in range(60)]
    assert carried(memory) == wanted


def test_rows_that_carry_nothing_take_no_room_for_it(problem: Problem, tmp_path: Path) -> None:
    with memory_of(problem, tmp_path / "bare") as memory:
        assert carried(memory) == [NOTHING] * 60
        assert set(memory.snapshot.tables[0]) == {"ids", "keys", "labels", "predictions"}
        bare = memory.n_bytes
    with empty_memory(problem, tmp_path / "owned") as memory:
        add(memory, problem, slice(None), owners="somebody")
        assert set(memory.snapshot.tables[0]) == {"ids", "keys", "labels", "predictions", "owners", "owners_ends"}
        assert memory.n_bytes > bare


def test_an_empty_memory_carries_nothing(problem: Problem) -> None:
    found = empty_memory(problem).attributes(np.zeros(0, np.int64))
    assert (found.owners, len(found.expires), found.tags, found.snippets) == ([], 0, [], [])


def test_a_tag_given_twice_is_one(problem: Problem, place: Path | None) -> None:
    memory = empty_memory(problem, place)
    add(memory, problem, [0, 1], tags=[["b", "a", "b"], []])
    assert memory.attributes([0, 1]).tags == [("b", "a"), ()]


# ---------------------------------------------------------------------- what is refused

REFUSED: dict[str, dict[str, Any]] = {
    "owners too few": {"owners": ["a", "b"]},
    "owners too many": {"owners": list("abcd")},
    "owners of bytes": {"owners": [b"a", b"b", b"c"]},
    "an owner of None": {"owners": ["a", None, "c"]},
    "owners as a number": {"owners": 5},
    "a lone surrogate": {"owners": "\ud800"},
    "a lone surrogate in a snippet": {"snippets": ["a", "b", "\udfff"]},
    "a lone surrogate in a tag": {"tags": ["\ud800"]},
    "snippets as one string": {"snippets": "abc"},
    "snippets too few": {"snippets": ["a"]},
    "snippets as numbers": {"snippets": [1, 2, 3]},
    "snippets as a number": {"snippets": 1.5},
    "tags as one string": {"tags": "abc"},
    "tags too few": {"tags": [["a"], ["b"]]},
    "tags as numbers": {"tags": [1, 2, 3]},
    "tags as a number": {"tags": 7},
    "tags of None": {"tags": [None, ["a"], ["b"]]},
    "tags and lists of tags": {"tags": ["a", ["b"], ["c"]]},
    "numbers in lists of tags": {"tags": [[1], [2], [3]]},
    "an empty tag": {"tags": ["a", ""]},
    "a tag of two lines": {"tags": [["a\nb"], [], []]},
    "a moment without a time zone": {"expires": datetime.datetime(2030, 1, 1)},
    "moments without a time zone": {"expires": [SOON, SOON.replace(tzinfo=None), SOON]},
    "a moment as a bool": {"expires": True},
    "moments as bools": {"expires": np.array([True, False, True])},
    "a moment that is no number": {"expires": float("nan")},
    "an infinite moment": {"expires": float("inf")},
    "a negative moment": {"expires": [1, -1, 1]},
    "a moment as text": {"expires": "2030-01-01"},
    "moments too few": {"expires": [1, 2]},
    "a moment beyond all": {"expires": 2**63},
    "moments of no kind": {"expires": {"a": 1}},
    "a date": {"expires": datetime.date(2030, 1, 1)},
    "moments without an axis": {"expires": np.array(True)},
    "moments of two axes": {"expires": np.ones((3, 1))},
    "moments of another kind": {"expires": np.array(["2030-01-01"] * 3, "datetime64[s]")},
}


@pytest.mark.parametrize("bad", REFUSED.values(), ids=REFUSED)
@pytest.mark.usefixtures("unchecked")
def test_what_rows_cannot_carry_is_refused_and_nothing_is_added(
    problem: Problem, bad: dict[str, Any], place: Path | None
) -> None:
    memory = memory_of(problem, place)
    files = sorted(place.iterdir()) if place else []
    with pytest.raises(InvalidInput, match=next(iter(bad))[:-1] if "expires" not in bad else "moment|time zone"):
        add(memory, problem, slice(0, 3), **bad)
    some = problem.rows(slice(0, 3))
    with pytest.raises(InvalidInput):
        memory.extend([{"keys": some.keys, "labels": some.labels, "predictions": some.predictions, **bad}])
    assert (len(memory), memory.version, memory.next_id) == (60, 1, 60)
    assert files == (sorted(place.iterdir()) if place else [])


@pytest.mark.usefixtures("unchecked")
def test_arrays_are_taken_as_lists_are(problem: Problem, place: Path | None) -> None:
    memory = empty_memory(problem, place)
    named = np.array(["a", "bb", ""])
    add(memory, problem, slice(0, 3), owners=named, snippets=named, expires=np.array([1, 2, NEVER], np.uint64))
    add(memory, problem, slice(3, 6), owners=tuple(named), expires=np.array([1.5, 2.5, 0.0]), tags=(("x",), (), ("y",)))
    add(memory, problem, slice(6, 7), expires=np.array(7.0), tags=iter(["z"]))
    found = memory.attributes(np.arange(7))
    assert found.owners == ["a", "bb", "", "a", "bb", "", ""]
    assert found.snippets == ["a", "bb", "", "", "", "", ""]
    assert found.expires.tolist() == [1, 2, NEVER, 1, 2, 0, 7]
    assert found.tags == [(), (), (), ("x",), (), ("y",), ("z",)]


def test_a_moment_is_the_same_in_every_time_zone() -> None:
    here = datetime.datetime(2030, 5, 1, 9, tzinfo=datetime.timezone(datetime.timedelta(hours=-3)))
    assert as_seconds(here) == as_seconds(SOON) == int(SOON.timestamp())
    assert as_seconds(np.float32(3)) == as_seconds(np.int8(3)) == as_seconds(3.9) == 3
    assert as_seconds(NEVER) == NEVER


# ---------------------------------------------------------------------- texts against plain Python

letters = st.text(st.sampled_from(["a", "b", "\n", "\0", "ü", "🦜"]), max_size=5)
lists = st.lists(letters, max_size=12)


def texts_of(values: Sequence[str], cut: int) -> Texts:
    """The same texts, joined from two parts."""
    return Texts.joined([Texts.of(values[:cut]), Texts.none(0), Texts.of(values[cut:])])


@given(values=lists, cut=st.integers(0, 12))
def test_texts_are_decoded_as_they_were_given(values: list[str], cut: int) -> None:
    texts = texts_of(values, cut)
    assert texts.decoded() == values
    assert len(texts) == len(values)


@given(values=lists.filter(len), cut=st.integers(0, 12), data=st.data())
def test_texts_are_taken_as_from_a_list(values: list[str], cut: int, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=15))
    taken = texts_of(values, cut).take(np.array(rows, np.int64))
    assert taken.decoded() == [values[row] for row in rows]
    assert taken.take(np.arange(len(rows))).decoded() == taken.decoded()


@given(values=lists, cut=st.integers(0, 12), wanted=letters)
def test_equal_texts_are_those_that_a_list_would_give(values: list[str], cut: int, wanted: str) -> None:
    for value in (wanted, *values):
        assert texts_of(values, cut).equal_to(value).tolist() == [other == value for other in values]


tag = st.text(st.sampled_from(["a", "b", "\0", "ü"]), min_size=1, max_size=3)


@given(tags=st.lists(st.lists(tag, max_size=3), min_size=1, max_size=8), wanted=tag)
def test_rows_have_the_tags_that_were_given_them_and_no_others(tags: list[list[str]], wanted: str) -> None:
    """Also where one tag begins or ends with another, and where rows lie next to each other."""
    problem = classification(n=len(tags))
    memory = empty_memory(problem)
    memory.append(problem.keys, problem.labels, problem.predictions, tags=tags)
    texts = memory.snapshot.texts("tags")
    for name in (wanted, *(name for some in tags for name in some)):
        assert texts.having(name).tolist() == [name in some for some in tags]
    assert memory.attributes(memory.ids).tags == [tuple(dict.fromkeys(some)) for some in tags]


def test_nobody_has_a_tag_that_none_can_have() -> None:
    texts = Texts.of(["\na\n\nb\n", "\nb\n", ""])
    assert texts.having("b").tolist() == [True, True, False]
    for name in ("", "\n", "\nb", "a\n\nb", "b\n\nb"):
        assert not texts.having(name).any()


# ---------------------------------------------------------------------- forged ends

ENDS: dict[str, list[int]] = {
    "negative": [-1, 4, 6, 9],
    "descending": [4, 2, 6, 9],
    "beyond the texts": [2, 4, 6, 10],
    "far beyond": [2, 4, 6, 2**62],
    "short of the texts": [2, 4, 6, 8],
    "beyond, and back": [2, 2**62, 6, 9],
    "within a letter": [1, 4, 6, 9],
}
ASKED: dict[str, Callable[[Memory], Any]] = {
    "attributes": lambda memory: memory.attributes(memory.ids),
    "find": lambda memory: memory.find({"owner": "ü"}),
    "inventory": lambda memory: memory.inventory(),
    "compact": lambda memory: (memory.forget(memory.ids[:1]), memory.compact(search_files=True)),
    "append": lambda memory: add(memory, classification(n=60), slice(0, 40)),
}


def forged_home(path: Path, ends: list[int]) -> Path:
    """A memory whose owners end elsewhere, under right checksums."""
    problem = classification(n=4)
    with empty_memory(problem, path) as memory:
        memory.append(problem.keys, problem.labels, problem.predictions, owners=["ü", "ab", "cd", "efg"])
    header, data = parsed(rows_of(path))
    first, last = header["owners_ends"]["data_offsets"]
    data = data[:first] + struct.pack("<4q", *ends) + data[last:]
    forge(path, with_header(json.dumps(header).encode(), data))
    return path


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_forged_ends_are_damage_and_no_wrong_text(
    tmp_path: Path, ends: list[int], ask: Callable[[Memory], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "FAN", 2)  # so that an append joins its rows with those that are there
    with Memory.open(forged_home(tmp_path / "memory", ends), writable=True, verify=True) as memory:
        in_a_letter = ends == ENDS["within a letter"] and ask not in (ASKED["attributes"], ASKED["inventory"])
        if not in_a_letter:  # such ends are seen when the text is read as text
            with pytest.raises(CorruptFile):
                ask(memory)
        else:
            ask(memory)
    found = Memory.open(tmp_path / "memory", verify=True)
    with pytest.raises(CorruptFile):
        found.attributes(found.ids)


def test_right_ends_under_a_forged_header_are_read(tmp_path: Path) -> None:
    memory = Memory.open(forged_home(tmp_path / "memory", [2, 4, 6, 9]), verify=True)
    assert memory.attributes(memory.ids).owners == ["ü", "ab", "cd", "efg"]


@pytest.mark.parametrize("missing", ["owners", "owners_ends"])
def test_texts_without_ends_and_ends_without_texts_are_refused(tmp_path: Path, missing: str) -> None:
    path = forged_home(tmp_path / "memory", [2, 4, 6, 9])
    header, data = parsed(rows_of(path))
    first, last = header[missing]["data_offsets"]
    del header[missing]
    for entry in header.values():
        entry["data_offsets"] = [place - (last - first if place >= last else 0) for place in entry["data_offsets"]]
    forge(path, with_header(json.dumps(header).encode(), data[:first] + data[last:]))
    with pytest.raises(CorruptFile, match="columns"):
        Memory.open(path)


def test_what_rows_carry_is_a_value_of_its_own(problem: Problem) -> None:
    memory = empty_memory(problem)
    owners = ["a", "b"]
    add(memory, problem, [0, 1], owners=owners)
    owners[0] = "z"
    found = memory.attributes([0, 1])
    assert isinstance(found, Attributes)
    assert found.owners == ["a", "b"]
    assert issubclass(UnknownId, ResidualMemoryError)
