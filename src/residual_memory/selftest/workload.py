"""A small memory whose every row follows from its id, so that whoever reads it can tell whether it is right."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64
from numpy import ndarray

from residual_memory.memory import Memory
from residual_memory.memory.storage import Directory

DIM, N_OUTPUTS = 6, 3

State = frozenset[int]  # the ids of a memory


@dataclass(frozen=True)
class Step:
    """A change of the memory, and the ids that it then holds."""

    name: str
    apply: Callable[[Memory], object]
    after: State


def create(path: "str | Directory") -> Memory:
    """An empty memory for such rows."""
    return Memory.create(path, dim=DIM, n_outputs=N_OUTPUTS)


def keys_of(ids: Int64[ndarray, " b"]) -> Float[ndarray, "b d"]:
    """The keys that these ids have."""
    return np.sin(np.outer(ids + 1.0, np.arange(1.0, DIM + 1)) * 0.7).astype(np.float32)


def add(memory: Memory, ids: Sequence[int]) -> None:
    """Append the rows of these ids."""
    numbers = np.asarray(ids, np.int64)
    said = np.array([0.5, 0.375, 0.125])[(np.arange(N_OUTPUTS) - numbers[:, None]) % N_OUTPUTS]
    snippets = [trace_of(number) for number in numbers.tolist()]
    memory.append(keys_of(numbers), numbers % N_OUTPUTS, said, ids=numbers, snippets=snippets)


def trace_of(number: int) -> str:
    """A text that only this id's row holds."""
    return f"<canary {number:08d}>"


def state_of(memory: Memory) -> State:
    """The ids that a memory holds, after comparing every row with its id.

    Raises
    ------
    AssertionError : if a row is not that of its id.
    """
    snapshot = memory.snapshot
    rows = np.flatnonzero(snapshot.alive)
    ids = snapshot.all_ids[rows]
    if len(np.unique(ids)) != len(ids):
        raise AssertionError("an id is there twice")
    if not np.array_equal(snapshot.keys.take(rows), keys_of(ids)):
        raise AssertionError("keys are not those of their ids")
    if not np.array_equal(snapshot.targets(rows), ids % N_OUTPUTS):
        raise AssertionError("labels are not those of their ids")
    if snapshot.attributes(rows).snippets != [trace_of(number) for number in ids.tolist()]:
        raise AssertionError("snippets are not those of their ids")
    return frozenset(ids.tolist())


def steps(names: Sequence[str], held: State, *, seed: int = 0, most: int = 12) -> Iterator[Step]:
    """Changes of these names, one after the other, for a memory that holds these ids.

    Parameters
    ----------
    names : "append", "forget", "compact" and "setting".
    most : rows in an append.
    """
    random = np.random.default_rng(seed)
    ids, next_id = held, max(held, default=-1) + 1
    for number, name in enumerate(names):
        if name == "append":
            new = range(next_id, next_id + int(random.integers(1, most + 1)))
            ids, next_id = ids | set(new), new.stop
            yield Step(name, lambda memory, new=new: add(memory, new), ids)  # type: ignore[misc]
        elif name == "forget":
            gone = random.choice(sorted(ids), min(3, len(ids)), replace=False).tolist()
            ids = ids - set(gone)
            yield Step(name, lambda memory, gone=gone: memory.forget(gone), ids)  # type: ignore[misc]
        elif name == "compact":
            yield Step(name, Memory.compact, ids)
        else:
            yield Step(name, lambda memory, n=number: memory.save_setting({"number": n}), ids)  # type: ignore[misc]


@contextmanager
def folder_in_ram() -> Iterator[Path]:
    """A folder for trials that bring a disk of their own; on the disk where there is none in RAM."""
    shared = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder)
