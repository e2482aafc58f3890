"""What other implementations got wrong."""

from dataclasses import replace
from itertools import product

import faiss
import numpy as np
import pytest

from residual_memory.correction import correct
from residual_memory.errors import InvalidInput
from residual_memory.indexes.base import nearest
from residual_memory.indexes.registry import build_index, parse_spec
from residual_memory.metrics import log_loss
from residual_memory.residuals import top_m
from residual_memory.testing.problems import column
from tests import reference
from tests.problems import Problem, classification, empty_memory, knn_of, memory_of, on_grid, same_bits

ENGINES = ["exact:numpy", "exact:torch", "exact:faiss"]
every_engine = pytest.mark.parametrize("index", ENGINES)


def islands(n: int = 720) -> Problem:
    """Sixteen clusters so far apart that a probe of one cell sees one of them alone."""
    random = np.random.default_rng(0)
    problem = classification(n=n, q=16, d=16)
    centres = 100 * np.eye(16)
    return replace(
        problem,
        keys=np.repeat(centres, n // 16, axis=0) + random.normal(size=(n, 16)),
        queries=centres + random.normal(size=(16, 16)),
    )


def test_faiss_itself_gives_minus_one_where_it_finds_fewer_than_k() -> None:
    """Without this the next two tests would show nothing."""
    problem = islands()
    index = faiss.index_factory(16, "IVF16,Flat")
    index.train(problem.keys.astype(np.float32))
    index.add(problem.keys.astype(np.float32))
    _, rows = index.search(problem.queries.astype(np.float32), 60)
    assert (rows == -1).any()


def test_missing_neighbors_of_faiss_weigh_nothing_and_are_not_the_last_row() -> None:
    problem = islands()
    knn = knn_of(memory_of(problem), n_neighbors=60, bandwidth=50.0, index="faiss:IVF16,Flat?nprobe=1")
    found = knn.neighbors(problem.queries)
    missing = found.ids == -1
    assert missing.any(axis=1).sum() >= 8
    assert np.isinf(found.distances[missing]).all()
    assert not found.weights[missing].any()
    np.testing.assert_allclose(found.weights.sum(axis=1), 1)
    rest = reference.residuals(problem.labels, problem.predictions)
    wanted = np.einsum("qk,qkc->qc", found.weights, np.where(missing[..., None], 0, rest[found.ids]))
    np.testing.assert_allclose(knn(problem.queries), wanted, atol=1e-13)


def test_what_faiss_misses_in_a_later_part_is_not_the_last_row_of_the_part_before() -> None:
    problem = islands()
    part = build_index(parse_spec("faiss:IVF16,Flat?nprobe=1"), column(problem.keys), 90, 630)
    listed = part.candidates(problem.queries, 60).rows
    assert (listed == -1).any()
    assert listed[listed != -1].min() >= 90


def test_no_neighbor_at_all_means_the_base_and_not_the_last_row(problem: Problem) -> None:
    knn = knn_of(memory_of(problem, groups=["all"] * 60), index="exact:faiss")
    residual = knn(problem.queries, exclude=["all"] * 12)
    assert not residual.any()
    assert same_bits(correct(problem.said, residual), problem.said)


@every_engine
def test_distances_are_plain_and_not_squared(index: str) -> None:
    memory = empty_memory(classification(d=2, c=2))
    memory.append([[3.0, 4.0], [6.0, 8.0]], [0, 1], [[0.5, 0.5], [0.5, 0.5]])
    found = knn_of(memory, n_neighbors=2, bandwidth=5.0, index=index).neighbors([[0.0, 0.0]])
    assert found.distances.tolist() == [[5, 10]]
    np.testing.assert_allclose(found.weights, [[1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))]])


@every_engine
def test_the_nearer_memory_weighs_more(problem: Problem, index: str) -> None:
    found = knn_of(memory_of(problem), index=index).neighbors(problem.queries)
    assert (np.diff(found.distances, axis=1) > 0).all()
    assert (np.diff(found.weights, axis=1) < 0).all()


