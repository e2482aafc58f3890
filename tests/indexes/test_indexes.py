import importlib.util
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy import ndarray

from residual_memory.errors import InvalidInput, MissingExtra
from residual_memory.indexes import distances as distances_module
from residual_memory.indexes.base import IndexSpec, nearest
from residual_memory.indexes.distances import pair_distances, squared_error
from residual_memory.indexes.registry import auto_factory, build_index, parse_spec, resolved
from residual_memory.testing import IndexContract
from residual_memory.testing.problems import clustered, column
from tests import reference
from tests.problems import classification, empty_memory, in_plain_python, knn_of, memory_of, same_bits

needs_scann = pytest.mark.skipif(importlib.util.find_spec("scann") is None, reason="scann is not installed")


class TestExactFaiss(IndexContract):
    spec = "exact:faiss"


class TestExactTorch(IndexContract):
    spec = "exact:torch"


class TestExactNumpy(IndexContract):
    spec = "exact:numpy"


class TestInvertedFiles(IndexContract):
    spec = "faiss:IVF16,Flat?nprobe=16"
    exact = False
    least_recall = 1.0


class TestProductQuantisation(IndexContract):
    spec = "faiss:IVF16,PQ8x4fs?nprobe=16"
    exact = False
    least_recall = 0.97


@needs_scann
class TestScann(IndexContract):
    spec = "scann"
    exact = False
    least_recall = 0.97


@needs_scann
class TestScannOfCoarserCodes(IndexContract):
    spec = "scann:num_leaves=16,dimensions_per_block=4?num_leaves_to_search=16&k_factor=20"
    exact = False
    least_recall = 0.95


def test_a_trailing_rflat_is_dropped_since_every_shortlist_is_rescored() -> None:
    keys = column(clustered().keys)
    built = build_index(parse_spec("faiss:IVF16,PQ8x4fs,RFlat?nprobe=16"), keys, 0, 800)
    plain = build_index(parse_spec("faiss:IVF16,PQ8x4fs?nprobe=16"), keys, 0, 800)
    queries = clustered().queries
    np.testing.assert_array_equal(nearest([built], keys, queries, 10).rows, nearest([plain], keys, queries, 10).rows)


def test_a_longer_shortlist_recalls_more() -> None:
    problem = classification(n=2000, q=100, d=16)
    keys = column(problem.keys)
    true, _ = reference.neighbors(problem.keys, problem.queries, 10)

    def recalled(k_factor: int) -> float:
        spec = parse_spec(f"faiss:IVF16,PQ4x4fs?nprobe=16&k_factor={k_factor}")
        found = nearest([build_index(spec, keys, 0, 2000)], keys, problem.queries, 10)
        return float((found.distances <= true[:, -1:] + 1e-9).mean())

    assert recalled(1) < recalled(4) < recalled(20)
    assert recalled(20) > 0.9


def test_probing_more_cells_recalls_more() -> None:
    problem = classification(n=2000, q=100, d=16)
    keys = column(problem.keys)
    true, _ = reference.neighbors(problem.keys, problem.queries, 10)

    def recalled(nprobe: int) -> float:
        spec = parse_spec(f"faiss:IVF16,Flat?nprobe={nprobe}")
        found = nearest([build_index(spec, keys, 0, 2000)], keys, problem.queries, 10)
        return float((found.distances <= true[:, -1:] + 1e-9).mean())

    assert recalled(1) < recalled(4) < recalled(16) == 1


def test_too_few_rows_to_train_are_searched_exactly() -> None:
    problem = classification(n=100)
    keys = column(problem.keys)
    part = build_index(parse_spec("faiss:IVF16,Flat?nprobe=1"), keys, 0, 100)
    assert part.description.startswith("exact")
    _, rows = reference.neighbors(problem.keys, problem.queries, 7)
    np.testing.assert_array_equal(nearest([part], keys, problem.queries, 7).rows, rows)


