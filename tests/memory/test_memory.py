import copy
import json
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy import ndarray

from residual_memory.errors import (
    DimensionMismatch,
    DuplicateId,
    InvalidInput,
    MemoryNotFound,
    ReadOnlyMemory,
    UnknownId,
)
from residual_memory.memory import Memory, segments, verify
from residual_memory.memory.codes import LOG_SCALES
from residual_memory.residuals import top_m
from residual_memory.types import TopM
from tests import reference
from tests.problems import (
    LAYOUTS,
    Problem,
    classification,
    empty_memory,
    in_plain_python,
    knn_of,
    memory_of,
    regression,
    told,
)


def grow(memory: Memory, problem: Problem, chosen: Any, **names: Any) -> ndarray:
    """Append some of the problem's rows."""
    part = problem.rows(chosen)
    return memory.append(part.keys, part.labels, told(memory, part), **names)


# ---------------------------------------------------------------------- append


def test_ids_are_given_in_order_and_never_twice(problem: Problem, place: Path | None) -> None:
    memory = empty_memory(problem, place)
    assert grow(memory, problem, slice(0, 3)).tolist() == [0, 1, 2]
    memory.forget([1, 2])
    memory.compact()
    assert grow(memory, problem, slice(0, 2)).tolist() == [3, 4]
    assert grow(memory, problem, [0], ids=[10]).tolist() == [10]
    assert grow(memory, problem, [0]).tolist() == [11]
    assert grow(memory, problem, [0], ids=[7]).tolist() == [7]
    assert grow(memory, problem, [0]).tolist() == [12]
    assert memory.ids.tolist() == [0, 3, 4, 10, 11, 7, 12]


def test_ids_given_after_reopening_are_new_too(problem: Problem, tmp_path: Path) -> None:
    with memory_of(problem.rows(slice(0, 3)), tmp_path / "m") as memory:
        memory.forget([2])
        memory.compact()
    with Memory.open(tmp_path / "m", writable=True) as memory:
        assert grow(memory, problem, [0]).tolist() == [3]


def test_after_the_largest_id_of_all_the_user_must_name_the_rows(problem: Problem, place: Path | None) -> None:
    memory = empty_memory(problem, place)
    grow(memory, problem, [0], ids=[2**63 - 1])
    with pytest.raises(InvalidInput, match="ids"):
        grow(memory, problem, [1])
    assert grow(memory, problem, [1], ids=[5]).tolist() == [5]


def test_a_forgotten_id_may_come_back_with_another_row(problem: Problem, place: Path | None) -> None:
    memory = memory_of(problem, place)
    memory.forget([3])
    grow(memory, problem, [4], ids=[3])
    found = knn_of(memory, n_neighbors=2).neighbors(problem.keys[4:5])
    assert found.ids.tolist() == [[3, 4]]
    assert found.distances.tolist() == [[0, 0]]


@pytest.mark.parametrize("kind", ["ids", "groups"])
def test_a_memory_keeps_nothing_of_the_callers_arrays(problem: Problem, kind: str, place: Path | None) -> None:
    memory = empty_memory(problem, place)
    keys, said, labels = problem.keys[:2].copy(), problem.predictions[:2].copy(), problem.labels[:2].copy()
    names = np.array(["a", "b"])
    named: dict[str, Any] = {"ids": np.array(["c", "d"]), kind: names}
    given = memory.append(keys, labels, said, **named)
    keys[:], said[:], labels[:], names[:], given[:] = 9, 9, 9, "z", "y"
    assert memory.snapshot.ids.tolist() == (["a", "b"] if kind == "ids" else ["c", "d"])
    assert memory.snapshot.all_groups is None or memory.snapshot.all_groups.tolist() == ["a", "b"]
    np.testing.assert_array_equal(memory.snapshot.keys.take(np.arange(2)), problem.keys[:2])
    np.testing.assert_array_equal(memory.snapshot.predictions(np.arange(2)), problem.predictions[:2])
    np.testing.assert_array_equal(memory.snapshot.targets(np.arange(2)), problem.labels[:2])


def test_the_ids_of_a_memory_are_a_copy(problem: Problem) -> None:
    memory = memory_of(problem)
    memory.ids[:] = 7
    assert memory.ids.tolist() == list(range(60))


def test_an_empty_append_changes_nothing(problem: Problem, place: Path | None) -> None:
    memory = empty_memory(problem, place)
    assert grow(memory, problem, slice(0, 0)).tolist() == []
    assert (len(memory), memory.version) == (0, 0)