@pytest.mark.parametrize("label", [32_767, 32_768, 65_536, 250_001])
def test_a_class_index_beyond_sixteen_bits_keeps_its_value(label: int) -> None:
    memory = empty_memory(classification(d=2, c=2), n_outputs=250_002, residuals="top-m")
    memory.append([[0.0, 0.0]], [label], top_m([[0.25, 0.75]], 2))
    with pytest.warns(UserWarning, match="1 rows"):
        knn = knn_of(memory)
    scores = knn([[0.0, 0.0]])[0]
    assert np.flatnonzero(scores > 0.9).tolist() == [label]
    assert np.flatnonzero(knn.memory_only([[0.0, 0.0]])[0]).tolist() == [label]


def test_a_top_m_index_beyond_sixteen_bits_keeps_its_value() -> None:
    memory = empty_memory(classification(d=2, c=2), n_outputs=70_001, residuals="top-m")
    compressed = replace(
        top_m([[0.25, 0.75]], 2), indices=np.array([[70_000, 40_000]]), probabilities=np.array([[0.25, 0.75]])
    )
    memory.append([[0.0, 0.0]], [1], compressed)
    with pytest.warns(UserWarning, match="1 rows"):
        residual = knn_of(memory)([[0.0, 0.0]])[0]
    assert residual[[70_000, 40_000, 1]].tolist() == [-0.25, -0.75, 1]


def test_a_query_that_is_stored_finds_itself_unless_it_is_excluded(problem: Problem) -> None:
    ids = np.random.default_rng(1).permutation(60) + 1000
    knn = knn_of(memory_of(problem, ids=ids))
    assert (knn.neighbors(problem.keys).ids[:, 0] == ids).all()
    excluding = knn.neighbors(problem.keys, exclude=ids)
    assert not (excluding.ids == ids[:, None]).any()
    assert (excluding.ids >= 0).all(), "the place of the excluded row goes to the next"