def test_auto_is_exact_up_to_a_million_rows_and_quantised_beyond() -> None:
    keys = column(classification(n=200).keys)
    assert build_index(parse_spec("auto"), keys, 0, 200).description.startswith("exact")
    assert resolved(parse_spec("auto"), 512, 1_000_000) == IndexSpec("exact")
    beyond = resolved(parse_spec("auto"), 512, 1_000_001)
    assert beyond == IndexSpec("faiss", "PCAR128,IVF2048,PQ128x4fs", {"recall": "0.95"})
    assert resolved(parse_spec("auto?recall=0.99"), 512, 1_000_001) == replace(beyond, options={"recall": "0.99"})


def test_auto_has_shorter_codes_where_ram_is_short_and_a_graph_over_many_cells() -> None:
    assert auto_factory(64, 10**8, 16 << 30) == "PCAR64,IVF32768_HNSW32,PQ64x4fs"
    assert auto_factory(64, 10**8, 6 << 30) == "PCAR32,IVF32768_HNSW32,PQ32x4fs"
    assert auto_factory(64, 10**8, 0) == "PCAR16,IVF32768_HNSW32,PQ16x4fs"


def test_a_spec_is_an_engine_a_build_and_options() -> None:
    assert parse_spec("faiss:IVF16,Flat?nprobe=4&k_factor=2") == IndexSpec(
        "faiss", "IVF16,Flat", {"nprobe": "4", "k_factor": "2"}
    )
    assert parse_spec("exact") == IndexSpec("exact")


def test_an_unknown_engine_is_refused_with_the_close_match() -> None:
    with pytest.raises(InvalidInput, match=r"'exakt'.*did you mean 'exact'"):
        parse_spec("exakt")


BAD_SPECS = [
    "",
    "hnsw",
    "exact:jax",
    "exact?nprobe=3",
    "exact:numpy?device=cpu",
    "exact:torch?device=nonsense",
    "exact:torch?device=cuda:99",
    "faiss",
    "faiss:",
    "faiss:nonsense",
    "faiss:IVF16,PQ7",
    "faiss:IVF16,Flat?nprobe",
    "faiss:IVF16,Flat?=3",
    "faiss:IVF16,Flat?nprobe=many",
    "faiss:IVF16,Flat?nprobes=3",
    "faiss:IVF16,Flat?k_factor=0.5",
    "faiss:IVF16,Flat?k_factor=nan",
    "faiss:IVF16,Flat?k_factor=inf",
    "faiss:IVF16,Flat?nprobe=0",
    "faiss:IVF16,Flat?nprobe=-1",
]


@pytest.mark.parametrize("spec", BAD_SPECS)
@pytest.mark.parametrize("n", [10, 800])
def test_a_spec_that_cannot_be_built_is_refused_however_many_rows_there_are(spec: str, n: int) -> None:
    keys = column(classification(n=n, d=8).keys)
    with pytest.raises(InvalidInput):
        build_index(parse_spec(spec), keys, 0, n)


BAD_SCANN_SPECS = [
    "scann:IVF16",
    "scann:num_leaves",
    "scann:num_leaves=many",
    "scann:num_leaves=0",
    "scann:num_leaves=inf",
    "scann:num_leaves_to_search=4",
    "scann?num_leaves=4",
    "scann?nprobe=4",
    "scann?num_leaves_to_search=0",
    "scann?k_factor=nan",
]


@needs_scann
@pytest.mark.parametrize("spec", BAD_SCANN_SPECS)
@pytest.mark.parametrize("n", [10, 800])
def test_a_scann_spec_that_cannot_be_built_is_refused_however_many_rows_there_are(spec: str, n: int) -> None:
    keys = column(classification(n=n, d=8).keys)
    with pytest.raises(InvalidInput):
        build_index(parse_spec(spec), keys, 0, n)


@needs_scann
@pytest.mark.parametrize(("spec", "n"), [("scann", 255), ("scann:num_leaves=50", 799)])
def test_too_few_rows_for_scann_are_searched_exactly(spec: str, n: int) -> None:
    problem = classification(n=n)
    keys = column(problem.keys)
    part = build_index(parse_spec(spec), keys, 0, n)
    assert part.description.startswith("exact")
    _, rows = reference.neighbors(problem.keys, problem.queries, 7)
    np.testing.assert_array_equal(nearest([part], keys, problem.queries, 7).rows, rows)


