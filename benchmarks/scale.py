"""Search of a million keys beside faiss and ScaNN, what the compressed index costs the gain, and growth of a memory.

    python -m benchmarks scale                       # a million rows of 256 numbers, and 1 and 10 million of 64
    python -m benchmarks scale --rows 100000000      # one size alone, of 64 numbers

Sizes that the result file holds already are kept. Keys of text are those of the memory that
`experiments/runs/language.sh` makes; without it they are left out.
"""

import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy import ndarray

import residual_memory as rm
from benchmarks.growth import BLOCK, clustered
from experiments.language.table import memory_path
from experiments.results_file import stamped
from residual_memory.demo.assets import N_TRAIN, shipped_keys
from residual_memory.indexes.calibration import true_distances
from residual_memory.indexes.registry import auto_factory
from residual_memory.machine import free_ram_bytes
from residual_memory.metrics import recall
from residual_memory.residuals import tempered

RESULTS = Path(__file__).parent / "results" / "scale.json"
TEXT = "tiny-8192-enwiki-train-2000000-1000000"
DIM, K, ASKED, JUDGED, TURNS = 256, 32, 10_000, 1_000, 5
RECALLS = {0.95: 8_000, 0.99: 3_000}  # and the queries a second that are aimed at
SIZES = (1_000_000, 10_000_000)
PLAIN = "IVF1024,PQ128x4fs,RFlat"
AUTHORS_ROWS, EXPONENT = 1_600_000_000, 0.6

Row = dict[str, Any]
Search = Callable[[ndarray], ndarray]  # queries [q d] to distances [q k]