def test_a_duplicate_of_the_query_goes_with_its_group(problem: Problem) -> None:
    twins = replace(
        problem,
        keys=np.repeat(problem.keys[:30], 2, axis=0),
        labels=np.repeat(problem.labels[:30], 2),
        predictions=np.repeat(problem.predictions[:30], 2, axis=0),
    )
    groups = np.repeat([f"document {number}" for number in range(30)], 2)
    knn = knn_of(memory_of(twins, groups=groups))
    assert knn.neighbors(twins.keys).distances[:, 1].max() == 0
    excluding = knn.neighbors(twins.keys, exclude=groups)
    assert excluding.distances.min() > 0
    assert not (excluding.ids // 2 == (np.arange(60) // 2)[:, None]).any()


def test_exclude_is_read_as_a_group_where_groups_are_of_its_type_and_else_as_an_id(problem: Problem) -> None:
    queries = problem.keys[:1]
    numbered = knn_of(memory_of(problem, groups=np.arange(60) % 2))
    assert (numbered.neighbors(queries, exclude=[0]).ids % 2 == 1).all()
    named = knn_of(memory_of(problem, groups=["g"] * 60))
    assert 0 not in named.neighbors(queries, exclude=[0]).ids
    assert (named.neighbors(queries, exclude=["g"]).ids == -1).all()


def test_excluding_what_is_not_there_excludes_nothing(problem: Problem) -> None:
    knn = knn_of(memory_of(problem))
    plain, excluding = knn.neighbors(problem.queries), knn.neighbors(problem.queries, exclude=np.full(12, 999))
    np.testing.assert_array_equal(plain.ids, excluding.ids)


def test_a_forgotten_row_is_no_neighbor_of_the_row_that_took_its_id(problem: Problem) -> None:
    memory = memory_of(problem)
    memory.forget([0])
    memory.append(problem.keys[1:2], problem.labels[1:2], problem.predictions[1:2], ids=[0])
    found = knn_of(memory).neighbors(problem.keys[:1])
    assert found.distances.min() > 0
    assert 0 not in knn_of(memory).neighbors(problem.keys[:2], exclude=[0, 0]).ids


def test_duplicates_at_place_k_give_one_answer_for_every_engine_and_row_order() -> None:
    problem = on_grid(classification(n=200, q=30, d=3))
    distances, rows = reference.neighbors(problem.keys, problem.queries, 8)
    assert (distances[:, 6] == distances[:, 7]).any(), "no tie at place k: the test shows nothing"
    for index, seed in product(ENGINES, range(3)):
        order = np.random.default_rng(seed).permutation(200)
        memory = empty_memory(problem)
        for part in np.array_split(order, seed + 1):
            some = problem.rows(part)
            memory.append(some.keys, some.labels, some.predictions, ids=part)
        found = knn_of(memory, index=index).neighbors(problem.queries)
        np.testing.assert_array_equal(found.ids, rows[:, :7], err_msg=f"{index}, rows in order {seed}")


def test_ties_of_string_ids_go_by_the_string(problem: Problem) -> None:
    same = replace(problem.rows(slice(0, 4)), keys=np.zeros((4, 5)))
    found = knn_of(memory_of(same, ids=["b", "a10", "a9", "c"]), n_neighbors=3).neighbors(np.zeros((1, 5)))
    assert found.ids.tolist() == [["a10", "a9", "b"]]


def test_quantised_distances_are_never_given_out() -> None:
    problem = classification(n=800, d=8)
    keys = column(problem.keys)
    part = build_index(parse_spec("faiss:IVF16,PQ8x4fs?nprobe=16"), keys, 0, 800)
    found = nearest([part], keys, problem.queries, 10)
    differences = problem.keys[found.rows] - problem.queries[:, None, :]
    np.testing.assert_allclose(found.distances, np.sqrt((differences**2).sum(axis=2)), rtol=1e-12)


def test_rows_are_indexed_as_they_were_filled_and_never_as_zeros(problem: Problem) -> None:
    memory = empty_memory(problem)
    knn = knn_of(memory, n_neighbors=1, index="exact:faiss")
    for row in range(60):
        part = problem.rows([row])
        memory.append(part.keys, part.labels, part.predictions)
        assert knn.neighbors(np.concatenate([part.keys, np.zeros((1, 5))])).distances[0, 0] == 0
    assert knn.neighbors(np.zeros((1, 5))).distances.min() > 0


def test_a_low_temperature_makes_no_nan_of_a_sure_base() -> None:
    problem = classification()
    sure = replace(problem, predictions=np.eye(4)[np.random.default_rng(0).integers(0, 4, 60)])
    residual = knn_of(memory_of(sure), temperature=0.01)(problem.queries)
    assert np.isfinite(residual).all()
    np.testing.assert_allclose(residual.sum(axis=1), 0, atol=1e-12)


def test_the_log_loss_of_uncorrected_zeros_is_refused_and_not_infinite() -> None:
    with pytest.raises(InvalidInput, match="to_probabilities"):
        log_loss([[1.0, 0.0]], [1])


def test_shuffled_residuals_do_not_look_like_a_gain() -> None:
    """A memory that knows nothing must lose to its base: otherwise the comparison itself is broken."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 400)
    keys = np.eye(4)[labels] + 0.1 * random.normal(size=(400, 4))
    said = 0.7 * np.eye(4)[labels] + 0.3 / 4
    problem = Problem(keys[:300], labels[:300], said[:300], keys[300:], said[300:])
    shuffled = replace(problem, labels=random.permutation(problem.labels))

    def hits(some: Problem) -> float:
        scores = correct(problem.said, knn_of(memory_of(some))(problem.queries))
        return float((scores.argmax(axis=1) == labels[300:]).mean())

    assert hits(problem) == 1
    assert hits(shuffled) < 0.9


def test_a_wrong_base_is_corrected_where_the_memory_knows_better() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 400)
    keys = np.eye(4)[labels] + 0.1 * random.normal(size=(400, 4))
    said = 0.7 * np.eye(4)[(labels + 1) % 4] + 0.3 / 4
    knn = knn_of(memory_of(Problem(keys[:300], labels[:300], said[:300], keys[300:], said[300:])))
    assert (said[300:].argmax(axis=1) != labels[300:]).all()
    assert (correct(said[300:], knn(keys[300:])).argmax(axis=1) == labels[300:]).all()
