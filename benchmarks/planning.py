"""What `resmem estimate` says, over what real builds then take: bytes and seconds."""

import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.core import Row, row_of
from benchmarks.peak import process_bytes
from experiments.results_file import stamped
from residual_memory.correction import ResidualKNN
from residual_memory.indexes.footprint import example_keys
from residual_memory.memory import Memory
from residual_memory.planning import Plan, estimate

RESULTS = Path(__file__).parent / "results" / "planning.json"
OUTPUTS = 10
BUILDS: tuple[tuple[int, int, str], ...] = (
    (200_000, 64, "exact"),
    (300_000, 128, "faiss:IVF1024,PQ64x4fs?recall=0.95"),
    (100_000, 64, "faiss:HNSW32"),
    (2_000_000, 64, "auto"),
)
APPENDED = 50_000  # rows at a time


def run() -> None:
    """Estimate, build, compare, write the result file and print it."""
    rows: list[Row] = []
    for n, dim, index in BUILDS:
        plan = estimate(n, dim, OUTPUTS, key_dtype="float16", prediction_dtype="float16", index=index)
        with multiprocessing.get_context("spawn").Pool(1) as fresh:  # nothing of the probe is left in it
            real = fresh.apply(built, (n, dim, index))
        rows += compared(plan, real)
    data = f"made-up keys in half precision, {OUTPUTS} outputs"
    content = {**stamped("planning", "python -m benchmarks planning", data), "rows": rows}
    RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    for row in rows:
        print(
            f"{row['setting']}: {row['ours']:,.6g} against {row['theirs']:,.6g} {row['unit']}, ratio {row['ratio']:.3f}"
        )


def compared(plan: Plan, real: dict[str, float]) -> list[Row]:
    """A row for each figure: the plan's over the real one."""
    seconds = plan.seconds
    assert seconds is not None
    said = {
        "bytes of rows": plan.rows_bytes,
        "bytes of the saved index": plan.footprint.saved,
        "bytes on disk": plan.disk_bytes,
        "bytes of RAM while the index is built": plan.footprint.building,
        "seconds of writing rows": seconds.writing,
        "seconds of building the index": seconds.training + seconds.filling + seconds.measuring,
    }
    name = f"{plan.n_rows:,} x {plan.layout.dim} float16, {plan.engine}"
    return [
        {**row_of(f"{name}: {what}", "a real build", 1.1, value, real[what]), "unit": what.partition(" ")[0]}
        for what, value in said.items()
        if real[what]
    ]


def built(n: int, dim: int, index: str) -> dict[str, float]:
    """A real build, in a process of its own."""
    random = np.random.default_rng(0)
    writing = 0.0
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "memory"
        with Memory.create(path, dim=dim, n_outputs=OUTPUTS, key_dtype="float16", prediction_dtype="float16") as memory:
            keys = example_keys(n, dim)
            for start in range(0, n, APPENDED):
                block = keys[start : start + APPENDED]
                labels = random.integers(0, OUTPUTS, len(block))
                said = np.full((len(block), OUTPUTS), 1 / OUTPUTS, np.float32)
                writing += seconds_of(lambda: memory.append(block, labels, said))  # noqa: B023  called at once
            del keys, block
            before = process_bytes("RssAnon:")
            with watched() as peak:
                built_in = seconds_of(lambda: save(memory, index))
            return {
                "bytes of rows": memory.n_bytes,
                "bytes of the saved index": sum(file.stat().st_size for file in path.glob("index-*")),
                "bytes on disk": sum(file.stat().st_size for file in path.iterdir()),
                "bytes of RAM while the index is built": max(peak) - before,
                "seconds of writing rows": writing,
                "seconds of building the index": built_in,
            }


@contextmanager
def watched() -> Iterator[list[int]]:
    """The bytes that this process holds besides mapped files, looked at a hundred times a second."""
    seen, done = [process_bytes("RssAnon:")], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            seen.append(process_bytes("RssAnon:"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def save(memory: Memory, index: str) -> Any:
    """Build an index, and keep it where there is something to keep."""
    knn = ResidualKNN(memory, n_neighbors=10, bandwidth=1.0, index=index)
    return None if index == "exact" else knn.save_index()


def seconds_of(call: Any) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