@needs_scann
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_keys_and_queries_that_would_end_scann_are_stopped_before_it(bad: float) -> None:
    problem = clustered()
    part = build_index(parse_spec("scann"), column(problem.keys), 0, 800)
    keys, queries = problem.keys.copy(), problem.queries.copy()
    keys[700, 3] = queries[5, 3] = bad
    with pytest.raises(InvalidInput, match=r"keys are not finite, or too long for ScaNN.*use 'exact'"):
        build_index(parse_spec("scann"), column(keys), 0, 800)
    with pytest.raises(InvalidInput, match="queries are not finite"):
        part.candidates(queries, 5)
    with pytest.raises(InvalidInput, match="dimension 7"):
        part.candidates(problem.queries[:, :7], 5)


@needs_scann
def test_a_query_whose_leaf_of_scann_holds_too_few_rows_finds_fewer() -> None:
    problem = clustered()
    keys = column(problem.keys)
    part = build_index(parse_spec("scann?num_leaves_to_search=1"), keys, 0, 800)
    found = nearest([part], keys, problem.queries, 790)
    assert (found.rows[:, 0] >= 0).mean() > 0.5, "a leaf may be empty, most are not"
    assert (found.rows[:, -1] == -1).all()
    np.testing.assert_array_equal(np.isinf(found.distances), found.rows < 0)


@needs_scann
def test_many_queries_of_scann_find_what_few_do() -> None:
    problem = clustered(q=600)
    keys = column(problem.keys)
    part = build_index(parse_spec("scann?num_leaves_to_search=2"), keys, 0, 800)
    together = part.candidates(problem.queries, 5).rows
    np.testing.assert_array_equal(together[:40], part.candidates(problem.queries[:40], 5).rows)