def test_every_change_counts_one_version(problem: Problem, place: Path | None) -> None:
    memory = memory_of(problem, place)
    memory.forget([1])
    memory.compact()
    memory.save_setting({"n_neighbors": 3})
    assert memory.version == 4


def test_many_small_appends_make_few_segments(problem: Problem, place: Path | None) -> None:
    memory = empty_memory(problem, place)
    for row in range(60):
        grow(memory, problem, [row])
    assert len(memory.snapshot.tables) <= 7
    np.testing.assert_array_equal(memory.snapshot.keys.take(np.arange(60)), problem.keys)
    assert memory.ids.tolist() == list(range(60))


def test_small_segments_are_not_joined_beyond_their_limit(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MERGE_BYTES", 0)
    memory = empty_memory(problem)
    for row in range(5):
        grow(memory, problem, [row])
    assert len(memory.snapshot.tables) == 5
    np.testing.assert_array_equal(memory.snapshot.keys.take(np.array([[3, 0], [4, 1]])), problem.keys[[[3, 0], [4, 1]]])


BAD_ROWS: dict[str, dict[str, Any]] = {
    "nan keys": {"keys": [[np.nan] * 5]},
    "infinite keys": {"keys": [[np.inf] * 5]},
    "keys of 1e30": {"keys": [[1e30] * 5]},
    "narrow keys": {"keys": [[0.0] * 4]},
    "one key too many": {"keys": [[0.0] * 5] * 2},
    "nan predictions": {"predictions": [[np.nan, 0.5, 0.5, 0.0]]},
    "predictions that sum to 2": {"predictions": [[0.5, 0.5, 0.5, 0.5]]},
    "logits": {"predictions": [[2.0, -1.0, 0.0, 0.0]]},
    "wide predictions": {"predictions": [[0.2] * 5]},
    "no predictions": {"predictions": np.zeros((0, 4))},
    "top-m predictions": {"predictions": TopM(np.array([[0]]), np.array([[1.0]]), np.array([0.0]))},
    "a label too large": {"labels": [4]},
    "a negative label": {"labels": [-1]},
    "a nan label": {"labels": [np.nan]},
    "two labels": {"labels": [0, 1]},
    "a held id": {"ids": [7]},
    "a negative id": {"ids": [-1]},
    "a fractional id": {"ids": [0.5]},
    "a string id": {"ids": ["seven"]},
    "two ids": {"ids": [100, 101]},
    "a group": {"groups": [1]},
}


@pytest.mark.parametrize("bad", BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_that_do_not_fit_are_refused_and_nothing_is_added(
    problem: Problem, bad: dict[str, Any], place: Path | None
) -> None:
    memory = memory_of(problem, place)
    files = sorted(entry.name for entry in place.iterdir()) if place else []
    row = {"keys": problem.keys[:1], "labels": [0], "predictions": problem.predictions[:1], **bad}
    with pytest.raises(InvalidInput):
        memory.append(**row)
    assert (len(memory), memory.version) == (60, 1)
    assert files == (sorted(entry.name for entry in place.iterdir()) if place else [])
    assert memory.append(problem.keys[:1], [0], problem.predictions[:1]).tolist() == [60]


def test_an_id_given_twice_or_held_already_is_named(problem: Problem) -> None:
    memory = memory_of(problem)
    with pytest.raises(DuplicateId, match="100 is given 2 times"):
        grow(memory, problem, [0, 1, 2], ids=[100, 101, 100])
    with pytest.raises(DuplicateId, match=r"already holds 2 of the 3 ids.*forget"):
        grow(memory, problem, [0, 1, 2], ids=[100, 3, 59])


def test_a_string_memory_gives_no_ids_by_itself(problem: Problem) -> None:
    memory = memory_of(problem.rows([0]), ids=["a"])
    with pytest.raises(InvalidInput, match="pass ids="):
        grow(memory, problem, [1])
    with pytest.raises(InvalidInput, match="kind"):
        grow(memory, problem, [1], ids=[1])


def test_all_rows_have_a_group_or_none_has(problem: Problem, place: Path | None) -> None:
    memory = memory_of(problem.rows([0]), place, groups=["document"])
    for groups in (None, [1]):
        with pytest.raises(InvalidInput, match="groups"):
            grow(memory, problem, [1], groups=groups)
    grow(memory, problem, [1], groups=["a longer document"])
    assert memory.snapshot.all_groups is not None
    assert memory.snapshot.all_groups.tolist() == ["document", "a longer document"]


def test_a_lone_surrogate_is_no_id_wherever_the_memory_lives(problem: Problem, place: Path | None) -> None:
    with pytest.raises(InvalidInput):
        memory_of(problem.rows([0]), place, ids=["\ud800"])


def test_top_m_rows_keep_the_m_of_the_first(problem: Problem, place: Path | None) -> None:
    memory = empty_memory(problem, place, residuals="top-m")
    memory.append(problem.keys, problem.labels, top_m(problem.predictions, 2))
    with pytest.raises(DimensionMismatch, match=r"top 3.*top 2"):
        memory.append(problem.keys, problem.labels, top_m(problem.predictions, 3))
    with pytest.raises(InvalidInput, match="TopM"):
        memory.append(problem.keys, problem.labels, problem.predictions)


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_that_came_one_by_one_are_as_those_that_came_at_once(
    problem: Problem, place: Path | None, options: dict[str, Any]
) -> None:
    rounding = 1e-3 if options.get("prediction_dtype") == "float16" else 1e-6
    memory = empty_memory(problem, place, **options)
    for row in range(60):
        grow(memory, problem, [row])
    memory.forget([0, 7, 59])
    before = [memory.snapshot.residuals(memory.snapshot.rows_of(memory.ids), 1.0)]
    memory.compact()
    kept = memory_of(problem.rows(np.setdiff1d(np.arange(60), [0, 7, 59])), **options)
    for found in (*before, memory.snapshot.residuals(np.arange(57), 1.0)):
        np.testing.assert_array_equal(found, kept.snapshot.residuals(np.arange(57), 1.0))
        np.testing.assert_allclose(found.sum(axis=1), 0, atol=rounding)


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_an_empty_memory_has_no_residuals(problem: Problem, options: dict[str, Any]) -> None:
    snapshot = empty_memory(problem, **options).snapshot
    assert snapshot.residuals(np.arange(0), 1.0).shape == (0, snapshot.layout.n_outputs)


@pytest.mark.parametrize("scale", LOG_SCALES)
def test_a_log_scale_is_for_top_m_alone(scale: str) -> None:
    for task in ("classification", "regression"):
        with pytest.raises(InvalidInput, match=r"prediction_dtype.*top-m"):
            Memory.create(dim=2, n_outputs=3, task=task, prediction_dtype=scale)


@pytest.mark.parametrize("scale", LOG_SCALES)
def test_a_row_on_a_log_scale_must_be_a_distribution_too(problem: Problem, scale: str) -> None:
    memory = empty_memory(problem, residuals="top-m", prediction_dtype=scale)
    for listed, rest in (([0.5, 0.2], 0.9), ([1.2, -0.2], 0.0), ([np.nan, 0.5], 0.5)):
        with pytest.raises(InvalidInput):
            memory.append(problem.keys[:1], [0], TopM(np.array([[0, 1]]), np.array([listed]), np.array([rest])))
    assert len(memory) == 0


@pytest.mark.parametrize("n_outputs", [65_536, 65_537])
def test_the_last_class_of_a_top_m_memory_is_kept(place: Path | None, n_outputs: int) -> None:
    memory = Memory.create(place, dim=1, n_outputs=n_outputs, residuals="top-m", prediction_dtype="log8")
    last = n_outputs - 1
    memory.append([[0.0]], [last], TopM(np.array([[last, 40_000]]), np.array([[0.75, 0.25]]), np.array([0.0])))
    snapshot, row = memory.snapshot, np.array([0])
    assert snapshot.column("labels").dtype == (np.uint16 if n_outputs == 65_536 else np.int32)
    np.testing.assert_array_equal(snapshot.targets(row), np.array([last], np.int32), strict=True)
    np.testing.assert_array_equal(snapshot.top_m(row).indices, np.array([[last, 40_000]], np.int32), strict=True)
    residual = snapshot.residuals(row, 1.0)[0]
    np.testing.assert_allclose(residual[[last, 40_000]], [0.25, -0.25], rtol=0.06)
    assert np.flatnonzero(residual).tolist() == [40_000, last]


@pytest.mark.parametrize("prediction_dtype", ["float16", "float32", "float64", "log8", "log16"])
@pytest.mark.parametrize("merged", [0, segments.MERGE_BYTES])
def test_top_m_rows_come_in_the_shape_that_was_asked_for(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, prediction_dtype: str, merged: int
) -> None:
    monkeypatch.setattr(segments, "MERGE_BYTES", merged)
    memory = memory_of(problem, residuals="top-m", prediction_dtype=prediction_dtype)
    grow(memory, problem, slice(0, 10))
    rows = np.array([[[0, 69, 3]], [[65, 65, 1]]])
    several, one = memory.snapshot.top_m(rows), memory.snapshot.top_m(rows.ravel())
    assert (several.indices.shape, several.rest.shape) == ((2, 1, 3, 2), (2, 1, 3))
    assert several.probabilities.dtype == (np.float64 if prediction_dtype == "float64" else np.float32)
    np.testing.assert_array_equal(several.indices.reshape(-1, 2), one.indices)
    np.testing.assert_array_equal(several.probabilities.reshape(-1, 2), one.probabilities)
    np.testing.assert_array_equal(several.rest.ravel(), one.rest)
    listed = np.take_along_axis(problem.predictions[rows % 60], several.indices.astype(np.int64), -1)
    np.testing.assert_allclose(several.probabilities, listed, rtol=0.066 if prediction_dtype == "log8" else 1e-3)


def test_half_precision_refuses_what_it_cannot_hold(problem: Problem) -> None:
    memory = empty_memory(problem, key_dtype="float16")
    with pytest.raises(InvalidInput, match="float32"):
        memory.append(problem.keys * 1e6, problem.labels, problem.predictions)


def test_one_axis_of_targets_is_one_output() -> None:
    problem = regression(c=1)
    memory = empty_memory(problem)
    memory.append(problem.keys, problem.labels[:, 0], problem.predictions[:, 0])
    np.testing.assert_array_equal(memory.snapshot.targets(np.arange(60)), problem.labels)


# ---------------------------------------------------------------------- forget and compact


def test_forgetting_masks_at_once_and_compaction_erases(problem: Problem, place: Path | None) -> None:
    memory = memory_of(problem, place)
    memory.forget([5, 3, 5])
    assert (len(memory), memory.n_forgotten) == (58, 2)
    assert not {3, 5} & set(memory.ids.tolist())
    memory.compact()
    assert (len(memory), memory.n_forgotten, memory.snapshot.n_rows) == (58, 0, 58)


@pytest.mark.parametrize("unknown", [[60], [1, 60, 61], ["1"], [2**63 - 1], 99])
def test_an_unknown_id_is_named_and_nothing_is_forgotten(problem: Problem, unknown: Any, place: Path | None) -> None:
    memory = memory_of(problem, place)
    with pytest.raises(UnknownId, match="for example"):
        memory.forget(np.asarray(unknown))
    assert (len(memory), memory.version) == (60, 1)


def test_a_row_can_be_forgotten_once(problem: Problem, place: Path | None) -> None:
    memory = memory_of(problem, place)
    memory.forget(np.array(4))
    with pytest.raises(UnknownId, match="4"):
        memory.forget([4, 5])
    assert len(memory) == 59


def test_forgetting_nothing_is_no_change(problem: Problem) -> None:
    memory = memory_of(problem)
    memory.forget([])
    memory.compact()
    assert memory.version == 1


def test_strings_are_forgotten_by_their_name(problem: Problem, place: Path | None) -> None:
    memory = memory_of(problem.rows(slice(0, 3)), place, ids=["zebra", "a", "mole"])
    memory.forget(["a", "zebra"])
    memory.compact()
    assert memory.ids.tolist() == ["mole"]


def test_a_memory_can_be_emptied_and_filled_again(problem: Problem, place: Path | None) -> None:
    memory = memory_of(problem, place)
    memory.forget(memory.ids)
    memory.compact()
    assert (len(memory), memory.snapshot.n_rows) == (0, 0)
    assert grow(memory, problem, [0]).tolist() == [60]


def test_erased_rows_are_in_no_file(problem: Problem, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    names = [f"person-{number:02d}" for number in range(60)]
    with memory_of(problem, path, ids=names, groups=[f"letter-{name}" for name in names]) as memory:
        canaries = [problem.keys[7].tobytes(), problem.predictions[7].tobytes(), b"person-07", b"letter-person-07"]
        assert all(found(path, canary) for canary in canaries)
        memory.forget(["person-07"])
        memory.compact()
        assert not any(found(path, canary) for canary in canaries)
        assert found(path, b"person-08")
        assert memory.verify().ok


def found(path: Path, canary: bytes) -> bool:
    return any(canary in file.read_bytes() for file in path.iterdir())


def test_compaction_splits_into_segments_of_the_wanted_size(
    problem: Problem, place: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = memory_of(problem, place)
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 20 * memory.n_bytes // 60)
    memory.forget([0])
    memory.compact()
    assert len(memory.snapshot.tables) >= 3
    np.testing.assert_array_equal(memory.snapshot.keys.take(np.arange(59)), problem.keys[1:])


# ---------------------------------------------------------------------- create, open, close


BAD_OPTIONS: dict[str, Any] = {
    "dim": [0, -1, 1.5, "2"],
    "n_outputs": [0, None],
    "task": ["ranking"],
    "metric": ["manhattan"],
    "residuals": ["sparse"],
    "key_dtype": ["int8"],
    "prediction_dtype": ["bfloat16", "log8", "log16", "log32"],
    "class_names": [["one"]],
}

CREATE_ALL = """
import json, sys
from pathlib import Path
from residual_memory.errors import InvalidInput
from residual_memory.memory import Memory
for option, values in json.loads(sys.argv[2]).items():
    for value in values:
        try:
            Memory.create(sys.argv[1], **{"dim": 2, "n_outputs": 3, option: value})
        except InvalidInput as error:
            assert option in str(error), error
        else:
            raise AssertionError(f"{option}={value!r} was taken")
        assert not Path(sys.argv[1]).exists()
"""


def test_an_option_that_is_not_known_is_named_and_makes_no_memory(tmp_path: Path) -> None:
    in_plain_python(CREATE_ALL, str(tmp_path / "memory"), json.dumps(BAD_OPTIONS))


def test_regression_keeps_no_top_m() -> None:
    with pytest.raises(InvalidInput, match="top-m"):
        Memory.create(dim=2, n_outputs=1, task="regression", residuals="top-m")


def test_nothing_is_made_where_something_is(tmp_path: Path, problem: Problem) -> None:
    memory_of(problem, tmp_path / "memory").close()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("memory", "notes", "file"):
        with pytest.raises(InvalidInput, match="already exists"):
            empty_memory(problem, tmp_path / name)
    assert len(Memory.open(tmp_path / "memory")) == 60
    empty_memory(problem, tmp_path / "new" / "below").close()


@pytest.mark.parametrize("name", ["nothing", "file", "folder", "file/below", "a\0b"])
def test_opening_what_is_no_memory_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(MemoryNotFound, match="no memory"):
        Memory.open(tmp_path / name)


def test_verifying_what_is_no_memory_says_so(tmp_path: Path) -> None:
    with pytest.raises(MemoryNotFound):
        verify(tmp_path / "nothing")


CHANGES: list[Callable[[Memory], Any]] = [
    lambda memory: memory.append(np.zeros((1, 5)), [0], [[1.0, 0, 0, 0]]),
    lambda memory: memory.forget([1]),
    lambda memory: memory.compact(),
    lambda memory: memory.save_setting({}),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("closed", [False, True])
def test_a_handle_that_may_not_write_refuses_every_change(
    problem: Problem, tmp_path: Path, change: Callable[[Memory], Any], closed: bool
) -> None:
    memory = memory_of(problem, tmp_path / "memory")
    memory.close()
    handle = memory if closed else Memory.open(tmp_path / "memory")
    with pytest.raises(ReadOnlyMemory, match="writable=True"):
        change(handle)
    assert (len(handle), handle.version) == (60, 1)


def test_a_memory_is_closed_by_its_context_even_on_an_error(problem: Problem, tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        with memory_of(problem, tmp_path / "memory"):
            raise KeyError
    Memory.open(tmp_path / "memory", writable=True).close()


def test_a_memory_describes_itself(problem: Problem, place: Path | None) -> None:
    memory = memory_of(problem, place)
    assert "60 rows, dim 5, 4 outputs" in repr(memory)
    assert memory.path == place
    assert memory.verify().ok
    bytes_per_row = 8 + 5 * 8 + 4 + 4 * 8
    assert 60 * bytes_per_row <= memory.n_bytes <= 60 * bytes_per_row + 1000
    assert memory.layout.bytes_per_row() == bytes_per_row


# ---------------------------------------------------------------------- copies

COPIES: dict[str, Callable[[Any], Any]] = {
    "pickled": lambda given: pickle.loads(pickle.dumps(given)),
    "deep": copy.deepcopy,
    "shallow": copy.copy,
}
every_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


def rich_memory(problem: Problem, place: Path | None = None, **options: Any) -> Memory:
    """Rows of named documents in two segments, some forgotten, with all that a memory keeps beside rows."""
    memory = empty_memory(problem, place, source={"model": "m", "layers": [1, 2]}, **options)
    for rows in (np.arange(40), np.arange(40, 50)):
        names = [f"row {row}" for row in rows]
        grow(memory, problem, rows, ids=names, groups=[f"document {row // 4}" for row in rows])
    memory.forget(["row 3", "row 17", "row 49"])
    memory.save_setting({"n_neighbors": 3, "gate": None})
    return memory


def whole(memory: Memory) -> dict[str, Any]:
    """All that can be seen of a memory."""
    snapshot = memory.snapshot
    rows = np.arange(snapshot.n_rows)
    assert snapshot.all_groups is not None
    return {
        "rows": [snapshot.keys.take(rows).tolist(), snapshot.targets(rows).tolist()],
        "residuals": snapshot.residuals(rows, 1.0).tolist(),
        "ids": [memory.ids.tolist(), snapshot.id_column.take(rows).tolist()],
        "groups": snapshot.all_groups.tolist(),
        "alive": snapshot.alive.tolist(),
        "counts": [len(memory), memory.version, memory.next_id, memory.n_forgotten, memory.n_bytes],
        "described": [memory.layout, memory.class_names, memory.source, memory.setting, memory.path],
    }


@every_copy
@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_a_copy_of_a_memory_in_ram_holds_the_same_rows(
    problem: Problem, copied: Callable[[Any], Any], options: dict[str, Any]
) -> None:
    memory = rich_memory(problem, class_names=None if "n_outputs" in options else list("abcd"), **options)
    other = copied(memory)
    assert whole(other) == whole(memory)
    assert len(other) == 47
    exclude = ["document 1"] * 12
    wanted, found = (knn_of(some)(problem.queries, exclude) for some in (memory, other))
    np.testing.assert_array_equal(found, wanted)


@every_copy
def test_a_copy_of_an_empty_memory_can_be_filled(problem: Problem, copied: Callable[[Any], Any]) -> None:
    memory = empty_memory(problem)
    other = copied(memory)
    grow(other, problem, slice(None))
    assert (len(memory), len(other)) == (0, 60)
    np.testing.assert_array_equal(knn_of(other)(problem.queries), knn_of(memory_of(problem))(problem.queries))


COPY_CHANGES: list[Callable[[Memory, Problem], Any]] = [
    lambda memory, problem: grow(memory, problem, [50, 51], ids=["new", "newer"], groups=["a", "b"]),
    lambda memory, _: memory.forget(["row 4"]),
    lambda memory, _: memory.compact(),
    lambda memory, _: memory.save_setting({"n_neighbors": 9}),
    lambda memory, _: memory.save_source({"model": "other"}),
]


@every_copy
@pytest.mark.parametrize("change", COPY_CHANGES, ids=["append", "forget", "compact", "setting", "source"])
@pytest.mark.parametrize("of_the_copy", [True, False])
def test_changing_a_copy_leaves_the_original_and_the_other_way_round(
    problem: Problem, copied: Callable[[Any], Any], change: Callable[[Memory, Problem], Any], of_the_copy: bool
) -> None:
    memory = rich_memory(problem)
    other = copied(memory)
    changed, kept = (other, memory) if of_the_copy else (memory, other)
    before = whole(kept)
    change(changed, problem)
    assert whole(changed) != before
    assert whole(kept) == before


def test_copies_give_the_same_new_ids(problem: Problem) -> None:
    memory = memory_of(problem)
    memory.forget([59])
    memory.compact()
    other = pickle.loads(pickle.dumps(memory))
    assert grow(other, problem, [0, 1]).tolist() == grow(memory, problem, [0, 1]).tolist() == [60, 61]


@every_copy
def test_a_copy_of_a_memory_on_disk_opens_it_again_read_only(
    problem: Problem, tmp_path: Path, copied: Callable[[Any], Any]
) -> None:
    with rich_memory(problem, tmp_path / "memory") as memory:
        other = copied(memory)  # while the original holds the lock
        assert whole(other) == whole(memory)
        assert other.path == tmp_path / "memory"
        with pytest.raises(ReadOnlyMemory):
            other.forget(["row 4"])
        memory.forget(["row 4"])
        assert (len(memory), len(other)) == (46, 47)
        assert other.refresh()
        assert whole(other) == whole(memory)


def test_a_memory_on_disk_is_unpickled_as_it_is_by_then(problem: Problem, tmp_path: Path) -> None:
    with rich_memory(problem, tmp_path / "memory") as memory:
        kept = pickle.dumps(memory)
        memory.forget(["row 4"])
    assert len(kept) < 1000  # the path, no rows
    assert len(pickle.loads(kept)) == 46


def test_a_memory_whose_directory_is_gone_cannot_be_unpickled(problem: Problem, tmp_path: Path) -> None:
    with memory_of(problem, tmp_path / "memory") as memory:
        kept = pickle.dumps(memory)
    shutil.rmtree(tmp_path / "memory")
    with pytest.raises(MemoryNotFound, match="no memory at"):
        pickle.loads(kept)


# ---------------------------------------------------------------------- readers beside a writer


def test_a_reader_sees_the_version_it_opened_until_it_refreshes(problem: Problem, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    writer = memory_of(problem.rows(slice(0, 30)), path)
    reader = Memory.open(path)
    knn = knn_of(reader)
    before = knn(problem.queries)
    for change in (
        lambda: grow(writer, problem, slice(30, 60)),
        lambda: writer.forget(np.arange(10)),
        lambda: writer.compact(),
    ):
        change()
        assert (reader.version, len(reader)) == (1, 30)
        np.testing.assert_array_equal(knn(problem.queries), before)
        fresh = knn_of(Memory.open(path))(problem.queries)
        np.testing.assert_allclose(fresh, knn_of(writer)(problem.queries), atol=1e-14)
    assert reader.refresh()
    assert (reader.version, len(reader)) == (4, 50)
    np.testing.assert_allclose(knn(problem.queries), knn_of(writer)(problem.queries), atol=1e-14)
    assert not reader.refresh()
    assert not writer.refresh()


def test_a_snapshot_never_changes(problem: Problem, place: Path | None) -> None:
    memory = memory_of(problem.rows(slice(0, 30)), place)
    snapshot = memory.snapshot
    memory.forget([0])
    memory.compact()
    grow(memory, problem, slice(30, 60))
    assert (len(snapshot), snapshot.ids.tolist()) == (30, list(range(30)))
    np.testing.assert_array_equal(snapshot.keys.take(np.arange(30)), problem.keys[:30])


def test_threads_that_query_always_see_one_committed_version(problem: Problem, place: Path | None) -> None:
    memory = memory_of(problem.rows(slice(0, 10)), place)
    knn = knn_of(memory, n_neighbors=200 if len(memory) >= 200 else 10, bandwidth=1e6)
    errors: list[BaseException] = []
    seen: set[int] = set()
    done = threading.Event()

    def query() -> None:
        try:
            while not done.is_set():
                snapshot, listed = knn.search(problem.queries, 200)
                counts = (listed.rows >= 0).sum(axis=1)
                assert (counts == len(snapshot)).all()
                assert len(snapshot) % 10 == 0
                assert np.isfinite(knn(problem.queries)).all()
                found, parts = knn.contributions(problem.queries)
                assert np.abs(parts.sum(axis=2)).max() < 1e-12
                np.testing.assert_allclose(found.weights.sum(axis=1), 1)
                seen.add(len(snapshot))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=query) for _ in range(4)]
    for thread in threads:
        thread.start()
    for step in range(12):
        ids = grow(memory, problem, slice(10 * (step % 6), 10 * (step % 6) + 10))
        if step % 3 == 2:
            memory.forget(ids)
        if step % 4 == 3:
            memory.compact()
    done.set()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    assert len(seen) >= 1
    assert len(memory) == 90


READER = """
import sys
import numpy as np
from residual_memory.correction import ResidualKNN
from residual_memory.memory import Memory
memory = Memory.open(sys.argv[1])
print("open", flush=True)
knn = ResidualKNN(memory, n_neighbors=1, bandwidth=1.0, index="exact:numpy")
versions = set()
while memory.setting is None:
    memory.refresh()
    ids = memory.ids
    assert len(ids) % 10 == 0, len(ids)
    found = knn.neighbors(ids[:, None].astype(float))
    assert (found.ids[:, 0] == ids).all() and not found.distances.any()
    versions.add(memory.version)
print(len(versions), memory.version, len(memory))
"""


def test_reading_processes_always_see_one_committed_version(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    ten = np.arange(10)
    said = np.full((10, 2), 0.5)
    writer = Memory.create(path, dim=1, n_outputs=2)
    writer.append(ten[:, None], np.zeros(10, int), said)
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, str(path)], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [reader.stdout.readline() for reader in readers if reader.stdout] == ["open\n"] * 3
    for step in range(1, 31):
        ids = writer.append(ten[:, None] + 10 * step, np.zeros(10, int), said)
        if step % 3 == 0:
            writer.forget(ids)
        if step % 5 == 0:
            writer.compact()
    writer.save_setting({"done": True})
    for reader in readers:
        output, _ = reader.communicate(timeout=60)
        assert reader.returncode == 0
        n_versions, last, n_rows = map(int, output.split())
        assert n_versions >= 1
        assert (last, n_rows) == (writer.version, 210)


# ---------------------------------------------------------------------- any sequence of changes


def owner_of(row: int) -> str:
    return f"owner {row % 3}"


class AnySequence(RuleBasedStateMachine):
    """Add, forget by id or by owner, compact, reopen and query in any order, beside a dict that does the same."""

    def __init__(self) -> None:
        super().__init__()
        self.problem = classification(n=40, d=2, c=3)
        self.held: dict[int, int] = {}  # id → row of the problem
        self.carrying: set[int] = set()  # ids of the rows that have an owner and a snippet
        self.memory: Memory | None = None

    @initialize(folder=st.booleans(), layout=st.sampled_from(sorted(LAYOUTS)))
    def create(self, folder: bool, layout: str) -> None:
        self.folder = tempfile.TemporaryDirectory() if folder else None
        self.path = Path(self.folder.name) / "memory" if self.folder else None
        self.memory = empty_memory(self.problem, self.path, **LAYOUTS[layout])
        self.whole = memory_of(self.problem, **LAYOUTS[layout]).snapshot

    @rule(rows=st.lists(st.integers(0, 39), max_size=6))
    def add(self, rows: list[int]) -> None:
        assert self.memory is not None
        carrying = {"owners": [owner_of(row) for row in rows], "snippets": [f"row {row}" for row in rows]}
        ids = grow(self.memory, self.problem, np.array(rows, int), **(carrying if len(rows) % 2 else {}))
        self.carrying |= set(ids.tolist()) if len(rows) % 2 else set()
        assert not set(ids.tolist()) & set(self.held)
        self.held.update(zip(ids.tolist(), rows, strict=True))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        assert self.memory is not None
        ids = data.draw(st.lists(st.sampled_from(sorted(self.held)), min_size=1, max_size=4))
        self.memory.forget(ids)
        for name in set(ids):
            del self.held[name]

    @rule(number=st.integers(0, 2))
    def forget_an_owner(self, number: int) -> None:
        assert self.memory is not None
        theirs = {i for i, row in self.held.items() if i in self.carrying and owner_of(row) == owner_of(number)}
        assert self.memory.forget(where={"owner": owner_of(number)}) == len(theirs)
        for name in theirs:
            del self.held[name]

    @rule()
    def compact(self) -> None:
        assert self.memory is not None
        self.memory.compact()

    @precondition(lambda self: self.memory is not None and self.path is not None)
    @rule()
    def reopen(self) -> None:
        assert self.memory is not None
        assert self.path is not None
        self.memory.close()
        self.memory = Memory.open(self.path, writable=True, verify=True)

    @invariant()
    def equals_the_dict(self) -> None:
        if self.memory is None:
            return
        assert sorted(self.memory.ids.tolist()) == sorted(self.held)
        if not self.held:
            return
        ids, rows = np.array(list(self.held)), np.array(list(self.held.values()))
        k = min(3, len(ids))
        distances, nearest = reference.neighbors(self.problem.keys[rows], self.problem.queries, k, ids)
        found = knn_of(self.memory, n_neighbors=k, index="exact:numpy").neighbors(self.problem.queries)
        np.testing.assert_array_equal(found.ids, ids[nearest])
        np.testing.assert_allclose(found.distances, distances, rtol=1e-12)
        held = self.memory.snapshot
        np.testing.assert_array_equal(held.targets(held.rows_of(ids)), self.whole.targets(rows))
        np.testing.assert_array_equal(held.predictions(held.rows_of(ids)), self.whole.predictions(rows))
        snippets = [f"row {row}" if number in self.carrying else "" for number, row in self.held.items()]
        assert self.memory.attributes(ids).snippets == snippets

    def teardown(self) -> None:
        if self.memory is not None:
            self.memory.close()
            if self.folder:
                self.folder.cleanup()


test_any_sequence_of_changes_equals_a_dict = AnySequence.TestCase
test_any_sequence_of_changes_equals_a_dict.settings = settings(max_examples=12, stateful_step_count=12, deadline=None)
