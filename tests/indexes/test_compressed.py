"""Compressed indexes: a recall that is asked for, rows that come later, rows that are forgotten."""

import re
import warnings
from typing import Any

import faiss
import numpy as np
import pytest
from numpy import ndarray

from residual_memory.errors import InvalidInput, LowRecall
from residual_memory.indexes import faiss as engine
from residual_memory.indexes import registry
from residual_memory.indexes.base import Index, Stored, Usable, listed_for, nearest
from residual_memory.indexes.calibration import Calibration, Point, true_distances
from residual_memory.indexes.faiss import FaissEngine, two_level_centroids
from residual_memory.indexes.registry import build_index, check_index, parse_spec
from residual_memory.memory import Column
from residual_memory.metrics import recall
from tests import reference
from tests.problems import classification, knn_of, memory_of, on_grid

SPEC = "faiss:PCAR8,IVF32,PQ8x4fs"


def many(n: int = 6000, d: int = 16, seed: int = 0) -> tuple[Column, ndarray]:
    """Clustered keys with variances that fall, in two parts of half precision, and queries that are no rows."""
    random = np.random.default_rng(seed)
    centres = 2 * random.normal(size=(40, d))
    drawn = centres[random.integers(0, 40, n + 200)] + random.normal(size=(n + 200, d)) / np.arange(1, d + 1) ** 0.5
    keys = drawn[:n].astype(np.float16)
    return Column([keys[: n // 3], keys[n // 3 :]], keys[:0]), drawn[n:].astype(np.float32)


def found(keys: Column, queries: ndarray, spec: str, k: int = 20) -> tuple[float, str]:
    """Recall on the queries, and the description."""
    part = build_index(parse_spec(spec), keys, 0, len(keys))
    distances = nearest([part], keys, queries, k).distances
    return recall(distances, true_distances(keys, 0, len(keys), queries, k)[0], tolerance=1e-6), part.description


@pytest.mark.parametrize("k", [10, 20, 50])
@pytest.mark.parametrize("wanted", [0.5, 0.8, 0.95, 0.99])
def test_a_recall_that_is_asked_for_is_reached_on_queries_that_are_no_rows(wanted: float, k: int) -> None:
    reached, description = found(*many(), f"{SPEC}?recall={wanted}", k)
    assert reached >= wanted - 0.02
    assert "nprobe" in description
    assert "recall 0." in description or "recall 1." in description


def test_a_low_recall_is_not_overdone() -> None:
    assert found(*many(), f"{SPEC}?recall=0.5")[0] < found(*many(), f"{SPEC}?recall=0.99")[0]


def test_options_that_are_named_are_kept_when_a_recall_is_asked_for() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LowRecall)
        assert "(nprobe 4, " in found(*many(), f"{SPEC}?recall=0.5&nprobe=4")[1]
        assert "k_factor 3:" in found(*many(), f"{SPEC}?recall=0.5&k_factor=3")[1]


def test_codes_that_are_too_coarse_for_a_recall_say_so() -> None:
    with pytest.warns(LowRecall, match=r"0\.\d+ of the neighbours at most, 0.999 were asked for"):
        found(*many(), "faiss:IVF32,PQ1x4fs?recall=0.999&k_factor=1")


@pytest.mark.parametrize("spec", ["auto?nprobe=3", "auto:IVF4?recall=0.5", "auto?recall=0", "auto?recall=1.5"])
def test_auto_takes_a_recall_alone(spec: str) -> None:
    with pytest.raises(InvalidInput, match="recall"):
        check_index(spec, 8)


def test_the_cheapest_way_reaches_the_recall_with_a_margin_or_comes_nearest() -> None:
    recalls = ((0.4, 0.5), (0.9, 0.955), (0.95, 0.97), (0.96, 0.98))
    efforts, seconds = (1.0, 2.0, 4.0, 8.0), (1.0, 2.0, 3.0, 2.5)
    points = tuple(Point(e, 1.0, r, s) for e, r, s in zip(efforts, recalls, seconds, strict=True))
    known = Calibration(500, (10, 50), points)
    assert known.cheapest(0.95, listed_for(50), {}) == points[3]
    assert known.cheapest(0.95, listed_for(60), {"effort": 4.0}) == points[2]
    assert known.cheapest(0.99, listed_for(50), {}) == points[3]
    assert known.cheapest(0.93, listed_for(49), {}) == points[3], "fewer neighbours are harder to find"
    assert known.cheapest(0.93, listed_for(2), {}) == points[3]


def again(keys: Column, saved: str, asked: str) -> Index:
    """An index built and saved with some options of queries, and loaded with others."""
    built, spec = build_index(parse_spec(saved), keys, 0, len(keys)), parse_spec(asked)
    return FaissEngine().load(spec, keys, 0, len(keys), Stored(built.saved(), built.measured()))


@pytest.mark.parametrize("asked", ["?nprobe=7", "?k_factor=5", "?nprobe=7&k_factor=5", "", "?recall=0.9"])
@pytest.mark.parametrize("saved", ["", "?nprobe=5", "?recall=0.99&k_factor=7"])
def test_a_saved_index_can_be_asked_in_ways_that_were_not_measured(saved: str, asked: str) -> None:
    keys, queries = many(2500)
    index = again(keys, SPEC + saved, SPEC + asked)
    told = float(re.findall(r"recall ([\d.]+) at 50", index.description)[0])
    distances = nearest([index], keys, queries, 50).distances
    reached = recall(distances, true_distances(keys, 0, len(keys), queries, 50)[0], tolerance=1e-6)
    assert reached >= told - 0.03


def test_a_named_option_that_was_not_measured_is_measured_when_a_recall_is_asked_for() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LowRecall)
        index = again(many(2500)[0], SPEC, f"{SPEC}?recall=0.5&nprobe=7")
    assert "(nprobe 7, " in index.description


def test_nothing_is_told_of_a_way_that_looks_less_hard_than_any_that_was_measured() -> None:
    index = again(many(2500)[0], SPEC, f"{SPEC}?k_factor=1")
    known = index.measured()
    assert known is not None
    fewer = {**known, "points": [point for point in known["points"] if point["k_factor"] > 1]}
    keys = many(2500)[0]
    spec = parse_spec(f"{SPEC}?k_factor=1")
    assert "recall" not in FaissEngine().load(spec, keys, 0, len(keys), Stored(index.saved(), fewer)).description


def test_the_effort_that_is_used_is_measured_also_where_fewer_cells_find_all() -> None:
    random = np.random.default_rng(0)
    apart = (1000 * random.normal(size=(64, 1, 8)) + random.normal(size=(64, 120, 8))).reshape(-1, 8).astype(np.float32)
    keys = Column([apart], np.zeros((0, 8)))
    index = again(keys, "faiss:IVF64,Flat?nprobe=32", "faiss:IVF64,Flat?nprobe=32")
    assert "(nprobe 32, k_factor 1: recall 1.000" in index.description


def test_more_distances_than_rows_are_infinite() -> None:
    keys, queries = many(700)
    distances, rows = true_distances(keys, 0, 5, queries, 7)
    assert np.isinf(distances[:, 5:]).all()
    assert (rows[:, 5:] == -1).all()
    assert np.isfinite(distances[:, :5]).all()


def test_true_distances_are_those_of_all_rows() -> None:
    keys, queries = many(700)
    distances, rows = true_distances(keys, 100, 500, queries, 9)
    expected, _ = reference.neighbors(keys.take(np.arange(100, 600)).astype(float), queries.astype(float), 9)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)
    assert rows.min() >= 100
    assert rows.max() < 600


