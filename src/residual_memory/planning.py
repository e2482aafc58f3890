"""What a memory of so many rows will take, before anything is built: disk, RAM and time.

Bytes are arithmetic; seconds are those of a probe of a few seconds on this machine, scaled by how each part of the work
grows. A plan that does not fit names the nearest that does.
"""

import errno
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy import ndarray

from residual_memory.correction import TABLE_BYTES
from residual_memory.display import html_table, size_text, time_text
from residual_memory.errors import InvalidInput, StorageFailure
from residual_memory.indexes.footprint import Footprint, timed
from residual_memory.indexes.registry import (
    LEAST_NUMBERS,
    MOST_NUMBERS,
    compressed,
    engine_named,
    parse_spec,
    planned,
    usual_cells,
)
from residual_memory.machine import existing, free_disk_bytes, free_ram_bytes
from residual_memory.memory import Memory
from residual_memory.memory.format import MAX_MANIFEST, Layout, check_layout
from residual_memory.memory.memory import RESERVE_BYTES
from residual_memory.memory.segments import SEGMENT_BYTES
from residual_memory.types import Task, TopM
from residual_memory.validation import as_count, as_non_negative

WRITTEN_AT_ONCE = SEGMENT_BYTES // 2  # builders append so much, which is a segment
WRITING_RAM = 4 * SEGMENT_BYTES  # of a builder: rows that wait, as they came and as they are stored
# Of a manifest: what it always says, of a segment, of each MiB of that.
MANIFEST_BYTES, SEGMENT_RECORD_BYTES, CHECKSUM_BYTES = 1000, 130, 11
PROBE_SECONDS, PROBE_APPENDS = 1.5, 8
LEAST_CELLS = 256
FEW = 8  # probabilities that a row keeps, where whole distributions do not fit

# From what loses nothing that counts to what loses most.
NARROWER_KEYS = ("float64", "float32", "float16")
NARROWER_DENSE = ("float64", "float32", "float16")
NARROWER_TOP_M = ("float64", "float32", "log16", "log8")


@dataclass(frozen=True)
class Seconds:
    """How long the parts of a build take.

    Attributes
    ----------
    extracting : running the model, as given.
    writing : the rows, durably.
    training, filling, measuring : the index.
    """

    extracting: float
    writing: float
    training: float
    filling: float
    measuring: float

    @property
    def total(self) -> float:
        return self.extracting + self.writing + self.training + self.filling + self.measuring


