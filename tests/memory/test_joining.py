"""Memories that become one without a copy of a row: the same rows, in order, and never half of them."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import residual_memory as rm
from residual_memory.errors import (
    CorruptFile,
    DimensionMismatch,
    DuplicateId,
    InvalidInput,
    MemoryNotFound,
    StorageFailure,
)
from residual_memory.memory import Memory, storage
from residual_memory.memory.joining import joined
from residual_memory.selftest.workload import add, create, state_of
from tests.exchange.forms import KINDS, assert_same, kept
from tests.memory.faults import Disk, watching
from tests.problems import classification, memory_of

ROWS = {"first": range(20), "second": range(20, 32)}
EVERYTHING = frozenset(range(32))


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Two memories whose every row follows from its id."""
    for name, ids in ROWS.items():
        with create(str(tmp_path / name)) as memory:
            add(memory, ids)
    return [tmp_path / name for name in ROWS]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("text", [False, True], ids=["integers", "text"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_is_what_would_have_been_filled_by_each_in_turn(tmp_path: Path, kind: str, text: bool) -> None:
    sizes = ((40, 0), (25, 100), (30, 200))
    homes = []
    for n, first in sizes:
        with kept(kind, tmp_path / f"part-{first}", n=n, first=first, text=text, groups=True) as memory:
            memory.compact()
            homes.append(tmp_path / f"part-{first}")
    with joined(tmp_path / "whole", homes) as whole:
        assert whole.version == 1, "one commit"
        wanted = memory_of_all(homes)
        assert_same(whole, wanted)
    assert Memory.open(tmp_path / "whole", verify=True).ids.tolist() == wanted.ids.tolist()


def memory_of_all(homes: list[Path]) -> Memory:
    return rm.merge_memories([Memory.open(home) for home in homes])


def test_no_row_is_copied_and_the_parts_may_go(parts: list[Path], tmp_path: Path) -> None:
    before = {path.stat().st_ino for part in parts for path in part.glob("rows-*")}
    joined(tmp_path / "whole", parts).close()
    assert {path.stat().st_ino for path in (tmp_path / "whole").glob("rows-*")} == before
    for part in parts:
        shutil.rmtree(part)
    with Memory.open(tmp_path / "whole", writable=True, verify=True) as memory:
        assert state_of(memory) == EVERYTHING
        add(memory, [40])
        memory.forget([3])
        memory.compact()
        assert state_of(memory) == EVERYTHING - {3} | {40}


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EPERM, errno.ENOTSUP])
def test_where_a_file_can_have_no_second_name_it_is_copied(
    parts: list[Path], tmp_path: Path, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(storage.Disk, "link", refused)
    joined(tmp_path / "whole", parts).close()
    before = {path.stat().st_ino for part in parts for path in part.glob("rows-*")}
    assert not {path.stat().st_ino for path in (tmp_path / "whole").glob("rows-*")} & before
    assert state_of(Memory.open(tmp_path / "whole", verify=True)) == EVERYTHING

    file = next(parts[1].glob("rows-*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptFile, match=f"{file.name} is damaged"):
        joined(tmp_path / "other", parts)
    assert names_in(tmp_path) == {"first", "second", "whole"}


def places(parts: list[Path], target: Path) -> Iterator[int]:
    """The calls to the disk that a join makes, by number."""
    with watching(Disk()) as disk:
        joined(target, parts).close()
    shutil.rmtree(target)
    return iter(range(len(disk.calls)))


def test_a_refused_call_leaves_the_parts_or_the_parts_and_the_whole(parts: list[Path], tmp_path: Path) -> None:
    refused = 0
    for place in places(parts, tmp_path / "whole"):
        try:
            with watching(Disk(place, errno.EIO)):
                joined(tmp_path / "whole", parts).close()
        except StorageFailure:
            refused += 1
        assert names_in(tmp_path) <= {"first", "second", "whole"}, "nothing that was begun lies about"
        if not (tmp_path / "whole").exists():
            joined(tmp_path / "whole", parts).close()
        assert state_of(Memory.open(tmp_path / "whole", verify=True)) == EVERYTHING
        shutil.rmtree(tmp_path / "whole")
    assert refused > 10


def test_a_kill_between_any_two_calls_leaves_the_parts_or_the_parts_and_the_whole(
    parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = []
    for place in places(parts, tmp_path / "whole"):
        child = os.fork()
        if not child:
            try:
                with watching(Dying(place)):
                    joined(tmp_path / "whole", parts)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == Dying.CODE
        there.append((tmp_path / "whole").exists())
        if not there[-1]:
            joined(tmp_path / "whole", parts).close()
        assert state_of(Memory.open(tmp_path / "whole", verify=True)) == EVERYTHING
        assert all(state_of(Memory.open(tmp_path / name, verify=True)) == set(ids) for name, ids in ROWS.items())
        shutil.rmtree(tmp_path / "whole")
    assert there == sorted(there), "once it is there it stays"
    assert len(set(there)) == 2


class Dying(Disk):
    """Ends the process at one of the calls, as SIGKILL would."""

    CODE = 99

    def watched(self, name: str, call: Any) -> Any:
        reached = super().watched(name, call)

        def reach(*arguments: Any, **options: Any) -> Any:
            if len(self.calls) == self._fails_at:
                os._exit(self.CODE)
            fails_at, self._fails_at = self._fails_at, None
            try:
                return reached(*arguments, **options)
            finally:
                self._fails_at = fails_at

        return reach


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"key_dtype": "float16"}, InvalidInput, r"the part at \S+b has key_dtype 'float16', but the part at \S+a has"),
        ({"n_outputs": 5}, DimensionMismatch, "has n_outputs 5"),
        ({"class_names": ["w", "x", "y", "z"]}, InvalidInput, "has class_names"),
        (
            {"groups": np.arange(60)},
            InvalidInput,
            r"groups of the part at \S+b: integer, but of the part at \S+a: none",
        ),
    ],
)
def test_parts_that_differ_are_refused(
    tmp_path: Path, options: dict[str, Any], kind: type[Exception], said: str
) -> None:
    memory_of(classification(), path=tmp_path / "a").close()
    memory_of(classification(), path=tmp_path / "b", ids=np.arange(60) + 60, **options).close()
    with pytest.raises(kind, match=said):
        joined(tmp_path / "whole", [tmp_path / "a", tmp_path / "b"])
    assert names_in(tmp_path) == {"a", "b"}


