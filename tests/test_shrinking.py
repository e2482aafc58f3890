"""A smaller memory: the rows that stay are the rows that were, and which ones stay is as asked."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy import ndarray

import residual_memory as rm
from residual_memory import shrinking
from residual_memory.errors import InvalidInput
from residual_memory.memory import Memory
from tests.exchange.forms import KINDS, assert_same, kept, problem_of, values
from tests.problems import Problem, classification, knn_of, memory_of, on_grid, regression, same_bits


def sizes_of(memory: Memory) -> ndarray:
    return memory.snapshot.residual_sizes(np.flatnonzero(memory.snapshot.alive))


@pytest.mark.parametrize("text", [False, True], ids=["integers", "text"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_that_stay_are_as_they_were(tmp_path: Path, kind: str, text: bool) -> None:
    """The new memory is the old one after the others were forgotten and erased, to the last bit."""
    memory = kept(kind, tmp_path / "whole", text=text, groups=True)
    memory.save_source({"layer": "fc1"})
    before = values(memory)
    shrunk = rm.shrink(Memory.open(tmp_path / "whole"), tmp_path / "small", keep_rows=0.5)
    shrunk.memory.close()
    small = Memory.open(tmp_path / "small", verify=True)
    assert (shrunk.n_rows, len(small), shrunk.not_drawn) == (57, 29, 28)
    assert all(same_bits(values(memory)[name], column) for name, column in before.items())
    memory.forget(np.setdiff1d(memory.ids, small.ids))
    assert_same(small, memory)
    queries = problem_of(kind).queries
    assert same_bits(*(knn_of(some, index="exact:numpy")(queries) for some in (small, memory)))


def test_what_rows_carry_stays_with_them() -> None:
    memory = memory_of(classification(n=0))
    some = classification(n=4)
    owners, snippets = ["alice", "", "bob", "bob"], ["one", "two", "", "four"]
    tags: list[list[str]] = [["a"], [], ["b", "c"], ["a"]]
    expires = [2_000_000_000, 2_100_000_000, 2_200_000_000, 2_300_000_000]
    memory.append(
        some.keys, some.labels, some.predictions, owners=owners, tags=tags, expires=expires, snippets=snippets
    )
    small = rm.shrink(memory, keep_rows=0.75).memory
    assert len(small) == 3
    found, wanted = (vars(some.attributes(small.ids)) for some in (small, memory))
    assert same_bits(found.pop("expires"), wanted.pop("expires"))
    assert found == wanted


# ---------------------------------------------------------------------- shorter rows


@pytest.mark.parametrize("prediction_dtype", ["log8", "log16", "float16", "float32"])
def test_whole_predictions_are_cut_as_if_they_had_been_appended_so(prediction_dtype: str) -> None:
    problem = classification(c=9)
    options: dict[str, Any] = {
        "residuals": "top-m",
        "key_dtype": "float16",
        "prediction_dtype": prediction_dtype,
        "n_outputs": 9,
    }
    wanted = memory_of(problem.rows([]), **options)
    wanted.append(problem.keys, problem.labels, rm.top_m(problem.predictions, 3))
    small = rm.shrink(memory_of(problem), top_m=3, prediction_dtype=prediction_dtype, key_dtype="float16").memory
    found, expected = values(small), values(wanted)
    places = [np.argsort(columns["indices"], axis=1) for columns in (found, expected)]
    for name in ("indices", "probabilities"):
        ordered = [np.take_along_axis(some[name], o, 1) for some, o in zip((found, expected), places, strict=True)]
        assert same_bits(*ordered), name
    assert all(same_bits(found[name], expected[name]) for name in ("keys", "labels", "rest", "ids"))
    assert small.layout == wanted.layout


def test_whole_predictions_become_log8_unless_told_otherwise() -> None:
    assert rm.shrink(memory_of(classification()), top_m=2).memory.layout.prediction_dtype == "log8"
    assert rm.shrink(memory_of(classification()), key_dtype="float16").memory.layout.prediction_dtype == "float64"
    kept_so = rm.shrink(kept("log16"), top_m=1).memory.layout
    assert kept_so.prediction_dtype == "log16"


def test_a_list_of_classes_is_cut_to_its_largest_and_the_rest_takes_the_others() -> None:
    problem = classification(c=6)
    memory = memory_of(problem.rows([]), residuals="top-m", n_outputs=6)
    memory.append(problem.keys, problem.labels, rm.top_m(problem.predictions, 4))
    small, wanted = rm.shrink(memory, top_m=2).memory, rm.top_m(problem.predictions, 2)
    said = small.snapshot.top_m(np.arange(60))
    np.testing.assert_array_equal(np.sort(said.indices, axis=1), np.sort(wanted.indices, axis=1))
    np.testing.assert_allclose(said.rest, wanted.rest, atol=1e-12)
    np.testing.assert_allclose(said.probabilities.sum(axis=1) + said.rest, 1, atol=1e-12)


def test_half_precision_of_many_classes_is_cut_though_its_sum_is_off() -> None:
    problem = classification(c=4)
    memory = memory_of(replace(problem, predictions=problem.predictions * 0.9985), prediction_dtype="float16")
    said = rm.shrink(memory, top_m=3, prediction_dtype="float64").memory.snapshot.top_m(np.arange(60))
    np.testing.assert_allclose(said.probabilities.sum(axis=1) + said.rest, 1, atol=1e-12)


@pytest.mark.parametrize(("n_outputs", "m"), [(100, 8), (8_192, 8), (65_536, 8), (65_537, 5)])
def test_prediction_and_label_take_at_most_32_bytes_at_the_recommended_setting(n_outputs: int, m: int) -> None:
    """8 classes of at most 65,536, 5 of more, a byte a probability: as docs/shrinking.md says."""
    problem = classification(n=20, d=64, c=10)
    memory = memory_of(problem, n_outputs=n_outputs)
    small = rm.shrink(memory, top_m=m, key_dtype="float16").memory
    stored = {name: column.nbytes / 20 for name, column in values(small).items()}
    assert sum(stored.values()) == small.layout.bytes_per_row(m)
    assert stored["keys"] == 2 * 64
    assert stored["ids"] == 8
    assert sum(stored[name] for name in ("labels", "indices", "probabilities", "rest")) <= 32


def test_a_number_that_half_precision_cannot_hold_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    problem = classification()
    memory = memory_of(replace(problem, keys=1e5 * problem.keys), tmp_path / "whole")
    with pytest.raises(InvalidInput, match="above what float16 holds"):
        rm.shrink(memory, tmp_path / "small", key_dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


# ---------------------------------------------------------------------- fewer rows: the draw


def test_a_row_that_the_base_missed_is_drawn_more_often_and_one_that_it_knew_sometimes() -> None:
    known, missed = np.tile([[0.98, 0.02]], (500, 1)), np.tile([[0.02, 0.98]], (500, 1))
    rows = Problem(np.zeros((1000, 1)), np.zeros(1000, int), np.concatenate([known, missed]), known[:1], known[:1])
    memory = memory_of(rows)
    stay = rm.shrink(memory, keep_rows=0.5).memory.ids
    of_known, of_missed = (stay < 500).sum(), (stay >= 500).sum()
    assert of_known + of_missed == 500
    # Chances of 0.02 + 0.1 against 0.98 + 0.1: draws one by one from 500 and 500 leave about 120 known ones in 500.
    assert 60 < of_known < 140


def test_a_smaller_share_is_part_of_a_larger_one_and_another_seed_draws_other_rows() -> None:
    memory = memory_of(classification(n=200))
    most, half, other = (
        rm.shrink(memory, keep_rows=share, seed=seed).memory.ids for share, seed in ((0.8, 0), (0.5, 0), (0.5, 1))
    )
    assert set(half) < set(most)
    assert set(half) != set(other)
    np.testing.assert_array_equal(half, rm.shrink(memory, keep_rows=0.5).memory.ids)
    assert (np.diff(half) > 0).all(), "rows keep their order"


def test_rows_without_any_residual_are_drawn_evenly() -> None:
    perfect = Problem(np.zeros((90, 1)), np.zeros(90, int), np.tile([[1.0, 0.0]], (90, 1)), *2 * (np.zeros((1, 1)),))
    ids = rm.shrink(memory_of(perfect), keep_rows=1 / 3).memory.ids
    assert len(ids) == 30
    assert 20 < ids.mean() < 70


def test_the_smallest_share_leaves_a_row() -> None:
    assert len(rm.shrink(memory_of(classification()), keep_rows=1e-9).memory) == 1


# ---------------------------------------------------------------------- fewer rows: small residuals


def test_a_residual_is_as_large_as_what_the_base_missed() -> None:
    problem = classification()
    missed = 1 - problem.predictions[np.arange(60), problem.labels]
    np.testing.assert_allclose(sizes_of(memory_of(problem)), missed)
    half_of_all = np.abs(np.eye(4)[problem.labels] - problem.predictions).sum(axis=1) / 2
    np.testing.assert_allclose(missed, half_of_all)
    drop = rm.shrink(memory_of(problem), smallest_residual=0.5)
    np.testing.assert_array_equal(drop.memory.ids, np.flatnonzero(missed >= 0.5))
    assert drop.small == (missed < 0.5).sum()


def test_a_residual_of_values_is_a_distance() -> None:
    problem = regression()
    missed = np.linalg.norm(problem.labels - problem.predictions, axis=1)
    np.testing.assert_allclose(sizes_of(memory_of(problem)), missed)
    drop = rm.shrink(memory_of(problem), smallest_residual=1.5)
    np.testing.assert_array_equal(drop.memory.ids, np.flatnonzero(missed >= 1.5))


def test_a_label_that_is_not_listed_has_its_part_of_the_rest() -> None:
    problem = classification(c=6)
    memory = memory_of(problem.rows([]), residuals="top-m", n_outputs=6)
    memory.append(problem.keys, problem.labels, rm.top_m(problem.predictions, 2))
    whole = memory.snapshot.predictions(np.arange(60))
    np.testing.assert_allclose(sizes_of(memory), 1 - whole[np.arange(60), problem.labels], atol=1e-12)


# ---------------------------------------------------------------------- fewer rows: twins


def leaders(keys: ndarray, kinds: list[Any], distance: float) -> list[int]:
    """One row after the other stays, unless one that is alike and stays is near."""
    stay: list[int] = []
    for row, kind in enumerate(kinds):
        if not any(kinds[s] == kind and np.linalg.norm(keys[row] - keys[s]) <= distance for s in stay):
            stay.append(row)
    return stay


def usual(keys: ndarray, kinds: list[Any]) -> float:
    """The median distance from a row to the nearest one like it."""
    between = np.linalg.norm(keys[:, None] - keys, axis=2)
    alike = np.array(kinds)[:, None] == np.array(kinds)
    nearest = np.where(alike & ~np.eye(len(keys), dtype=bool), between, np.inf).min(axis=1)
    return float(np.median(nearest[np.isfinite(nearest)]))


@pytest.mark.parametrize("within", [0.0, 0.5, 1.0, 1.5, 100.0])
@pytest.mark.parametrize("key_dtype", ["float16", "float32", "float64"])
def test_the_first_of_the_twins_stays(within: float, key_dtype: str) -> None:
    problem = classification(n=400, d=3, c=2)
    memory = memory_of(problem, key_dtype=key_dtype)
    keys, kinds = values(memory)["keys"].astype(float), problem.labels.tolist()
    small = rm.shrink(memory, twins_within=within)
    assert small.twin_distance == pytest.approx(within * usual(keys, kinds))
    assert small.memory.ids.tolist() == leaders(keys, kinds, within * usual(keys, kinds))
    assert small.twins == 400 - len(small.memory)


@pytest.mark.parametrize("within", [0.0, 1.0, 2.0])
def test_equal_keys_are_twins_at_any_distance(within: float) -> None:
    problem = on_grid(classification(n=400, d=4, c=2), levels=3)
    small = rm.shrink(memory_of(problem), twins_within=within)
    assert small.twin_distance == 0
    assert small.memory.ids.tolist() == leaders(problem.keys, problem.labels.tolist(), 0)


def test_the_usual_distance_is_measured_on_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = classification(n=400, d=3, c=2)
    memory = memory_of(problem)
    monkeypatch.setattr(shrinking, "TWIN_SAMPLE", 50)
    found = rm.shrink(memory, twins_within=1.0).twin_distance
    assert found is not None
    assert 0.7 < found / usual(problem.keys, problem.labels.tolist()) < 1.4
    monkeypatch.setattr(shrinking, "TWIN_SAMPLE", 400)
    assert rm.shrink(memory, twins_within=1.0).twin_distance == usual(problem.keys, problem.labels.tolist())


@pytest.mark.parametrize("key_dtype", ["float32", "float64"])
def test_twins_far_from_the_origin_are_told_apart(key_dtype: str) -> None:
    """Inner products of such keys say nothing of distances so small; their differences do."""
    random = np.random.default_rng(0)
    problem = classification(n=300, d=8, c=1)
    keys = (1000 + random.integers(0, 40, (300, 1)) + 0.02 * random.integers(0, 3, (300, 8))).astype(np.float32)
    memory = memory_of(replace(problem, keys=keys), key_dtype=key_dtype)
    stored, kinds = values(memory)["keys"].astype(float), [0] * 300
    for within in (0.0, 0.8, 1.3):
        stay = rm.shrink(memory, twins_within=within).memory.ids.tolist()
        assert stay == leaders(stored, kinds, within * usual(stored, kinds))


@pytest.mark.parametrize(
    ("carried", "stay"),
    [
        ({}, [0, 2]),
        ({"labels": [0, 1, 1, 1]}, [0, 1, 2, 3]),
        ({"groups": ["a", "b", "c", "c"]}, [0, 2]),
        ({"owners": ["alice", "bob", "", ""]}, [0, 1, 2]),
        ({"tags": [["a"], [], ["b"], ["b"]]}, [0, 1, 2]),
        ({"expires": [2_000_000_000, 2_100_000_000, 2_200_000_000, 2_200_000_000]}, [0, 1, 2]),
        ({"snippets": ["one", "two", "three", "four"]}, [0, 2]),
    ],
)
def test_twins_are_alike_in_what_they_carry(carried: dict[str, Any], stay: list[int]) -> None:
    """Else a row would go with another one that it was to outlive."""
    keys, labels = [[0.0], [0.0], [1.0], [1.0]], [0, 0, 1, 1]
    memory = Memory.create(dim=1, n_outputs=2)
    if "labels" in carried:
        keys, labels, carried = [[0.0], [0.0], [1.0], [2.0]], carried["labels"], {}
    memory.append(keys, labels, [[0.5, 0.5]] * 4, **carried)
    assert rm.shrink(memory, twins_within=0.0).memory.ids.tolist() == stay


@pytest.mark.parametrize("groups", [["a", "b", "c", "c"], [1, 2, 3, 3]])
def test_twins_can_be_held_to_their_group(groups: list[Any]) -> None:
    memory = Memory.create(dim=1, n_outputs=2)
    memory.append([[0.0], [0.0], [1.0], [1.0]], [0, 0, 1, 1], [[0.5, 0.5]] * 4, groups=groups)
    assert rm.shrink(memory, twins_within=0.0, within_groups=True).memory.ids.tolist() == [0, 1, 2]
    without = rm.shrink(memory_of(classification()), twins_within=1.0, within_groups=True)
    assert without.twins == rm.shrink(memory_of(classification()), twins_within=1.0).twins > 0


def test_no_two_rows_alike_are_no_twins() -> None:
    memory = Memory.create(dim=1, n_outputs=3)
    memory.append([[0.0]] * 3, [0, 1, 2], [[0.5, 0.5, 0.0]] * 3)
    found = rm.shrink(memory, twins_within=1.0)
    assert (found.twins, found.twin_distance) == (0, 0)


def test_twins_of_values_have_the_same_target() -> None:
    memory = Memory.create(dim=1, n_outputs=2, task="regression")
    memory.append([[0.0]] * 3, [[1.0, 2.0], [1.0, 2.0], [1.0, 3.0]], [[0.0, 0.0]] * 3)
    assert rm.shrink(memory, twins_within=0.0).memory.ids.tolist() == [0, 2]


def test_twins_go_first_then_small_residuals_and_the_draw_takes_of_what_is_left() -> None:
    problem = on_grid(classification(n=300, d=3, c=2))
    memory = memory_of(problem)
    first, few = rm.shrink(memory, twins_within=0.0), rm.shrink(memory, smallest_residual=0.4)
    both = rm.shrink(memory, twins_within=0.0, smallest_residual=0.4, keep_rows=0.02)
    left = set(first.memory.ids) & set(few.memory.ids)
    assert both.twins == first.twins > 0
    assert set(both.memory.ids) < left
    assert len(both.memory) == 6, "the share is of all rows"
    assert both.n_rows == 300 == len(both.memory) + both.twins + both.small + both.not_drawn


# ---------------------------------------------------------------------- settings and mistakes


def test_a_setting_moves_along_where_all_rows_stay_and_it_can_be_used() -> None:
    memory = memory_of(classification())
    warm, plain = (rm.Setting(n_neighbors=5, temperature=t).to_dict() for t in (1.4, 1.0))
    for setting, options, moves in (
        (warm, {"key_dtype": "float16"}, True),
        (warm, {"top_m": 2}, False),
        (plain, {"top_m": 2}, True),
        (plain, {"keep_rows": 0.9}, False),
        (plain, {"twins_within": 0.0}, True),
    ):
        memory.save_setting(setting)
        small = rm.shrink(memory, **options).memory
        assert small.setting == (setting if moves else None), options


def test_a_memory_without_rows_shrinks_to_one() -> None:
    empty = memory_of(classification(n=0))
    small = rm.shrink(empty, keep_rows=0.5, smallest_residual=0.5, twins_within=0.0, top_m=2).memory
    assert len(small) == 0
    assert small.layout.residuals == "top-m"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "nothing would become smaller"),
        ({"keep_rows": 0.0}, "keep_rows is 0"),
        ({"keep_rows": 1.5}, "keep_rows is 1.5"),
        ({"smallest_residual": 1.1}, "smallest_residual is 1.1"),
        ({"smallest_residual": 1.0}, r"the largest residual is 0\.\d+, so no row of at least 1 would stay"),
        ({"twins_within": -1.0}, "twins_within is -1"),
        ({"twins_within": float("nan")}, "twins_within is nan"),
        ({"top_m": 0}, "top_m is 0"),
        ({"top_m": 5}, "top_m is 5, expected at most 4"),
        ({"prediction_dtype": "log8"}, "residuals='top-m' alone"),
        ({"key_dtype": "float8"}, "key_dtype is 'float8'"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_made(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        rm.shrink(memory_of(classification()), tmp_path / "small", **options)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="of a regression, which has no classes to list; leave top_m out"):
        rm.shrink(memory_of(regression()), top_m=2)
    with pytest.raises(InvalidInput, match="top_m is 3, expected at most 2, the classes that a row"):
        rm.shrink(kept("log8"), top_m=3)
    with memory_of(classification(), tmp_path / "mem") as memory, pytest.raises(InvalidInput, match="not empty"):
        rm.shrink(memory, tmp_path / "mem", keep_rows=0.5)
    assert Memory.open(tmp_path / "mem").verify().ok
