import numpy as np
import pytest
from numpy import ndarray

from residual_memory.memory.lookup import SegmentIds, all_ascending, find_rows
from residual_memory.memory.snapshot import Column, Snapshot
from tests.problems import classification, empty_memory

ALIVE = np.ones(12, bool)


def segments(*ids: list) -> list[SegmentIds]:
    return [SegmentIds(np.array(some)) for some in ids]


@pytest.mark.parametrize("ids", [[0, 1, 5, 7, 9, 20], [9, 0, 7, 1, 20, 5]])
@pytest.mark.parametrize("cut", [1, 3, 6])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_row_is_found_wherever_its_id_lies(ids: list[int], cut: int, as_text: bool) -> None:
    known: ndarray = np.array(ids).astype(str) if as_text else np.array(ids)
    wanted: ndarray = np.array([5, 20, 3, 100, 0]).astype(known.dtype.kind)
    held = [SegmentIds(known[:cut]), SegmentIds(known[cut:])]
    rows = [ids.index(5), ids.index(20), -1, -1, ids.index(0)]
    np.testing.assert_array_equal(find_rows(held, ALIVE[:6], wanted), rows)


def test_an_id_given_again_is_the_row_that_is_alive() -> None:
    held = segments([7, 3, 7, 7], [3, 8])
    alive = np.array([False, False, True, False, True, True])
    np.testing.assert_array_equal(find_rows(held, alive, np.array([3, 7, 8])), [4, 2, 5])
    np.testing.assert_array_equal(find_rows(held, np.zeros(6, bool), np.array([3, 7, 8])), [-1, -1, -1])


def test_a_longer_text_is_not_its_beginning() -> None:
    np.testing.assert_array_equal(find_rows(segments(["a", "ab"]), ALIVE[:2], np.array(["abc", "ab", ""])), [-1, 1, -1])


@pytest.mark.parametrize(
    ("held", "ascend"),
    [
        ([], True),
        ([[1, 2], [3]], True),
        ([[1, 2], [], [3]], True),
        ([[1, 2], [2]], False),
        ([[2, 1], [3]], False),
        ([[3], [1, 2]], False),
        ([[1], [4, 3]], False),
    ],
)
def test_ids_ascend_over_all_segments_or_not(held: list[list[int]], ascend: bool) -> None:
    assert all_ascending([SegmentIds(np.array(ids, np.int64)) for ids in held]) is ascend


def test_what_was_learned_of_a_segment_serves_the_next_version(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = classification(n=40)
    memory = empty_memory(problem)
    looked_at: list[int] = []
    original = SegmentIds.ascending.func  # type: ignore[attr-defined]

    def counted(self: SegmentIds) -> bool:
        looked_at.append(len(self))
        return bool(original(self))

    monkeypatch.setattr(SegmentIds.ascending, "func", counted)
    for first, last in [(0, 30), (30, 36), (36, 40)]:
        rows = problem.rows(slice(first, last))
        memory.append(rows.keys, rows.labels, rows.predictions)
        assert memory.snapshot.tie_ranks is None
    assert looked_at == [30, 6, 4]
    assert "all_ids" not in vars(memory.snapshot), "ids that ascend are not joined in RAM"


@pytest.mark.parametrize("n_parts", [1, 2, 300])
@pytest.mark.parametrize("shape", [(400,), (400, 3)])
def test_a_column_in_parts_gives_what_the_whole_would(n_parts: int, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    cuts = np.sort(np.random.default_rng(1).integers(0, 400, n_parts - 1))
    column = Column(np.split(values, cuts), values[:0])
    rows = np.random.default_rng(2).integers(0, 400, (20, 7))
    np.testing.assert_array_equal(column.take(rows), values[rows])
    gathered, places = column.gathered(rows.ravel())
    np.testing.assert_array_equal(gathered[places], values[rows.ravel()])
    assert column.n_parts == n_parts


def test_no_rows_are_taken_from_parts() -> None:
    column = Column([np.zeros((2, 3)), np.zeros((1, 3))], np.zeros((0, 3)))
    assert column.take(np.zeros((0, 4), np.int64)).shape == (0, 4, 3)
    assert column.gathered(np.zeros(0, np.int64))[0].shape == (0, 3)


def test_a_snapshot_of_other_tables_knows_nothing_of_them() -> None:
    first, second = empty_memory(classification()), empty_memory(classification())
    for memory, ids in [(first, [1, 0]), (second, [0, 1])]:
        rows = classification(n=2)
        memory.append(rows.keys, rows.labels, rows.predictions, ids=ids)
    mixed = Snapshot(second.snapshot.manifest, second.snapshot.tables, second.snapshot.forgotten, first.snapshot)
    np.testing.assert_array_equal(mixed.rows_of(np.array([0, 1])), [0, 1])
