"""Make a memory of so many clustered keys of 64 numbers and its index, and ask it in another process: a line of JSON.

python -m benchmarks.growth ROWS FOLDER
"""

import json
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

import residual_memory as rm
from benchmarks.peak import process_bytes
from residual_memory.errors import LowRecall
from residual_memory.indexes.calibration import true_distances
from residual_memory.indexes.registry import auto_factory
from residual_memory.machine import free_ram_bytes
from residual_memory.metrics import recall
from residual_memory.types import TopM

DIM, OUTPUTS, KEPT, K = 64, 32_000, 8, 32
CLUSTERS = 1000
BLOCK = 1 << 18
ASKED, JUDGED = 10_000, 1_000  # queries that are timed, and whose true neighbours are looked up
TURNS = 3


def clustered(n: int, dim: int, seed: int) -> Iterator[ndarray]:
    """Keys in blocks, of float16: a thousand clusters, with variances that fall as 1/i as those of keys of text do."""
    scale = (np.arange(1, dim + 1) ** -0.5).astype(np.float32)
    centres = 2 * scale * np.random.default_rng(12345).standard_normal((CLUSTERS, dim), np.float32)
    random = np.random.default_rng(seed)
    for start in range(0, n, BLOCK):
        size = min(BLOCK, n - start)
        keys = random.standard_normal((size, dim), np.float32)
        keys *= scale
        keys += centres[random.integers(0, CLUSTERS, size)]
        yield keys.astype(np.float16)


def token_rows(n: int, seed: int) -> dict[str, Any]:
    """Labels and top-m predictions as those of a language model, the same ones for every block."""
    random = np.random.default_rng(seed)
    shares = np.sort(random.dirichlet(np.full(KEPT + 1, 0.5), n), axis=1)[:, ::-1]
    said = TopM(
        random.integers(0, OUTPUTS // KEPT, (n, KEPT), np.int32) + np.arange(KEPT, dtype=np.int32) * (OUTPUTS // KEPT),
        shares[:, :KEPT],
        shares[:, KEPT],
    )
    return {"labels": random.integers(0, OUTPUTS, n), "predictions": said}


def blocks_of(keys: Iterator[ndarray]) -> Iterator[Mapping[str, Any]]:
    """What `Memory.extend` takes."""
    rows = token_rows(BLOCK, 0)
    said = rows["predictions"]
    for block in keys:
        n = len(block)
        some = TopM(said.indices[:n], said.probabilities[:n], said.rest[:n])
        yield {"keys": block, "labels": rows["labels"][:n], "predictions": some}


def main() -> None:
    """Arguments: the number of rows, and a folder on the disk to be used; with "ask" and an index, of what is there."""
    n, path = int(sys.argv[1]), Path(sys.argv[2]) / f"growth-{sys.argv[1]}"
    print(json.dumps(asked(path, sys.argv[4]) if sys.argv[3:4] == ["ask"] else grown(n, path)))


def grown(n: int, path: Path) -> Mapping[str, Any]:
    """What a memory takes to be made, and then, in a process that did not make it, to be asked."""
    index = f"faiss:{auto_factory(DIM, n, free_ram_bytes())}?recall=0.95"
    shutil.rmtree(path, ignore_errors=True)
    measured: dict[str, Any] = {"rows": n, "dim": DIM, "k": K}
    layout: dict[str, Any] = {"residuals": "top-m", "key_dtype": "float16", "prediction_dtype": "log8"}
    with rm.Memory.create(path, dim=DIM, n_outputs=OUTPUTS, **layout) as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore", LowRecall)
        measured["writing_seconds"] = seconds(lambda: memory.extend(blocks_of(clustered(n, DIM, seed=0))))
        started = time.perf_counter()
        knn = rm.ResidualKNN(memory, n_neighbors=K, bandwidth=1.0, index=index)
        measured["build_seconds"] = time.perf_counter() - started
        measured["saving_seconds"] = seconds(knn.save_index)
        measured["build_peak_bytes"] = process_bytes("VmHWM:")
        values = memory.layout.bytes_per_row(KEPT) - 2 * DIM
        saved = sum(file.stat().st_size for file in path.glob("index-*"))
        measured |= {"index": knn.description, "value_bytes": values, "index_bytes": saved / n}
        measured["bytes_per_row"] = values + saved / n
    del knn, memory
    command = [sys.executable, "-m", "benchmarks.growth", str(n), str(path.parent), "ask", index]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    shutil.rmtree(path)
    return {**measured, **json.loads(told.splitlines()[-1])}


def asked(path: Path, index: str) -> Mapping[str, Any]:
    """How fast it answers, in how much RAM, and how well; the true neighbours are looked up when that is known."""
    measured: dict[str, Any] = {}
    with rm.Memory.open(path) as memory:
        started = time.perf_counter()
        knn = rm.ResidualKNN(memory, n_neighbors=K, bandwidth=1.0, index=index)
        measured["open_seconds"] = time.perf_counter() - started
        queries = np.concatenate(list(clustered(ASKED, DIM, seed=1))).astype(np.float32)
        timed = [seconds(lambda: knn.search(queries, K)) for _ in range(TURNS + 1)][1:]
        measured["queries_per_second"] = len(queries) / float(np.median(timed))
        measured["latency_seconds"] = float(
            np.median([seconds(lambda q=q: knn.search(q[None], K)) for q in queries[:200]])
        )
        _, found = knn.search(queries[:JUDGED], K)
        measured |= {"resident_bytes": process_bytes("VmRSS:"), "anonymous_bytes": process_bytes("RssAnon:")}
        measured["peak_bytes"] = process_bytes("VmHWM:")
        true, _ = true_distances(memory.snapshot.keys, 0, len(memory), queries[:JUDGED], K)
        measured["recall"] = recall(found.distances, true, tolerance=1e-4)
    return measured


def seconds(work: Any) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
