"""Make the golden memories of the format that this library writes: `python -m tests.memory.golden.make`.

They are made once for each format and then only read, for ever.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from residual_memory.memory import Memory
from residual_memory.memory.format import FORMAT
from tests.problems import classification, regression, told

HERE = Path(__file__).parent


def contents(memory: Memory) -> dict[str, Any]:
    """Everything that a memory says of itself and its rows, as JSON."""
    snapshot = memory.snapshot
    rows = np.flatnonzero(snapshot.alive)
    groups = snapshot.all_groups
    layout = vars(memory.layout)
    return {
        "layout": layout,
        "version": memory.version,
        "next_id": memory.next_id,
        "class_names": memory.class_names and list(memory.class_names),
        "source": memory.source,
        "setting": memory.setting,
        "n_forgotten": memory.n_forgotten,
        "ids": memory.ids.tolist(),
        "groups": None if groups is None else groups[rows].tolist(),
        "keys": snapshot.keys.take(rows).tolist(),
        "labels": snapshot.targets(rows).tolist(),
        "predictions": snapshot.predictions(rows).tolist(),
        "carried": carried_by(memory),
    }


def carried_by(memory: Memory) -> list[list[Any]] | None:
    """What each row carries; None where no row carries anything."""
    found = memory.attributes(memory.ids) if len(memory) else None
    if found is None or not (any(found.owners) or any(found.tags) or any(found.snippets)):
        return None
    listed = zip(found.owners, found.expires.tolist(), found.tags, found.snippets, strict=True)
    return [[owner, expires, list(tags), snippet] for owner, expires, tags, snippet in listed]


def fill(memory: Memory, problem: Any, ids: Any = None, groups: Any = None, **carrying: Any) -> None:
    """Rows in three changes, two of them forgotten; the second half carries what is given."""
    half = len(problem) // 2
    for part in (slice(0, half), slice(half, None)):
        some = problem.rows(part)
        names = [None if values is None else values[part] for values in (ids, groups)]
        memory.append(some.keys, some.labels, told(memory, some), *names, **(carrying if part.start else {}))
    memory.forget(memory.ids[[1, half]])


def make(folder: Path) -> None:
    """One memory of each kind."""
    classes, values = classification(n=8, d=3, c=3), regression(n=6, d=2, c=2)
    names = np.array([f"row-{number}" for number in range(8)])
    with Memory.create(folder / "strings", dim=3, n_outputs=3, class_names=["a", "ü", "c"]) as memory:
        carrying = {
            "owners": "zoë",
            "expires": 4_000_000_000,
            "tags": ["a", "b c"],
            "snippets": ["", "one", "два", "☂"],
        }
        fill(memory, classes, names, np.array(["x", "y"] * 4), **carrying)
        memory.save_source({"layer": "fc", "complete": True})
        memory.save_setting({"n_neighbors": 3, "bandwidth": 0.5})
    with Memory.create(folder / "values", dim=2, n_outputs=2, task="regression", metric="cosine") as memory:
        fill(memory, values, groups=np.arange(6) // 2)
    options: dict[str, Any] = {"residuals": "top-m", "key_dtype": "float16", "prediction_dtype": "log8"}
    with Memory.create(folder / "tokens", dim=3, n_outputs=3, **options) as memory:
        fill(memory, classes)
    with Memory.create(folder / "mostly-forgotten", dim=3, n_outputs=3) as memory:
        for _ in range(20):
            memory.append(classes.keys, classes.labels, classes.predictions)
        memory.forget(memory.ids[:150])
    Memory.create(folder / "empty", dim=1, n_outputs=2).close()
    for path in folder.iterdir():
        for name in ("lock", "reserve", "manifest.copy"):
            (path / name).unlink(missing_ok=True)
        with Memory.open(path) as memory:
            (path / "contents.json").write_text(json.dumps(contents(memory), indent=1) + "\n")


if __name__ == "__main__":
    make(HERE / f"format-{FORMAT}")