@dataclass(frozen=True)
class Plan:
    """A memory that is not there yet, and what it will take.

    Attributes
    ----------
    n_rows, layout, top_m : its rows; `top_m` is None where these are dense.
    index : the spec that was asked for.
    engine : what it comes to for so many rows.
    row_bytes : of a row, with an integer id and nothing that rows may carry.
    rows_bytes : of all of them.
    reserve_bytes : held for forgetting on a full disk.
    manifest_bytes : of the manifest and its copy.
    footprint : of the index.
    table_bytes : of the residuals that are kept ready in RAM.
    free_disk, free_ram : bytes that are there.
    seconds : of building; None where nothing was probed.
    """

    n_rows: int
    layout: Layout
    top_m: int | None
    index: str
    engine: str
    row_bytes: int
    rows_bytes: int
    reserve_bytes: int
    manifest_bytes: int
    footprint: Footprint
    table_bytes: int
    free_disk: int
    free_ram: int
    seconds: Seconds | None = None

    @property
    def disk_bytes(self) -> int:
        """What lies on disk in the end: rows, saved index, reserve and manifest."""
        return self.rows_bytes + self.reserve_bytes + self.manifest_bytes + self.footprint.saved

    @property
    def compaction_bytes(self) -> int:
        """What lies on disk at the peak of a compaction of rows that were forgotten everywhere: all rows twice."""
        return self.disk_bytes + self.rows_bytes

    @property
    def ids_bytes(self) -> int:
        """Of ids, and of a mark on each row that is not forgotten."""
        return 9 * self.n_rows

    @property
    def search_bytes(self) -> int:
        """RAM to search; the libraries and the queries come on top."""
        return self.footprint.ram + self.table_bytes + self.ids_bytes

    @property
    def building_bytes(self) -> int:
        """RAM at the peak of building, first the rows and then the index."""
        return max(min(WRITING_RAM, 4 * self.rows_bytes) + self.ids_bytes, self.footprint.building + self.ids_bytes)

    @property
    def shortages(self) -> tuple[str, ...]:
        """What is missing: "disk", "manifest", "search" or "building"; nothing where the plan fits."""
        needs = {
            "disk": self.disk_bytes > self.free_disk,
            "manifest": self.manifest_bytes > 2 * MAX_MANIFEST,
            "search": self.search_bytes > self.free_ram,
            "building": self.building_bytes > self.free_ram,
        }
        return tuple(name for name, missing in needs.items() if missing)

    @property
    def fits(self) -> bool:
        return not self.shortages

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """For people: what it takes, by name."""
        return (*_sizes(self), *_times(self))

    def _repr_html_(self) -> str:
        missing = ", ".join(self.shortages)
        fits = "fits" if self.fits else f"does not fit: {missing}"
        return html_table(f"Plan of {self.n_rows:,} rows: {fits}", self.facts)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `estimate` that name the plan."""
        layout = self.layout
        return {
            "task": layout.task,
            "key_dtype": layout.key_dtype,
            "prediction_dtype": layout.prediction_dtype,
            "top_m": self.top_m,
            "index": self.index,
        }


def _sizes(plan: Plan) -> list[tuple[str, str]]:
    footprint = plan.footprint
    table = size_text(plan.table_bytes) if plan.table_bytes else "read from disk: too many to keep ready"
    return [
        ("on disk", f"{size_text(plan.disk_bytes)} of {size_text(plan.free_disk)} that are free"),
        ("  rows", f"{size_text(plan.rows_bytes)}, {plan.row_bytes:,} bytes each"),
        ("  index", f"{size_text(footprint.saved)}, where it is kept" if footprint.saved else "made anew when opened"),
        ("  held", f"{size_text(plan.reserve_bytes + plan.manifest_bytes)} for forgetting, and the manifest"),
        ("  at most", f"{size_text(plan.compaction_bytes)}, while rows that were forgotten everywhere are erased"),
        ("in RAM", f"{size_text(plan.search_bytes)} of {size_text(plan.free_ram)}, besides the libraries"),
        ("  index", f"{size_text(footprint.ram)}, {plan.engine}"),
        ("  residuals", table),
        ("  ids", size_text(plan.ids_bytes)),
        ("  at most", f"{size_text(plan.building_bytes)}, while it is built"),
    ]


def _times(plan: Plan) -> list[tuple[str, str]]:
    seconds = plan.seconds
    if seconds is None:
        return []
    extracting = [("  model", time_text(seconds.extracting))] if seconds.extracting else []
    left_out = "" if extracting else ", besides running the model"
    return [
        ("time", f"{time_text(seconds.total)}{left_out}, if this machine goes on as in the probe"),
        *extracting,
        ("  rows", f"{time_text(seconds.writing)} to write"),
        ("  index", f"{time_text(seconds.training)} to train, {time_text(seconds.filling)} to fill"),
        *([("", f"{time_text(seconds.measuring)} to measure its recall")] if seconds.measuring else []),
    ]


def estimate(
    n_rows: int,
    dim: int,
    n_outputs: int,
    *,
    task: Task = "classification",
    key_dtype: str = "float32",
    prediction_dtype: str = "float32",
    top_m: int | None = None,
    index: str = "auto",
    path: str | os.PathLike[str] = ".",
    free_disk: int | None = None,
    free_ram: int | None = None,
    seconds_per_row: float = 0.0,
    probe: bool = True,
) -> Plan:
    """What a memory will take on disk and in RAM, and how long it takes to build.

    Parameters
    ----------
    n_rows, dim, n_outputs : rows, numbers in a key, classes or targets.
    task, key_dtype, prediction_dtype : as in `Memory.create`.
    top_m : probabilities that a row keeps; None keeps whole predictions.
    index : as in `ResidualKNN`.
    path : where the memory is to lie; nothing need be there yet.
    free_disk, free_ram : bytes; None looks up what the disk of `path` has free, and what this process may still take.
    seconds_per_row : of running the model, which is not probed.
    probe : time the parts of a build for about 5 seconds, writing up to 256 MiB to the disk of `path` for a while; only
        of a plan that fits.

    Raises
    ------
    InvalidInput : if no memory can be like that, or what its index takes is not known.
    MissingExtra : if the index needs a package that is not installed.
    StorageFailure : if the disk refuses the probe.
    """
    n, d, c = as_count("n_rows", n_rows), as_count("dim", dim), as_count("n_outputs", n_outputs)
    m = None if top_m is None else as_count("top_m", top_m)
    if m is not None and m > c:
        raise InvalidInput(f"top_m is {m}, expected 1 to {c}, the number of classes")
    per_row = as_non_negative("seconds_per_row", seconds_per_row)
    layout = Layout(d, c, task, "euclidean", "dense" if m is None else "top-m", key_dtype, prediction_dtype)
    check_layout(layout)
    disk = free_disk_bytes(path) if free_disk is None else as_count("free_disk", free_disk)
    ram = free_ram_bytes() if free_ram is None else as_count("free_ram", free_ram)
    plan = _sized(n, layout, m, _Planned.of(index, d, n, ram), disk, ram)
    return replace(plan, seconds=_probed(plan, Path(path), per_row)) if probe and plan.fits else plan


def nearest_fitting(plan: Plan) -> Plan | None:
    """The plan that fits and loses least against one that does not; None where none fits.

    Keys and predictions in fewer bytes, the largest probabilities of a row alone, and a compressed index with ever
    shorter codes and fewer cells: whatever is not short stays as it is.
    """
    fitting = [(loss, other) for loss, other in _variants(plan) if other.fits]
    return min(fitting, key=lambda found: found[0])[1] if fitting else None


def smallest(plan: Plan) -> Plan:
    """Of all variants the one that comes nearest to fitting."""

    def excess(other: Plan) -> float:
        disk, ram = other.disk_bytes / other.free_disk, max(other.search_bytes, other.building_bytes) / other.free_ram
        return max(disk, ram)

    return min((other for _, other in _variants(plan)), key=excess)


def most_rows(plan: Plan) -> int:
    """How many rows of the smallest variant would fit; 0 where not one does."""
    low, high = 0, plan.n_rows
    while high - low > max(low // 100, 1):
        middle = (low + high) // 2
        index = _Planned.of(plan.index, plan.layout.dim, middle, plan.free_ram)
        fewer = nearest_fitting(_sized(middle, plan.layout, plan.top_m, index, plan.free_disk, plan.free_ram))
        low, high = (low, middle) if fewer is None else (middle, high)
    return low


def require_room(path: str | os.PathLike[str], n_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises
    ------
    StorageFailure : saying what is needed and what is free.
    """
    free = free_disk_bytes(path)
    if n_bytes > free:
        raise StorageFailure(
            errno.ENOSPC,
            f"the rows need {n_bytes:,} bytes, but {existing(path)} has {free:,} free; "
            "make room, name another disk, or see what resmem estimate says",
        )