def hide(monkeypatch: pytest.MonkeyPatch, modules: set[str]) -> None:
    """As if these were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in modules else find(name))


@pytest.mark.parametrize(
    ("spec", "module"),
    [("exact:faiss", "faiss"), ("exact:torch", "torch"), ("faiss:Flat", "faiss"), ("scann", "scann")],
)
def test_an_engine_that_is_not_installed_says_how_to_install_it(
    spec: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, {module})
    with pytest.raises(MissingExtra, match=rf"pip install 'residual-memory\[{module}\]'"):
        build_index(parse_spec(spec), column(classification().keys), 0, 60)


@pytest.mark.parametrize(("missing", "chosen"), [(set(), "faiss"), ({"faiss"}, "numpy"), ({"faiss", "torch"}, "numpy")])
def test_exact_search_takes_the_best_that_is_installed(
    missing: set[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, missing)
    part = build_index(parse_spec("exact"), column(classification().keys), 0, 60)
    assert chosen in part.description


PLAIN_SEARCH = """
import importlib.util
import sys
import numpy as np
sys.modules["faiss"] = sys.modules["torch"] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in ("faiss", "torch") else find(name)
from residual_memory.correction import ResidualKNN
from residual_memory.memory import Memory
memory = Memory.create(dim=1, n_outputs=2)
memory.append([[0.0], [1.0]], [0, 1], [[0.5, 0.5]] * 2)
print(ResidualKNN(memory, n_neighbors=1, bandwidth=1.0)([[0.9]]).tolist())
"""


def test_numpy_alone_is_enough() -> None:
    assert in_plain_python(PLAIN_SEARCH) == "[[-0.5, 0.5]]\n"


@pytest.mark.parametrize(("dtype", "precision"), [(np.float64, 1e-14), (np.float32, 1e-6), (np.float16, 1e-6)])
@pytest.mark.parametrize("with_faiss", [True, False])
@pytest.mark.parametrize("cuts", [[], [1, 30]])
def test_pair_distances_are_those_of_the_stored_keys_and_infinite_where_a_row_is_missing(
    dtype: type, precision: float, with_faiss: bool, cuts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distances_module, "_has_faiss", lambda: with_faiss)
    monkeypatch.setattr(distances_module, "SCRATCH_BYTES", 1000)
    problem = classification()
    stored: ndarray = problem.keys.astype(dtype)
    queries: ndarray = problem.queries.astype(dtype)
    found = pair_distances(column(*np.split(stored, cuts)), queries, np.array([[0, -1, 59]] * 12))
    assert np.isinf(found[:, 1]).all()
    differences = queries[:, None, :].astype(float) - stored[[0, 59]].astype(float)
    np.testing.assert_allclose(found[:, [0, 2]], np.sqrt((differences**2).sum(axis=2)), rtol=precision)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("with_faiss", [True, False])
def test_the_distance_of_a_key_to_itself_is_zero_wherever_it_lies(
    dtype: type, with_faiss: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distances_module, "_has_faiss", lambda: with_faiss)
    stored: ndarray = (classification(d=37).keys * 1000).astype(dtype)
    rows = np.tile(np.arange(60), (60, 1))
    whole = pair_distances(column(stored), stored, rows)
    parted = pair_distances(column(*np.split(stored, [7, 8, 40])), stored, rows)
    assert not np.diag(whole).any()
    np.testing.assert_array_equal(whole, parted)
    np.testing.assert_array_equal(whole[:, 5], pair_distances(column(stored), stored, rows[:, 5:6])[:, 0])


def test_every_finite_number_of_half_precision_is_the_same_in_single(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances_module, "HALF_BLOCK", 1000)
    halves: ndarray = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(-1, 2)
    singles = distances_module._computable(halves, np.dtype(np.float32))
    assert same_bits(singles, halves.astype(np.float32))


@pytest.mark.parametrize("d", [2, 64, 1000])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_the_bound_on_rounding_covers_what_float32_loses(d: int, spread: float) -> None:
    random = np.random.default_rng(0)
    keys = (spread * random.normal(size=(400, d))).astype(np.float32)
    queries = (spread * random.normal(size=(50, d))).astype(np.float32)
    norms = (keys * keys).sum(axis=1)
    rough = (queries * queries).sum(axis=1)[:, None] + norms - 2 * (queries @ keys.T)
    exact = ((queries[:, None].astype(float) - keys[None].astype(float)) ** 2).sum(axis=2)
    lengths = np.linalg.norm(queries.astype(float), axis=1)[:, None]
    slack = squared_error(d, (lengths + np.sqrt(norms.max())) ** 2)
    assert (np.abs(rough - exact) <= slack).all()
    assert slack.max() < 0.01 * exact.min() or d == 2


def test_the_numpy_engine_reads_a_memory_on_disk_block_by_block(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from residual_memory.indexes import exact

    monkeypatch.setattr(exact, "KEYS_PER_BLOCK", 7)
    monkeypatch.setattr(exact, "QUERIES_PER_BLOCK", 5)
    problem = classification()
    _, rows = reference.neighbors(problem.keys, problem.queries, 9)
    for index in ("exact:numpy", "exact:torch", "exact:faiss"):
        _, found = knn_of(memory_of(problem, tmp_path / index[6:]), index=index).search(problem.queries, 9)
        np.testing.assert_array_equal(found.rows, rows)


def test_a_reduced_matmul_precision_of_torch_changes_no_answer() -> None:
    import torch

    problem = classification(n=500, d=32)
    _, rows = reference.neighbors(problem.keys, problem.queries, 10)
    before = torch.get_float32_matmul_precision()
    for precision in ("high", "medium"):
        torch.set_float32_matmul_precision(precision)
        try:
            _, found = knn_of(memory_of(problem), index="exact:torch").search(problem.queries, 10)
        finally:
            torch.set_float32_matmul_precision(before)
        np.testing.assert_array_equal(found.rows, rows)


def test_an_index_grows_with_its_memory_in_few_parts() -> None:
    problem = classification(n=120)
    memory = empty_memory(problem)
    knn = knn_of(memory, index="exact:numpy")
    for row in range(120):
        part = problem.rows([row])
        memory.append(part.keys, part.labels, part.predictions)
        _, found = knn.search(problem.queries, 3)
    _, rows = reference.neighbors(problem.keys, problem.queries, 3)
    np.testing.assert_array_equal(found.rows, rows)
    assert knn._state is not None
    assert len(knn._state.parts) <= 8
