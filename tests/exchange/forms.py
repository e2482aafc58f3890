"""What the tests of exchange share: memories of every layout, and whether two are the same to the last bit."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from residual_memory.memory import Memory
from tests.problems import LAYOUTS, Problem, classification, memory_of, regression, same_bits

SUFFIXES = (".npz", ".parquet", ".arrow", ".feather", ".safetensors")
HALF = {"key_dtype": "float16", "prediction_dtype": "float16"}
# What a memory may be, with the problem that it is of.
KINDS: dict[str, dict[str, Any]] = {
    **{name: dict(options) for name, options in LAYOUTS.items()},
    "half": dict(HALF),
    "cosine": {"metric": "cosine", "key_dtype": "float32"},
    "cosine, half": {"metric": "cosine", **HALF},
    "regression": {},
    "regression, half": dict(HALF),
}


def problem_of(kind: str, n: int = 60, seed: int = 0) -> Problem:
    make = regression if kind.startswith("regression") else classification
    return make(n=n, seed=seed)


def kept(
    kind: str, place: Path | None = None, *, n: int = 60, first: int = 0, text: bool = False, groups: bool = False
) -> Memory:
    """A memory of one of `KINDS`, some of whose rows are forgotten, among them the last."""
    numbers = first + np.arange(n)
    memory = memory_of(
        problem_of(kind, n, seed=first),
        place,
        ids=names(numbers) if text else numbers[::-1],
        groups=(names(numbers // 7) if text else numbers // 7) if groups else None,
        **KINDS[kind],
    )
    memory.forget(memory.ids[[0, 5, n - 1]])
    return memory


def names(numbers: ndarray) -> ndarray:
    """Text of different lengths, in characters and in bytes."""
    return np.array([f"{'é' * (number % 3)}row {number}" for number in numbers.tolist()])


def values(memory: Memory) -> dict[str, ndarray]:
    """The columns of the rows that are not forgotten, as they are stored."""
    snapshot = memory.snapshot
    rows = np.flatnonzero(snapshot.alive)
    found = {name: snapshot.column(name).take(rows) for name in snapshot.layout.columns(snapshot.manifest.top_m)}
    found["ids"] = snapshot.id_column.take(rows)
    if snapshot.group_column is not None:
        found["groups"] = snapshot.group_column.take(rows)
    return found


def assert_same(found: Memory, wanted: Memory) -> None:
    """The same rows to the last bit, and the same description."""
    mine, theirs = values(found), values(wanted)
    assert mine.keys() == theirs.keys()
    for name, column in theirs.items():
        text = column.dtype.kind == "U"  # of which the width is free
        assert (mine[name] == column).all() if text else same_bits(mine[name], column), name
    one, other = found.snapshot.manifest, wanted.snapshot.manifest
    for name in ("layout", "class_names", "source", "setting", "id_kind", "group_kind", "next_id", "top_m"):
        assert getattr(one, name) == getattr(other, name), name