# ---------------------------------------------------------------------- rows that come later


def test_rows_that_come_later_use_what_was_learned_and_all_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = classification(n=1560, q=30, d=8)
    trained: list[int] = []
    train = engine._trained

    def counting(index: Any, keys: Any, first: int, n_rows: int, factory: str) -> Any:
        trained.append(n_rows)
        return train(index, keys, first, n_rows, factory)

    monkeypatch.setattr(engine, "_trained", counting)
    monkeypatch.setattr(registry, "EXACT_TAIL", 50)
    memory = memory_of(problem.rows(slice(700)))
    knn = knn_of(memory, index="faiss:IVF16,Flat?nprobe=16")
    end = 700
    for more in (30, 100, 300, 430):
        some = problem.rows(slice(end, end + more))
        memory.append(some.keys, some.labels, some.predictions)
        end += more
        expected = knn_of(memory_of(problem.rows(slice(end))), index="exact")
        np.testing.assert_array_equal(knn.neighbors(problem.queries).ids, expected.neighbors(problem.queries).ids)
    assert trained == [700, 1560], "learned at first, and again with as many new rows as old ones"


def test_what_was_measured_serves_for_rows_that_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "EXACT_TAIL", 50)
    keys, _ = many()
    spec = parse_spec(f"{SPEC}?recall=0.9")
    first = build_index(spec, keys, 0, 4000)
    monkeypatch.setattr(engine, "calibrated", None)
    assert build_index(spec, keys, 4000, 2000, first).description == first.description


