"""What must hold whatever the data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray

from residual_memory.correction import correct
from residual_memory.kernels import KERNELS
from residual_memory.memory import Memory
from residual_memory.residuals import temper, top_m
from tests.problems import Problem, classification, empty_memory, knn_of, memory_of, on_grid, regression, same_bits

seeds = st.integers(0, 10**6)
tasks = st.sampled_from([classification, regression])
kernels = st.sampled_from(sorted(KERNELS))
dtypes = st.sampled_from([np.float32, np.float64])

problems = st.builds(
    lambda task, seed, grid: on_grid(task(n=40, seed=seed), 3) if grid else task(n=40, seed=seed),
    tasks,
    seeds,
    st.booleans(),
)


@given(problem=problems, dtype=dtypes, amount=st.floats(0, 10))
def test_shrinkage_zero_is_the_base_bit_for_bit(problem: Problem, dtype: type, amount: float) -> None:
    base: ndarray = problem.said.astype(dtype)
    residual = amount * knn_of(memory_of(problem))(problem.queries)
    assert same_bits(correct(base, residual, 0.0), base)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_shrinkage_zero_keeps_the_sign_of_a_zero(zero: float) -> None:
    base = np.array([[zero], [1.5]])
    assert same_bits(correct(base, np.array([[1.0], [-1.0]]), 0.0), base)
    assert same_bits(correct(base, np.array([[-1.0], [1.0]]), np.zeros(2)), base)


@given(problem=problems, kernel=kernels, shrinkage=st.floats(0, 1))
def test_an_empty_memory_is_the_base_bit_for_bit(problem: Problem, kernel: str, shrinkage: float) -> None:
    residual = knn_of(empty_memory(problem), kernel=kernel)(problem.queries)
    assert same_bits(correct(problem.said, residual, shrinkage), problem.said)


@pytest.mark.parametrize("compacted", [False, True])
@given(problem=problems, kernel=kernels)
def test_a_memory_whose_rows_are_all_forgotten_is_the_base_bit_for_bit(
    compacted: bool, problem: Problem, kernel: str
) -> None:
    memory = memory_of(problem)
    knn = knn_of(memory, kernel=kernel)
    memory.forget(memory.ids)
    if compacted:
        memory.compact()
    assert same_bits(correct(problem.said, knn(problem.queries)), problem.said)


@given(seed=seeds, kernel=kernels, temperature=st.floats(0.5, 3))
def test_the_nearest_neighbor_alone_memorizes_the_label_of_a_stored_key(
    seed: int, kernel: str, temperature: float
) -> None:
    problem = classification(n=40, seed=seed)
    knn = knn_of(memory_of(problem), n_neighbors=1, kernel=kernel, temperature=temperature)
    scores = correct(temper(problem.predictions, temperature), knn(problem.keys))
    np.testing.assert_allclose(scores, np.eye(4)[problem.labels], atol=1e-14)


@given(seed=seeds, kernel=kernels)
def test_the_nearest_neighbor_alone_memorizes_the_target_of_a_stored_key(seed: int, kernel: str) -> None:
    problem = regression(n=40, seed=seed)
    knn = knn_of(memory_of(problem), n_neighbors=1, kernel=kernel)
    np.testing.assert_allclose(correct(problem.predictions, knn(problem.keys)), problem.labels, atol=1e-14)


@given(problem=problems, kernel=st.sampled_from(["exponential", "gaussian"]))
def test_as_the_bandwidth_vanishes_the_nearest_alone_counts(problem: Problem, kernel: str) -> None:
    memory = memory_of(problem)
    found = knn_of(memory, kernel=kernel, bandwidth=1e-9)
    distances = found.neighbors(problem.queries).distances
    unique = distances[:, 0] < distances[:, 1]
    alone = knn_of(memory, n_neighbors=1)(problem.queries)
    np.testing.assert_allclose(found(problem.queries)[unique], alone[unique], atol=1e-12)


@given(problem=problems, kernel=kernels)
def test_as_the_bandwidth_grows_all_neighbors_count_the_same(problem: Problem, kernel: str) -> None:
    memory = memory_of(problem)
    wide = knn_of(memory, kernel=kernel, bandwidth=1e12)(problem.queries)
    np.testing.assert_allclose(wide, knn_of(memory, kernel="uniform")(problem.queries), atol=1e-10)


@given(seed=seeds, kernel=kernels, shrinkage=st.floats(0, 1), temperature=st.floats(0.5, 3))
def test_corrected_rows_sum_to_one(seed: int, kernel: str, shrinkage: float, temperature: float) -> None:
    problem = classification(n=40, seed=seed)
    knn = knn_of(memory_of(problem), kernel=kernel, temperature=temperature)
    scores = correct(temper(problem.said, temperature), knn(problem.queries), shrinkage)
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-12)


@given(problem=problems, kernel=kernels, seed=seeds)
def test_the_order_of_the_rows_does_not_matter(problem: Problem, kernel: str, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(40)
    plain = knn_of(memory_of(problem), kernel=kernel)
    permuted = knn_of(memory_of(problem.rows(order), ids=order), kernel=kernel)
    assert_same_answers(plain, permuted, problem.queries)


@given(problem=problems, kernel=kernels, cuts=st.lists(st.integers(0, 40), max_size=5))
def test_how_the_rows_were_sharded_does_not_matter(problem: Problem, kernel: str, cuts: list[int]) -> None:
    memory = empty_memory(problem)
    sharded = knn_of(memory, kernel=kernel)
    for chosen in np.split(np.arange(40), sorted(cuts)):
        part = problem.rows(chosen)
        memory.append(part.keys, part.labels, part.predictions)
        sharded(problem.queries)
    assert_same_answers(knn_of(memory_of(problem), kernel=kernel), sharded, problem.queries)


@given(problem=problems, chosen=st.sets(st.integers(0, 39), min_size=1, max_size=20))
def test_rows_forgotten_and_added_again_change_nothing(problem: Problem, chosen: set[int]) -> None:
    rows = np.array(sorted(chosen))
    memory = memory_of(problem)
    knn = knn_of(memory)
    memory.forget(rows)
    part = problem.rows(rows)
    memory.append(part.keys, part.labels, part.predictions, ids=rows)
    assert_same_answers(knn_of(memory_of(problem)), knn, problem.queries)


@given(problem=problems, row=st.integers(0, 39), kernel=kernels)
def test_leaving_a_row_out_equals_a_memory_without_it(problem: Problem, row: int, kernel: str) -> None:
    others = np.delete(np.arange(40), row)
    without = knn_of(memory_of(problem.rows(others), ids=others), kernel=kernel)
    knn = knn_of(memory_of(problem), kernel=kernel)
    excluded = np.full(len(problem.queries), row)
    np.testing.assert_allclose(knn(problem.queries, excluded), without(problem.queries), atol=1e-14)
    np.testing.assert_array_equal(knn.neighbors(problem.queries, excluded).ids, without.neighbors(problem.queries).ids)


@given(problem=problems, chosen=st.sets(st.integers(0, 39), min_size=1, max_size=39), compacted=st.booleans())
def test_forgotten_rows_leave_a_memory_that_never_had_them(problem: Problem, chosen: set[int], compacted: bool) -> None:
    forgotten = np.array(sorted(chosen))
    others = np.setdiff1d(np.arange(40), forgotten)
    memory = memory_of(problem)
    k = min(7, len(others))
    knn = knn_of(memory, n_neighbors=k)
    memory.forget(forgotten)
    if compacted:
        memory.compact()
    never = knn_of(memory_of(problem.rows(others), ids=others), n_neighbors=k)
    assert_same_answers(never, knn, problem.queries)


def test_forgotten_and_compacted_on_disk_equals_a_memory_that_never_had_the_rows(
    problem: Problem, tmp_path: Path
) -> None:
    with memory_of(problem, tmp_path / "had") as memory:
        memory.forget(np.arange(10, 30))
        memory.compact()
    others = np.r_[:10, 30:60]
    memory_of(problem.rows(others), tmp_path / "never", ids=others).close()
    had, never = Memory.open(tmp_path / "had"), Memory.open(tmp_path / "never")
    assert contents(had) == contents(never)
    assert_same_answers(knn_of(never), knn_of(had), problem.queries)


def contents(memory: Memory) -> list[bytes]:
    """The bytes of all rows."""
    return [file.read_bytes() for file in sorted((memory.path or Path()).glob("rows-*"))]


@given(seed=seeds, kernel=kernels)
def test_top_m_of_all_classes_equals_dense(seed: int, kernel: str) -> None:
    problem = classification(n=40, seed=seed)
    compressed = empty_memory(problem, residuals="top-m")
    compressed.append(problem.keys, problem.labels, top_m(problem.predictions, 4))
    dense = knn_of(memory_of(problem), kernel=kernel)
    assert same_bits(knn_of(compressed, kernel=kernel)(problem.queries), dense(problem.queries))


@given(seed=seeds, scale=st.sampled_from(["log8", "log16"]))
def test_a_few_bytes_a_row_move_no_correction_further_than_their_error(seed: int, scale: str) -> None:
    problem = classification(n=40, seed=seed)
    coded = empty_memory(problem, residuals="top-m", prediction_dtype=scale)
    coded.append(problem.keys, problem.labels, top_m(problem.predictions, 4))
    found = knn_of(coded)(problem.queries)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-6)
    error = {"log8": 0.065, "log16": 0.0005}[scale]
    np.testing.assert_allclose(found, knn_of(memory_of(problem))(problem.queries), atol=error)


@given(problem=problems, kernel=kernels)
def test_a_memory_on_disk_answers_as_one_in_ram(
    problem: Problem, kernel: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stored = memory_of(problem, tmp_path_factory.mktemp("law") / "memory")
    assert_same_answers(knn_of(memory_of(problem), kernel=kernel), knn_of(stored, kernel=kernel), problem.queries)
    stored.close()


@given(problem=problems, shift=st.floats(-100, 100), kernel=kernels)
def test_moving_all_keys_together_moves_no_answer(problem: Problem, shift: float, kernel: str) -> None:
    moved = replace(problem, keys=problem.keys + shift, queries=problem.queries + shift)
    here, there = (knn_of(memory_of(some), kernel=kernel) for some in (problem, moved))
    distances = here.neighbors(problem.queries).distances
    np.testing.assert_allclose(there.neighbors(moved.queries).distances, distances, atol=1e-9)


@given(problem=problems)
def test_the_residual_is_linear_in_what_was_stored(problem: Problem) -> None:
    """Where every stored residual is the same, that residual is the answer, whatever the weights."""
    same = replace(
        problem, labels=np.repeat(problem.labels[:1], 40, 0), predictions=np.repeat(problem.predictions[:1], 40, 0)
    )
    knn = knn_of(memory_of(same))
    one = knn_of(memory_of(same), n_neighbors=1)(problem.queries[:1])
    np.testing.assert_allclose(knn(problem.queries), np.repeat(one, len(problem.queries), 0), atol=1e-13)


def assert_same_answers(first: Any, second: Any, queries: ndarray) -> None:
    """The same neighbours, bit for bit, and the same correction up to the order of a sum."""
    one, other = first.neighbors(queries), second.neighbors(queries)
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.distances, other.distances)
    np.testing.assert_allclose(first(queries), second(queries), atol=1e-14)