@dataclass(frozen=True)
class _Planned:
    """A spec, what it comes to, and what that takes."""

    index: str
    engine: str
    footprint: Footprint

    @staticmethod
    def of(index: str, dim: int, n_rows: int, free_ram: int) -> "_Planned":
        spec, footprint = planned(index, dim, n_rows, free_ram)
        return _Planned(index, f"{spec.engine}:{spec.build}" if spec.build else spec.engine, footprint)


def _sized(n: int, layout: Layout, m: int | None, index: _Planned, free_disk: int, free_ram: int) -> Plan:
    row_bytes = layout.bytes_per_row(m)
    rows_bytes = n * row_bytes
    segments = math.ceil(rows_bytes / WRITTEN_AT_ONCE)
    manifest = MANIFEST_BYTES + segments * SEGMENT_RECORD_BYTES + CHECKSUM_BYTES * math.ceil(rows_bytes / (1 << 20))
    table = n * layout.n_outputs * (8 if layout.prediction_dtype == "float64" else 4)
    return Plan(
        n_rows=n,
        layout=layout,
        top_m=m,
        index=index.index,
        engine=index.engine,
        row_bytes=row_bytes,
        rows_bytes=rows_bytes,
        reserve_bytes=2 * (RESERVE_BYTES + 2 * manifest + n // 8),  # as Memory keeps it
        manifest_bytes=2 * manifest,
        footprint=index.footprint,
        table_bytes=table if m is None and table <= TABLE_BYTES else 0,
        free_disk=free_disk,
        free_ram=free_ram,
    )


# ---------------------------------------------------------------------- what loses little


def _variants(plan: Plan) -> Iterator[tuple[int, Plan]]:
    """The plan and others that take less, with how many steps each is away; a step of keys is a small one."""
    layouts = list(_narrower(plan.layout, plan.top_m))
    indexes = list(_compressed(plan))
    for steps, layout, m in layouts:
        for more, index in indexes:
            yield steps + more, _sized(plan.n_rows, layout, m, index, plan.free_disk, plan.free_ram)


def _narrower(layout: Layout, m: int | None) -> Iterator[tuple[int, Layout, int | None]]:
    predictions: list[tuple[str, int | None]]
    if m is None:
        predictions = [(name, None) for name in _from(NARROWER_DENSE, layout.prediction_dtype)]
        if layout.task == "classification" and layout.n_outputs > FEW:
            predictions += [("log16", FEW), ("log8", FEW)]
    else:
        predictions = [(name, m) for name in _from(NARROWER_TOP_M, layout.prediction_dtype)]
    for first, key_dtype in enumerate(_from(NARROWER_KEYS, layout.key_dtype)):
        for second, (dtype, some) in enumerate(predictions):
            residuals = "dense" if some is None else "top-m"
            other = replace(layout, key_dtype=key_dtype, prediction_dtype=dtype, residuals=residuals)
            yield first + 2 * second, other, some


def _from(ladder: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The steps from this one down; a name that is on none is as it is."""
    return ladder[ladder.index(name) :] if name in ladder else (name, *ladder[-1:])


def _compressed(plan: Plan) -> Iterator[tuple[int, _Planned]]:
    """The index that was asked for, and what "auto" takes of many rows with codes that halve, and with fewer cells."""
    dim, n = plan.layout.dim, plan.n_rows
    yield 0, _Planned(plan.index, plan.engine, plan.footprint)
    numbers, cells = min(dim, MOST_NUMBERS), usual_cells(n)
    for fewer in range(4):
        for shorter in range(4):
            if numbers >> shorter >= LEAST_NUMBERS and cells >> 2 * fewer >= LEAST_CELLS:
                smaller = compressed(numbers >> shorter, cells >> 2 * fewer)
                yield 3 + 3 * shorter + 2 * fewer, _Planned.of(f"faiss:{smaller}", dim, n, plan.free_ram)


# ---------------------------------------------------------------------- seconds


def _probed(plan: Plan, path: Path, seconds_per_row: float) -> Seconds:
    written = _writing_seconds(plan, existing(path))
    spec = parse_spec(plan.engine)
    built = engine_named(spec.engine).build_time(spec, plan.layout.dim, plan.n_rows)
    return Seconds(seconds_per_row * plan.n_rows, written, built.training, built.filling, built.measuring)


def _writing_seconds(plan: Plan, folder: Path) -> float:
    """Of appending all rows, from a few appends to a memory of this layout that is removed afterwards.

    Each append writes the manifest twice as well, which tells of all segments so far.
    """
    n = max(1, min(plan.n_rows, WRITTEN_AT_ONCE // plan.row_bytes))
    columns = _example_rows(plan.layout, plan.top_m, n)
    spent, rows = 0.0, 0
    try:
        with (
            tempfile.TemporaryDirectory(prefix=".resmem-probe-", dir=folder) as probe,
            _empty(Path(probe) / "memory", plan.layout) as memory,
        ):
            while spent < PROBE_SECONDS and rows < min(plan.n_rows, PROBE_APPENDS * n):
                spent += timed(lambda: memory.append(*columns))
                rows += n
    except OSError as error:
        what = f"{folder} cannot be written to: {error.strerror}; name another path"
        raise StorageFailure(error.errno, what) from error
    appends = plan.rows_bytes / WRITTEN_AT_ONCE
    manifests = appends * plan.manifest_bytes / 2  # each time what there is so far: half of the last on average
    return spent / rows * (plan.n_rows + manifests / plan.row_bytes)


def _empty(path: Path, layout: Layout) -> Memory:
    return Memory.create(
        path,
        dim=layout.dim,
        n_outputs=layout.n_outputs,
        task=layout.task,
        residuals=cast(Literal["dense", "top-m"], layout.residuals),
        key_dtype=layout.key_dtype,
        prediction_dtype=layout.prediction_dtype,
    )


def _example_rows(layout: Layout, m: int | None, n: int) -> "tuple[ndarray, ndarray, ndarray | TopM]":
    """Keys, labels and predictions as a memory of the layout takes them."""
    random, c = np.random.default_rng(0), layout.n_outputs
    keys = random.random((n, layout.dim), np.float32)
    if layout.task == "regression":
        return keys, random.random((n, c), np.float32), random.random((n, c), np.float32)
    labels = random.integers(0, c, n)
    if m is None:
        said = random.random((n, c), np.float32) + np.float32(1e-3)
        return keys, labels, said / said.sum(axis=1, keepdims=True)
    listed = (labels[:, None] + np.arange(m)) % c
    rest = np.full(n, 0.0 if m == c else 0.1, np.float32)
    return keys, labels, TopM(listed, np.repeat(((1 - rest) / m)[:, None], m, axis=1), rest)


def named(plan: Plan) -> Mapping[str, Any]:
    """All figures of a plan by their names, as JSON takes them."""
    seconds = plan.seconds
    return {
        "rows": plan.n_rows,
        "layout": vars(plan.layout),
        "top_m": plan.top_m,
        "index": plan.engine,
        "bytes_per_row": plan.row_bytes,
        "disk_bytes": plan.disk_bytes,
        "rows_bytes": plan.rows_bytes,
        "reserve_bytes": plan.reserve_bytes,
        "manifest_bytes": plan.manifest_bytes,
        "saved_index_bytes": plan.footprint.saved,
        "compaction_bytes": plan.compaction_bytes,
        "ram_bytes": plan.search_bytes,
        "index_bytes": plan.footprint.ram,
        "residual_table_bytes": plan.table_bytes,
        "building_ram_bytes": plan.building_bytes,
        "free_disk_bytes": plan.free_disk,
        "free_ram_bytes": plan.free_ram,
        "seconds": None if seconds is None else {**vars(seconds), "total": seconds.total},
        "fits": plan.fits,
        "shortages": plan.shortages,
    }