# ---------------------------------------------------------------------- rows that are forgotten


@pytest.mark.parametrize("spec", ["IVF16,Flat?nprobe=16", "PCAR8,IVF16,PQ8x4fs?nprobe=16&k_factor=8", "HNSW32,Flat"])
def test_forgotten_rows_take_no_place_in_a_shortlist(spec: str) -> None:
    problem = classification(n=900, q=20, d=8)
    keys = Column([problem.keys.astype(np.float32)], np.zeros((0, 8)))
    part = build_index(parse_spec(f"faiss:{spec}"), keys, 100, 700)
    usable = np.zeros(900, bool)
    usable[::5] = True
    listed = part.candidates(problem.queries, 30, Usable(usable)).rows
    assert usable[listed[listed >= 0]].all()
    assert (listed >= 0).sum(axis=1).min() >= 30


@pytest.mark.parametrize("spec", ["faiss:IVF16,Flat?nprobe=16", "faiss:PCAR8,IVF16,PQ8x4fs?nprobe=16&k_factor=8"])
def test_recall_does_not_fall_where_a_whole_neighbourhood_is_forgotten(spec: str) -> None:
    problem = classification(n=900, q=10, d=8)
    memory = memory_of(problem, key_dtype="float32")
    knn = knn_of(memory, index=spec)
    near = knn_of(memory, index="exact", n_neighbors=60).neighbors(problem.queries).ids
    memory.forget(np.unique(near))
    found, expected = (one.neighbors(problem.queries).distances for one in (knn, knn_of(memory, index="exact")))
    assert recall(found, expected, tolerance=1e-6) >= 0.98


# ---------------------------------------------------------------------- how it is made


def test_centroids_of_two_levels_are_nearly_as_good_as_those_of_one() -> None:
    keys, _ = many(8000)
    sample = keys.take(np.arange(8000)).astype(np.float32)
    centroids = two_level_centroids(sample, 128)
    assert centroids.shape == (128, 16)
    plain = faiss.Kmeans(16, 128, niter=25, seed=1)
    plain.train(sample)
    costs = [faiss.knn(sample, np.asarray(centres), 1)[0].mean() for centres in (centroids, plain.centroids)]
    assert costs[0] <= 1.1 * costs[1]


def test_many_cells_are_learned_in_two_levels_behind_a_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "TWO_LEVELS_FROM", 32)
    assert found(*many(), "faiss:PCAR8,IVF32_HNSW8,PQ8x4fs?nprobe=32&k_factor=12")[0] >= 0.98


@pytest.mark.parametrize("threads", [1, 2])
def test_ties_at_the_end_of_a_list_go_by_rank_whatever_the_threads(threads: int) -> None:
    problem = on_grid(classification(n=900, q=200, d=4), levels=3)
    keys = Column([problem.keys.astype(np.float32)], np.zeros((0, 4)))
    part = build_index(parse_spec("faiss:IVF16,PQ4x4fs?nprobe=16&k_factor=100"), keys, 0, 900)
    ranks = np.random.default_rng(0).permutation(900)
    before = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(threads)
        rows = nearest([part], keys, problem.queries, 7, tie_ranks=ranks).rows
    finally:
        faiss.omp_set_num_threads(before)
    _, expected = reference.neighbors(problem.keys, problem.queries, 7, ranks)
    np.testing.assert_array_equal(rows, expected)


def test_a_query_alone_finds_what_it_finds_among_others() -> None:
    keys, queries = many()
    part = build_index(parse_spec(f"{SPEC}?recall=0.9"), keys, 0, len(keys))
    together = nearest([part], keys, queries, 20).rows
    alone = [nearest([part], keys, queries[place : place + 1], 20).rows[0] for place in range(20)]
    np.testing.assert_array_equal(together[:20], np.array(alone))
