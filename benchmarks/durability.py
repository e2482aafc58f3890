"""What durability costs: appends over `np.save` + fsync, a verified open over reading the files, erasure with proof."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from benchmarks.core import Row, in_turns, row_of
from experiments.results_file import stamped
from residual_memory.memory import Memory

RESULTS = Path(__file__).parent / "results" / "durability.json"
DIM, OUTPUTS, MILLION = 256, 10, 1_000_000
APPENDS = ((1, 40), (1_000, 20), (10_000, 10), (100_000, 4))  # rows in one, and how many of them
GONE = 1_000
PIECE = 1 << 20
TURNS = 6


def run() -> None:
    """Measure everything, write the result file and print it."""
    rows = [appending(n_rows, times) for n_rows, times in APPENDS]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "memory"
        filled(path)
        rows += [*opening(path), *forgetting(path)]
    data = f"random keys of {DIM} half-precision numbers, {OUTPUTS} outputs in half precision"
    content = {**stamped("durability", "make bench", data), "rows": rows}
    RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    for row in rows:
        print(f"{row['setting']}: {row['ratio']:.3g} of {row['against']}")


def appending(n_rows: int, times: int) -> Row:
    """Appends one after the other to a memory, and the same bytes by `np.save` and fsync, a file each."""
    columns = arrays(n_rows)
    seconds: list[tuple[float, float]] = []
    for _ in range(TURNS):
        with tempfile.TemporaryDirectory(dir=".") as folder, created(Path(folder) / "memory") as memory:
            own = timed_alone(lambda memory=memory: [memory.append(*columns) for _ in range(times)])  # type: ignore[misc]
            other = timed_alone(lambda folder=folder: saved(Path(folder), columns, times))  # type: ignore[misc]
            seconds.append((own, other))
    own, other = (statistics.median(some) for some in zip(*seconds[1:], strict=True))
    size = sum(column.nbytes for column in columns) + 8 * n_rows
    setting = f"{times} appends of {n_rows:,} rows"
    row = row_of(setting, "np.save and fsync of the same bytes", 2.0, own, other)
    return {**row, "throughput_ratio": other / own, "ours_bytes_per_second": times * size / own}


def saved(folder: Path, columns: Sequence[ndarray], times: int) -> None:
    """A file for each append: columns and ids, on the disk when the call returns."""
    n_rows = len(columns[0])
    for number in range(times):
        with open(folder / f"{number}.npy", "wb") as file:
            for column in (*columns, np.arange(number * n_rows, (number + 1) * n_rows)):
                np.save(file, column)
            file.flush()
            os.fsync(file.fileno())


def opening(path: Path) -> Iterator[Row]:
    """A verified open, a plain one, and a fast check, over reading the files."""
    size = f"{MILLION:,} x {DIM}"
    own, other = in_turns(lambda: verified(path), lambda: read(path))
    yield row_of(f"verified open, {size}, all in the cache", "reading the files", 1.5, own, other)
    cold = [(timed(lambda: verified(path), path), timed(lambda: read(path), path)) for _ in range(3)]
    own, other = (statistics.median(some) for some in zip(*cold, strict=True))
    yield row_of(f"verified open, {size}, nothing in the cache", "reading the files", 1.5, own, other)
    own, other = in_turns(lambda: Memory.open(path), lambda: read(path))
    yield {**row_of(f"open, {size}", "reading the files", 1.0, own, other), "goal_seconds": 0.05}
    own, other = in_turns(lambda: Memory.open(path).verify(fast=True), lambda: read(path))
    yield row_of(f"fast check, {size}", "reading the files", 1.0, own, other)


def forgetting(path: Path) -> Iterator[Row]:
    """Rows forgotten at once, and their erasure with and without a search of all files."""
    seconds = timed_alone(lambda: read(path))
    random = np.random.default_rng(1)
    for search in (False, True):
        with Memory.open(path, writable=True) as memory:
            ids = random.choice(memory.ids, GONE, replace=False)
            masked = timed_alone(lambda memory=memory, ids=ids: memory.forget(ids))  # type: ignore[misc]
            erased = timed_alone(lambda memory=memory, search=search: memory.compact(search_files=search))  # type: ignore[misc]
        what = "erased, and looked for in every file" if search else "erased"
        row = row_of(f"{GONE:,} rows {what}", "reading the files", 0.0, erased, seconds)
        del row["goal"]  # none was set
        yield {**row, "mask_seconds": masked}


def arrays(n_rows: int, seed: int = 0) -> tuple[ndarray, ndarray, ndarray]:
    """Keys, labels and predictions."""
    random = np.random.default_rng(seed)
    keys = random.standard_normal((n_rows, DIM), np.float32).astype(np.float16)
    return keys, random.integers(0, OUTPUTS, n_rows).astype(np.int32), np.full((n_rows, OUTPUTS), 0.1, np.float16)


def created(path: Path) -> Memory:
    """An empty memory for such rows."""
    return Memory.create(path, dim=DIM, n_outputs=OUTPUTS, key_dtype="float16", prediction_dtype="float16")


def filled(path: Path) -> None:
    """A memory of a million rows."""
    with created(path) as memory:
        blocks = (arrays(100_000, seed) for seed in range(MILLION // 100_000))
        memory.extend(dict(zip(("keys", "labels", "predictions"), block, strict=True)) for block in blocks)


def verified(path: Path) -> None:
    """Every byte compared before anything is read."""
    Memory.open(path, verify=True)


def read(path: Path) -> None:
    """Every file, from its beginning to its end."""
    buffer = bytearray(PIECE)
    for file in path.glob("*.safetensors"):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def timed(job: Callable[[], object], path: Path) -> float:
    """Seconds of a job for which nothing of the files is in the system's cache."""
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return timed_alone(job)


def timed_alone(job: Callable[[], Any]) -> float:
    """Seconds of a job."""
    started = time.perf_counter()
    job()
    return time.perf_counter() - started