def test_an_id_in_two_parts_is_refused(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DuplicateId, match="20 ids are in two parts, for example 0"):
        joined(tmp_path / "whole", [parts[0], *parts])


def test_ids_that_do_not_ascend_are_no_fault(parts: list[Path], tmp_path: Path) -> None:
    with joined(tmp_path / "whole", parts[::-1]) as whole:
        assert whole.ids.tolist() == [*ROWS["second"], *ROWS["first"]]
        assert whole.next_id == 32


def test_forgotten_rows_are_not_carried_along(parts: list[Path], tmp_path: Path) -> None:
    with Memory.open(parts[0], writable=True) as memory:
        memory.forget([3])
        with pytest.raises(InvalidInput, match="holds 1 forgotten rows; compact it first"):
            joined(tmp_path / "whole", parts)
        memory.compact()
    with joined(tmp_path / "whole", parts) as whole:
        assert state_of(whole) == EVERYTHING - {3}


def test_what_is_no_memory_or_no_free_place_is_refused(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no parts"):
        joined(tmp_path / "whole", [])
    with pytest.raises(MemoryNotFound):
        joined(tmp_path / "whole", [*parts, tmp_path / "third"])
    with pytest.raises(InvalidInput, match="already exists"):
        joined(parts[0], parts)


def test_parts_without_rows_are_no_fault(parts: list[Path], tmp_path: Path) -> None:
    create(str(tmp_path / "empty")).close()
    with joined(tmp_path / "whole", [tmp_path / "empty", *parts]) as whole:
        assert state_of(whole) == EVERYTHING
    with joined(tmp_path / "nothing", [tmp_path / "empty"]) as whole:
        assert len(whole) == 0
        add(whole, [1])