def run(rows: int | None = None, quick: bool = False) -> None:
    """Measure, write the result file and print it."""
    held = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() and not quick else []
    grown = {row["rows"]: row for row in held if row["setting"].startswith("growth")}
    others = [row for row in held if not row["setting"].startswith(("growth", "law"))]
    if rows is None:
        others = [*million(100_000 if quick else 1_000_000), *kept_gain()]
    for n in (rows,) if rows else (100_000,) if quick else SIZES:
        if rows or n not in grown:
            grown[n] = growth(n)
    sizes = [grown[n] for n in sorted(grown)]
    measured = [*others, *sizes, *law(sizes)]
    for row in measured:
        print(json.dumps(row, ensure_ascii=False))
    if not quick:
        head = stamped(
            "scale", "python -m benchmarks scale", "keys of Wikipedia text; made-up clustered keys; CIFAR-100"
        )
        RESULTS.write_text(json.dumps({**head, "rows": measured}, indent=1, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------- a million rows beside others


def million(n: int) -> list[Row]:
    """Ours, plain faiss and ScaNN, each tuned to a recall on the same queries, on all threads."""
    rows = []
    for data, keys, queries in _keys(n):
        with tempfile.TemporaryDirectory() as folder:
            rows += _compared(f"{len(keys):,} x {DIM} keys, {data}", keys, queries, Path(folder) / "memory")
    return rows


def _keys(n: int) -> Iterator[tuple[str, ndarray, ndarray]]:
    """Keys of the memory and of the queries: clustered ones, and those of text where they are."""
    yield (
        "clustered",
        np.concatenate(list(clustered(n, DIM, seed=0))),
        np.concatenate(list(clustered(ASKED, DIM, seed=1))),
    )
    if memory_path(TEXT).exists():
        with rm.Memory.open(memory_path(TEXT)) as memory:
            keys = memory.snapshot.keys.take(np.arange(min(n, len(memory))))
        yield "text", keys[:-ASKED], keys[-ASKED:]  # the end of the text is what is asked
    else:
        print("keys of text are left out: experiments/runs/language.sh makes the memory that they come from")


def _compared(name: str, keys: ndarray, queries: ndarray, path: Path) -> list[Row]:
    queries = queries.astype(np.float32)
    with _memory(keys, path) as memory:
        true, _ = true_distances(memory.snapshot.keys, 0, len(keys), queries[:JUDGED], K)
        index = f"faiss:{auto_factory(DIM, len(keys), free_ram_bytes())}"
        started = time.perf_counter()
        first = rm.ResidualKNN(memory, n_neighbors=K, bandwidth=1.0, index=f"{index}?recall=0.95")
        build_seconds = time.perf_counter() - started
        first.save_index()
        singles = keys.astype(np.float32)
        peers: dict[str, dict[str, Search]] = {"faiss " + PLAIN: _faiss(singles), "ScaNN": _scann(singles)}
        rows = []
        for wanted, aim in RECALLS.items():
            knn = rm.ResidualKNN(memory, n_neighbors=K, bandwidth=1.0, index=f"{index}?recall={wanted}")

            def own(some: ndarray, knn: rm.ResidualKNN = knn) -> ndarray:
                return knn.search(some, K)[1].distances

            for peer, ways in peers.items():
                how, their = _fastest(ways, queries, true, wanted)
                ours, theirs = _in_turns(own, their, queries)
                rows.append(
                    {
                        "setting": f"{name}, recall {wanted}",
                        "against": f"{peer}, {how}",
                        "ratio": ours / theirs,
                        "ours": ours,
                        "theirs": theirs,
                        "unit": "seconds a query",
                        "index": knn.description,
                        "recall": recall(own(queries[:JUDGED]), true, tolerance=1e-3),
                        "recall_theirs": recall(their(queries[:JUDGED]), true, tolerance=1e-3),
                        "queries_per_second": 1 / ours,
                        "goal_queries_per_second": aim,
                        "build_seconds": build_seconds,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    return rows


@contextmanager
def _memory(keys: ndarray, path: Path) -> Iterator[rm.Memory]:
    """The keys with labels and predictions that nobody looks at."""
    with rm.Memory.create(path, dim=keys.shape[1], n_outputs=2, key_dtype="float16") as memory:
        blocks = (keys[start : start + BLOCK] for start in range(0, len(keys), BLOCK))
        memory.extend(
            {"keys": some, "labels": np.zeros(len(some), np.int64), "predictions": np.full((len(some), 2), 0.5)}
            for some in blocks
        )
        yield memory


def _faiss(keys: ndarray) -> dict[str, Search]:
    """Plain faiss with a float32 copy for the re-rank, and ways of asking it."""
    index: Any = faiss.index_factory(keys.shape[1], PLAIN)
    index.train(keys[:: max(1, len(keys) // 100_000)])
    index.add(keys)

    def way(nprobe: int, factor: int) -> Search:
        def search(queries: ndarray) -> ndarray:
            inverted: Any = faiss.downcast_index(index.base_index)
            inverted.nprobe = nprobe
            index.k_factor = factor
            return np.sqrt(np.maximum(index.search(queries, K)[0], 0))

        return search

    return {f"nprobe {p}, k_factor {f}": way(p, f) for p in (2, 4, 8, 16, 32, 64, 128, 256) for f in (4, 10, 20, 40)}


def _scann(keys: ndarray) -> dict[str, Search]:
    """ScaNN as its authors advise for a million rows, with its own re-rank, and ways of asking it."""
    from scann.scann_ops.py import scann_ops_pybind

    leaves = int(len(keys) ** 0.5)
    searcher = (
        scann_ops_pybind.builder(keys, K, "squared_l2")
        .tree(num_leaves=leaves, num_leaves_to_search=leaves // 10, training_sample_size=250_000)
        .score_ah(2)
        .reorder(100)
        .build()
    )

    def way(searched: int, reordered: int) -> Search:
        def search(queries: ndarray) -> ndarray:
            squared = searcher.search_batched_parallel(
                queries, leaves_to_search=searched, pre_reorder_num_neighbors=reordered
            )[1]
            return np.sqrt(np.maximum(squared, 0))

        return search

    return {
        f"{searched} leaves, {reordered} reordered": way(searched, reordered)
        for searched in (4, 8, 16, 32, 64, 128, 256)
        for reordered in (128, 320, 640, 1280)
    }


def _fastest(ways: dict[str, Search], queries: ndarray, true: ndarray, wanted: float) -> tuple[str, Search]:
    """The fastest way that reaches the recall; the one that comes nearest to it where none does."""
    reached: list[tuple[float, str]] = []
    near: list[tuple[float, str]] = []
    for name, search in ways.items():
        started = time.perf_counter()
        found = recall(search(queries[:JUDGED]), true, tolerance=1e-3)
        near.append((-found, name))
        if found >= wanted:
            reached.append((time.perf_counter() - started, name))
    name = min(reached or near)[1]
    return name, ways[name]


def _in_turns(ours: Search, theirs: Search, queries: ndarray) -> tuple[float, float]:
    """Median seconds a query of each, in turns, after one turn to warm up."""
    taken: list[tuple[float, float]] = []
    for _ in range(TURNS + 1):
        first = time.perf_counter()
        ours(queries)
        second = time.perf_counter()
        theirs(queries)
        taken.append((second - first, time.perf_counter() - second))
    own, other = (statistics.median(column) / len(queries) for column in zip(*taken[1:], strict=True))
    return own, other


# ---------------------------------------------------------------------- what it costs the gain


def kept_gain() -> list[Row]:
    """Accuracy after correction with the compressed index at its default recall, and with exact search."""
    return [_kept_images(), *([_kept_text()] if memory_path(TEXT).exists() else [])]


def _kept_images() -> Row:
    shipped = shipped_keys()
    said = tempered(shipped.predictions()[N_TRAIN:], 1.4)
    memory = rm.Memory.create(dim=64, n_outputs=100)
    memory.append(shipped.keys[:N_TRAIN], shipped.labels[:N_TRAIN], shipped.predictions()[:N_TRAIN])

    def accuracy(index: str) -> float:
        knn = rm.ResidualKNN(memory, n_neighbors=50, bandwidth=0.6, temperature=1.4, index=index)
        scores = rm.correct(said, knn(shipped.keys[N_TRAIN:]))
        return float((scores.argmax(1) == shipped.labels[N_TRAIN:]).mean())

    base = float((said.argmax(1) == shipped.labels[N_TRAIN:]).mean())
    return _kept("CIFAR-100 keys, 50,000 x 64", 64, N_TRAIN, base, accuracy)


def _kept_text() -> Row:
    with rm.Memory.open(memory_path(TEXT)) as whole:
        snapshot, n = whole.snapshot, len(whole) - ASKED
        asked = np.arange(n, n + ASKED)
        queries, labels = snapshot.keys.take(asked), snapshot.targets(asked)
        layout = {"residuals": "top-m", "key_dtype": "float16", "prediction_dtype": whole.layout.prediction_dtype}
        memory = rm.Memory.create(dim=whole.layout.dim, n_outputs=whole.layout.n_outputs, **layout)  # type: ignore[arg-type]
        for start in range(0, n, BLOCK):
            rows = np.arange(start, min(start + BLOCK, n))
            memory.append(snapshot.keys.take(rows), snapshot.targets(rows), snapshot.top_m(rows))
        said = [snapshot.predictions(rows) for rows in np.array_split(asked, 20)]

    def accuracy(index: str) -> float:
        knn = rm.ResidualKNN(memory, n_neighbors=50, bandwidth=bandwidth, index=index)
        scores = [
            rm.correct(base, knn(some)).argmax(1)
            for base, some in zip(said, np.array_split(queries, len(said)), strict=True)
        ]
        return float((np.concatenate(scores) == labels).mean())

    bandwidth = rm.ResidualKNN(memory, n_neighbors=50).bandwidth
    base = float((np.concatenate([some.argmax(1) for some in said]) == labels).mean())
    return _kept(f"keys of text, {n:,} x {memory.layout.dim}", memory.layout.dim, n, base, accuracy)


def _kept(setting: str, dim: int, n: int, base: float, accuracy: Callable[[str], float]) -> Row:
    index = f"faiss:{auto_factory(dim, n, free_ram_bytes())}?recall=0.95"
    exact, compressed = accuracy("exact"), accuracy(index)
    return {
        "setting": f"gain kept, {setting}",
        "against": "exact search",
        "index": index,
        "base": base,
        "corrected_exact": exact,
        "corrected": compressed,
        "difference": compressed - exact,
        "goal_difference": 0.001,
        "n_test": ASKED,
    }


# ---------------------------------------------------------------------- growth


def growth(n: int) -> Row:
    """A memory of n rows in a process of its own."""
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
        command = [sys.executable, "-m", "benchmarks.growth", str(n), folder]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir()
    measured: Row = json.loads(answer.stdout.splitlines()[-1])
    return {"setting": f"growth, {n:,} x 64 clustered keys", **measured}


def law(sizes: list[Row]) -> list[Row]:
    """How the cost of a query grows with the rows, fitted, and what that gives for the authors' 1.6 billion."""
    if len(sizes) < 2:
        return []
    rows = [row["rows"] for row in sizes]
    exponent, seconds = _fitted(rows, [1 / row["queries_per_second"] for row in sizes])
    build_exponent, build_seconds = _fitted(rows, [row["build_seconds"] for row in sizes])
    largest = sizes[-1]
    return [
        {
            "setting": f"law, {sizes[0]['rows']:,} to {largest['rows']:,} rows at recall 0.95",
            "exponent": exponent,
            "goal_exponent": EXPONENT,
            "build_exponent": build_exponent,
            "extrapolated_rows": AUTHORS_ROWS,
            "extrapolated_queries_per_second": 1 / seconds,
            "extrapolated_build_seconds": build_seconds,
            "extrapolated_index_and_value_bytes": AUTHORS_ROWS * largest["bytes_per_row"],
            "extrapolated_key_bytes": AUTHORS_ROWS * 2 * largest["dim"],
        }
    ]


def _fitted(rows: list[int], costs: list[float]) -> tuple[float, float]:
    """The exponent of a power law through some costs, and what it gives for the authors' rows."""
    slope, start = (float(found) for found in np.polyfit(np.log(rows), np.log(costs), 1))
    return slope, math.exp(start + slope * math.log(AUTHORS_ROWS))
