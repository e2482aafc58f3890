"""Many blocks in one commit: the same rows as by appending them, or none."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residual_memory.errors import DimensionMismatch, DuplicateId, InvalidInput, ReadOnlyMemory, StorageFailure
from residual_memory.memory import Memory, segments
from tests.memory.faults import Disk, watching
from tests.problems import LAYOUTS, Problem, empty_memory, memory_of, same_bits, told


def blocks_of(memory: Memory, problem: Problem, *sizes: int, **names: Any) -> Iterator[dict[str, Any]]:
    start = 0
    for size in sizes:
        part = problem.rows(slice(start, start + size))
        given = {name: column[start : start + size] for name, column in names.items()}
        yield {"keys": part.keys, "labels": part.labels, "predictions": told(memory, part), **given}
        start += size


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("named", [False, True])
def test_blocks_give_the_rows_of_as_many_appends_in_one_version(
    problem: Problem, place: Path | None, layout: str, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 500)
    names: dict[str, Any] = {"ids": np.arange(60)[::-1], "groups": np.arange(60) // 4} if named else {}
    extended = empty_memory(problem, place, **LAYOUTS[layout])
    assert extended.extend(blocks_of(extended, problem, 7, 0, 3, 50, **names)) == 60
    appended = empty_memory(problem, **LAYOUTS[layout])
    for block in blocks_of(appended, problem, 7, 0, 3, 50, **names):
        appended.append(**block)
    assert extended.version == 1
    assert extended.next_id == appended.next_id == 60
    assert len(extended.snapshot.tables) > 1
    rows = np.arange(60)
    for name in appended.layout.columns(appended.snapshot.manifest.top_m):
        assert same_bits(extended.snapshot.column(name).take(rows), appended.snapshot.column(name).take(rows))
    assert extended.ids.tolist() == appended.ids.tolist()
    if place is not None:
        extended.close()
        assert Memory.open(place, verify=True).ids.tolist() == appended.ids.tolist()


def test_rows_come_after_those_that_are_there(problem: Problem, place: Path | None) -> None:
    memory = memory_of(problem.rows(slice(0, 10)), place)
    memory.forget([2])
    assert memory.extend(blocks_of(memory, problem, 5, 5)) == 10
    assert memory.ids.tolist() == [0, 1, *range(3, 20)]
    assert memory.extend([]) == 0
    assert memory.version == 3


def test_ids_given_and_not_given_may_alternate(problem: Problem) -> None:
    memory = empty_memory(problem)
    first, second, third = blocks_of(memory, problem, 2, 2, 2)
    memory.extend([first, {**second, "ids": [50, 7]}, third])
    assert memory.ids.tolist() == [0, 1, 50, 7, 51, 52]


@pytest.mark.parametrize(
    ("second", "kind", "said"),
    [
        ({"ids": [3, 9]}, DuplicateId, "id 3 is given in more than one block"),
        ({"ids": [9, 9]}, DuplicateId, "begins with row 3: id 9 is given 2 times"),
        ({"ids": [9, 100]}, DuplicateId, "already holds 1 of the 2 ids, for example 100"),
        ({"ids": ["a", "b"]}, InvalidInput, "ids are of kind string"),
        ({"groups": [1, 2]}, InvalidInput, "groups are integer"),
        ({"keys": np.full((2, 5), np.nan)}, InvalidInput, r"begins with row 3: keys\[0, 0\] is nan"),
        ({"keys": np.zeros((2, 4))}, DimensionMismatch, "keys have dimension 4"),
        ({"kyes": 1}, InvalidInput, "a block holds 'kyes', expected keys, labels"),
    ],
)
def test_a_bad_block_leaves_nothing_of_any(
    problem: Problem,
    place: Path | None,
    second: dict[str, Any],
    kind: type[Exception],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1)
    memory = memory_of(problem.rows([0]), place, ids=[100])
    files = [] if place is None else sorted(place.iterdir())
    one, two = blocks_of(memory, problem, 3, 2)
    with pytest.raises(kind, match=said):
        memory.extend([{**one, "ids": [1, 2, 3]}, {**two, "ids": [4, 5], **second}])
    assert (memory.ids.tolist(), memory.version) == ([100], 1)
    assert files == ([] if place is None else sorted(place.iterdir()))


def test_a_missing_column_is_named(problem: Problem) -> None:
    memory = empty_memory(problem)
    with pytest.raises(InvalidInput, match="a block holds no labels, it has keys, predictions"):
        memory.extend([{"keys": problem.keys, "predictions": problem.predictions}])


def test_an_error_of_the_caller_leaves_nothing(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1)
    memory = memory_of(problem, tmp_path / "memory")
    files = sorted((tmp_path / "memory").iterdir())

    def broken() -> Iterator[dict[str, Any]]:
        yield from blocks_of(memory, problem, 5, 5)
        assert len(list((tmp_path / "memory").glob("rows-*"))) > 1, "rows are written as they come"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        memory.extend(broken())
    assert sorted((tmp_path / "memory").iterdir()) == files
    assert len(memory) == 60


def test_a_memory_that_is_changed_meanwhile_refuses(problem: Problem, place: Path | None) -> None:
    memory = memory_of(problem, place)

    def changing() -> Iterator[dict[str, Any]]:
        yield from blocks_of(memory, problem, 5)
        memory.forget([3])

    with pytest.raises(InvalidInput, match="changed while its new rows were read"):
        memory.extend(changing())
    assert len(memory) == 59


def test_a_disk_that_refuses_leaves_nothing(problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1)
    memory_of(problem, tmp_path / "memory").close()
    shutil.copytree(tmp_path / "memory", tmp_path / "copy")
    with Memory.open(tmp_path / "copy", writable=True) as memory, watching(Disk()) as disk:
        memory.extend(blocks_of(memory, problem, 5, 5, 5))
    committed = disk.names().index("rename")
    assert committed > 9
    for place in range(committed + 1):
        with Memory.open(tmp_path / "memory", writable=True) as memory:
            with watching(Disk(place)), pytest.raises(StorageFailure):
                memory.extend(blocks_of(memory, problem, 5, 5, 5))
            assert len(memory) == 60
        assert len(list((tmp_path / "memory").glob("rows-*"))) == 1
    assert Memory.open(tmp_path / "memory", verify=True).version == 1


def test_a_read_only_handle_refuses(problem: Problem, tmp_path: Path) -> None:
    memory_of(problem, tmp_path / "memory").close()
    memory = Memory.open(tmp_path / "memory")
    with pytest.raises(ReadOnlyMemory):
        memory.extend(blocks_of(memory, problem, 5))


def test_a_memory_is_copied_as_a_directory(problem: Problem, tmp_path: Path) -> None:
    memory = memory_of(problem, tmp_path / "memory", groups=[f"g{n}" for n in range(60)])
    memory.forget([1, 2])
    shutil.copytree(tmp_path / "memory", tmp_path / "copy")
    copied = Memory.open(tmp_path / "copy", writable=True, verify=True)
    assert copied.ids.tolist() == memory.ids.tolist()
    for name in memory.snapshot.tables[0]:
        assert (copied.snapshot.tables[0][name] == memory.snapshot.tables[0][name]).all()
    assert copied.snapshot.manifest == memory.snapshot.manifest
