"""The battery that every index must pass, whoever wrote it.

Subclass `IndexContract` in a test module and give the spec; `exact` says whether the engine promises the true answer.
An engine has to build indexes of 700 and of 800 rows of 8 numbers with this spec.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from numpy import ndarray

from residual_memory.errors import CorruptFile, InvalidInput
from residual_memory.indexes.base import Index, Stored, Usable, nearest
from residual_memory.indexes.distances import pair_distances
from residual_memory.indexes.registry import build_index, check_index, engine_named, load_index, parse_spec, saved_spec
from residual_memory.memory import Column
from residual_memory.metrics import recall
from residual_memory.testing.problems import Problem, classification, clustered, column, neighbors, on_grid, same_bits
from residual_memory.types import Neighbors

K = 10


class IndexContract:
    """What an engine owes to `nearest`.

    Attributes
    ----------
    spec : the engine and its options.
    exact : the answer is the true one, ties included.
    least_recall : of an engine that is not exact, on `clustered`.
    """

    spec: str
    exact: bool = True
    least_recall: float = 1.0

    def build(self, keys: Column, first: int = 0, n_rows: int | None = None) -> Index:
        return build_index(parse_spec(self.spec), keys, first, len(keys) - first if n_rows is None else n_rows)

    def search(self, problem: Problem, k: int = K) -> Neighbors:
        keys = column(problem.keys)
        return nearest([self.build(keys)], keys, problem.queries, k)

    def assert_right(self, found: Neighbors, problem: Problem, ids: ndarray | None = None) -> None:
        """Distances are the true ones of the rows named; the rows are the nearest, or enough of them are."""
        distances, rows = neighbors(problem.keys, problem.queries, found.rows.shape[1], ids)
        precision = 1e-12 if problem.keys.dtype == np.float64 else 1e-6
        assert (np.diff(found.distances, axis=1) >= 0).all()
        np.testing.assert_allclose(
            found.distances, pair_distances(column(problem.keys), problem.queries, found.rows), rtol=1e-12
        )
        if self.exact:
            np.testing.assert_array_equal(found.rows, rows)
            np.testing.assert_allclose(found.distances, distances, rtol=precision)
        else:
            assert recall(found.distances, distances) >= self.least_recall

    @pytest.mark.parametrize("k", [1, K, 100])
    def test_it_finds_the_nearest_rows_with_their_euclidean_distances(self, k: int) -> None:
        problem = clustered()
        self.assert_right(self.search(problem, k), problem)

    def test_it_is_the_engine_that_was_asked_for(self) -> None:
        description = self.build(column(clustered().keys)).description
        assert all(part in description for part in self.spec.partition("?")[0].split(":"))

    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_keys_of_less_precision_are_searched_as_they_are(self, dtype: type) -> None:
        problem = classification(n=800, d=8)
        problem = replace(problem, keys=problem.keys.astype(dtype))
        self.assert_right(self.search(problem), problem)

    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_queries_of_less_precision_are_searched_as_they_are(self, dtype: type) -> None:
        problem = classification(n=800, d=8)
        problem = replace(problem, queries=problem.queries.astype(dtype))
        self.assert_right(self.search(problem), problem)

    def test_its_shortlist_holds_enough_rows_of_its_own_range(self) -> None:
        keys = column(clustered().keys)
        listed = self.build(keys, 100, 700).candidates(clustered().queries, K)
        assert listed.rows.shape[0] == 40
        assert listed.rows.shape[1] >= K
        assert set(np.unique(listed.rows)) <= {-1, *range(100, 800)}
        for line in listed.rows:
            present = line[line >= 0]
            assert len(np.unique(present)) == len(present) >= K

    def test_its_promise_holds(self) -> None:
        problem = clustered()
        listed = self.build(column(problem.keys)).candidates(problem.queries, K)
        if listed.bounds is None:
            assert not self.exact
            return
        distances, rows = neighbors(problem.keys, problem.queries, len(problem))
        for line, ordered, squared, bound in zip(listed.rows, rows, distances**2, listed.bounds, strict=True):
            left_out = ~np.isin(ordered, line)
            assert (squared[left_out] >= bound).all()

    def test_parts_give_the_answer_of_the_whole(self) -> None:
        problem = clustered(n=1600)
        keys = column(problem.keys[:900], problem.keys[900:])
        parts = [self.build(keys, 0, 800), self.build(keys, 800, 800)]
        self.assert_right(nearest(parts, keys, problem.queries, K), problem)

    def test_the_batch_of_a_query_does_not_matter(self) -> None:
        problem = clustered()
        keys = column(problem.keys)
        part = self.build(keys)
        together = nearest([part], keys, problem.queries, K)
        for row in range(0, 40, 9):
            alone = nearest([part], keys, problem.queries[row : row + 1], K)
            assert same_bits(alone.rows[0], together.rows[row])
            assert same_bits(alone.distances[0], together.distances[row])

    def test_too_few_rows_are_padded(self) -> None:
        problem = classification(n=6, q=3, d=8)
        found = self.search(problem)
        assert (found.rows[:, 6:] == -1).all()
        assert np.isinf(found.distances[:, 6:]).all()
        np.testing.assert_array_equal(np.sort(found.rows[:, :6], axis=1), [list(range(6))] * 3)

    def test_no_query_finds_nothing(self) -> None:
        found = self.search(clustered(q=0))
        assert found.rows.shape == (0, K)

    def test_rejected_rows_are_replaced_by_the_next_nearest(self) -> None:
        problem = clustered()
        keys = column(problem.keys)
        found = nearest([self.build(keys)], keys, problem.queries, K, reject=lambda _, rows: np.asarray(rows % 4 != 1))
        assert (found.rows % 4 == 1).all()
        kept = problem.rows(slice(1, None, 4))
        self.assert_right(replace(found, rows=found.rows // 4), kept)

    def test_each_query_rejects_for_itself(self) -> None:
        problem = clustered()
        keys = column(problem.keys)
        own = np.arange(40)
        found = nearest(
            [self.build(keys)],
            keys,
            problem.keys[:40],
            K,
            reject=lambda positions, rows: np.asarray(rows == own[positions, None]),
        )
        assert not (found.rows == own[:, None]).any()
        assert found.distances.min() > 0

    def test_all_rows_rejected_finds_nothing(self) -> None:
        problem = clustered()
        keys = column(problem.keys)
        found = nearest([self.build(keys)], keys, problem.queries, K, reject=lambda _, rows: np.ones(rows.shape, bool))
        assert (found.rows == -1).all()
        assert np.isinf(found.distances).all()

    def test_a_stored_key_finds_itself_at_distance_zero(self) -> None:
        problem = clustered()
        found = self.search(replace(problem, queries=problem.keys[:40]))
        np.testing.assert_array_equal(found.rows[:, 0], np.arange(40))
        assert not found.distances[:, 0].any()

    def test_ties_go_by_rank(self) -> None:
        if not self.exact:
            pytest.skip("an approximate engine may miss some of many twins")
        problem = on_grid(classification(n=300, q=30, d=4))
        keys, ids = column(problem.keys), np.random.default_rng(1).permutation(300)
        ranks = np.argsort(np.argsort(ids))
        found = nearest([self.build(keys)], keys, problem.queries, K, tie_ranks=ranks)
        self.assert_right(found, problem, ids)

    def test_hundreds_of_twins_are_ordered_by_rank(self) -> None:
        if not self.exact:
            pytest.skip("an approximate engine may miss some of many twins")
        problem = replace(classification(n=500, q=2), keys=np.ones((500, 5)))
        keys = column(problem.keys)
        found = nearest([self.build(keys)], keys, problem.queries, K, tie_ranks=np.arange(500)[::-1].copy())
        np.testing.assert_array_equal(found.rows, [list(range(499, 489, -1))] * 2)

    def test_differences_below_float32_are_seen(self) -> None:
        if not self.exact:
            pytest.skip("an approximate engine may miss the nearest of near twins")
        random = np.random.default_rng(2)
        problem = classification(n=300, q=10, d=6)
        problem = replace(
            problem,
            keys=1000 + 1e-5 * random.normal(size=(300, 6)),
            queries=1000 + 1e-5 * random.normal(size=(10, 6)),
        )
        distances, rows = neighbors(problem.keys, problem.queries, K)
        found = self.search(problem)
        np.testing.assert_array_equal(found.rows, rows)
        np.testing.assert_allclose(found.distances, distances, rtol=1e-9)

    def test_queries_finer_than_the_keys_find_the_nearest_of_all_distances(self) -> None:
        if not self.exact:
            pytest.skip("an approximate engine may miss the nearest of near twins")
        random = np.random.default_rng(3)
        keys = column((1000 + 2e-4 * random.normal(size=(4000, 6))).astype(np.float32))
        queries = 1000 + 2e-4 * random.normal(size=(20, 6))
        every_row = np.tile(np.arange(4000), (20, 1))
        all_distances = np.sort(pair_distances(keys, queries, every_row), axis=1)
        found = nearest([self.build(keys)], keys, queries, K)
        np.testing.assert_array_equal(found.distances, all_distances[:, :K])

    def test_forgotten_rows_are_passed_over(self) -> None:
        problem = clustered()
        keys = column(problem.keys)
        alive = np.arange(800) % 4 == 1
        part, usable = self.build(keys), Usable(alive)
        found = nearest([part], keys, problem.queries, K, usable=usable)
        assert alive[found.rows].all()
        kept = problem.rows(alive)
        self.assert_right(replace(found, rows=found.rows // 4), kept)
        width = part.candidates(problem.queries, K).rows.shape
        assert part.candidates(problem.queries, K, usable).rows.shape == width

    def test_an_unknown_option_is_refused_before_there_are_rows(self) -> None:
        mark = "&" if "?" in self.spec else "?"
        with pytest.raises(InvalidInput, match="nonsense"):
            check_index(f"{self.spec}{mark}nonsense=1", 8)

    def test_what_it_saved_is_what_it_loads(self) -> None:
        problem = clustered()
        keys, spec = column(problem.keys), parse_spec(self.spec)
        built = self.build(keys)
        assert built.saved_as == engine_named(spec.engine).saved_name(spec)
        if built.saved_as is None:
            assert not built.saved()
            assert built.measured() is None
            return
        pieces = {name: bytes(piece) for name, piece in built.saved().items()}
        measured = json.loads(json.dumps(built.measured()))
        assert saved_spec(spec, built.saved_as, 8, 800) == spec
        loaded = load_index(spec, keys, 0, 800, Stored(pieces, measured))
        assert (loaded.first, loaded.n_rows, loaded.saved_as) == (0, 800, built.saved_as)
        first, second = (nearest([part], keys, problem.queries, K) for part in (built, loaded))
        np.testing.assert_array_equal(first.rows, second.rows)

    def test_what_is_not_whole_is_not_loaded(self) -> None:
        keys, spec = column(clustered().keys), parse_spec(self.spec)
        built = self.build(keys)
        if built.saved_as is None:
            pytest.skip("of this engine nothing is saved")
        pieces = built.saved()
        for name in pieces:
            others = {other: piece for other, piece in pieces.items() if other != name}
            with pytest.raises(CorruptFile):
                load_index(spec, keys, 0, 800, Stored(others))
        with pytest.raises(CorruptFile):
            load_index(spec, keys, 0, 799, Stored(pieces))

    def test_it_says_what_it_will_take(self) -> None:
        spec = parse_spec(self.spec)
        engine = engine_named(spec.engine)
        few, many = (engine.footprint(spec, 8, n) for n in (10_000, 10_000_000))
        assert 0 <= few.ram <= few.building
        assert few.ram <= many.ram
        assert few.building <= many.building
        kept = self.build(column(clustered().keys)).saved_as is not None
        assert (0 < few.saved < many.saved) if kept else not many.saved

    def test_it_says_how_long_it_will_take(self) -> None:
        spec = parse_spec(self.spec)
        seconds = engine_named(spec.engine).build_time(spec, 8, 10_000)
        assert min(seconds.training, seconds.filling, seconds.measuring) >= 0
        assert seconds.training + seconds.filling > 0
