"""Files of rows by their names, and memories made of them."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from residual_memory.errors import DataNotFound, InvalidInput
from residual_memory.exchange.arrow import ArrowRows, ParquetRows
from residual_memory.exchange.making import made
from residual_memory.exchange.npy import folder_rows, npz_rows
from residual_memory.exchange.rows import Block, Rows, task_of
from residual_memory.exchange.safetensors import safetensors_rows
from residual_memory.memory import Memory, require_empty
from residual_memory.memory.format import Manifest
from residual_memory.memory.memory import described
from residual_memory.types import Metric, Task, TopM
from residual_memory.validation import as_count

READERS: dict[str, Callable[[Path], Rows]] = {
    ".npz": npz_rows,
    ".parquet": ParquetRows,
    ".arrow": ArrowRows,
    ".feather": ArrowRows,
    ".safetensors": safetensors_rows,
}


def open_rows(path: str | os.PathLike[str]) -> Rows:
    """The rows of a file, or of a folder of .npy files.

    Raises
    ------
    DataNotFound : if there is nothing at the path.
    InvalidInput : if it is of a kind that is not read, or lacks a column.
    CorruptFile : if it is damaged.
    """
    place = Path(path)
    if place.is_dir():
        return folder_rows(place)
    if not place.is_file():
        raise DataNotFound(f"there is no file {place}")
    if place.suffix.lower() not in READERS:
        raise InvalidInput(f"{place} is a file of type {place.suffix or 'unknown'!r}, expected {', '.join(READERS)}")
    return READERS[place.suffix.lower()](place)


def import_memory(
    file: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    task: Task | None = None,
    metric: Metric | None = None,
    n_outputs: int | None = None,
    class_names: Sequence[str] | None = None,
    key_dtype: str | None = None,
    prediction_dtype: str | None = None,
) -> Memory:
    """A new memory of the rows of a file, all of them or none.

    A file of `export_memory` makes the identical memory again: ids, groups, layout, class names, source, setting, and
    the next id. Of any other file, what is not given below is read off its columns, or as in `Memory.create`.

    Parameters
    ----------
    file : .npz, .parquet, .arrow, .feather or .safetensors, or a folder of .npy files, with the columns keys, labels,
        predictions (or indices, probabilities and rest), and perhaps ids, groups, owners, expires, tags and snippets.
        In Arrow and Parquet some are called label, id, group, owner and snippet.
    path : a new or empty directory; None keeps the memory in RAM.
    task, metric, n_outputs, class_names, key_dtype, prediction_dtype : as in `Memory.create`; they count more than what
        the file says.

    Raises
    ------
    DataNotFound : if there is no such file.
    InvalidInput : if it lacks a column, or its values do not fit; the message names file and column.
    CorruptFile : if it is damaged.
    UnsupportedFormat : if a newer library exported it.
    StorageFailure : if the disk refuses.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/rows.npz", keys=np.eye(3), labels=[0, 1, 1], predictions=np.full((3, 2), 0.5))
    ...     import_memory(f"{folder}/rows.npz")
    <Memory in RAM: 3 rows, dim 3, 2 outputs, classification>
    """
    rows = open_rows(file)
    rows.require("labels", "a memory")
    if path is not None:
        require_empty(path)
    asked = {
        "task": task,
        "metric": metric,
        "n_outputs": n_outputs,
        "class_names": class_names,
        "key_dtype": key_dtype,
        "prediction_dtype": prediction_dtype,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    try:
        manifest = _foreign(rows, given) if rows.manifest is None else _ours(rows.manifest, given)
        as_stored = rows.manifest is not None and rows.manifest.layout.metric == manifest.layout.metric
        return made(path, manifest, rows.blocks(), as_stored=as_stored, n_rows=rows.n_rows, doing="importing")
    except InvalidInput as error:
        raise type(error)(str(error) if rows.name in str(error) else f"{rows.name}: {error}") from None


def _ours(manifest: Manifest, given: dict[str, Any]) -> Manifest:
    """What the exported memory was, with what is given in its place."""
    options = {**vars(manifest.layout), "class_names": manifest.class_names, "source": manifest.source, **given}
    kept = ("setting", "id_kind", "group_kind", "next_id", "top_m")
    return replace(described(**options), **{name: getattr(manifest, name) for name in kept})


def _foreign(rows: Rows, given: dict[str, Any]) -> Manifest:
    """What the first rows tell."""
    first = next(rows.blocks(size=1_000), None)
    if first is None:
        raise InvalidInput("there are no rows, and nothing else says what they would be")
    first = rows.checked(first, given.get("task") or task_of(first), _n_outputs(first, given))
    read = {
        "dim": first.keys.shape[1],
        "task": task_of(first),
        "n_outputs": _n_outputs(first, given),
        "residuals": "top-m" if rows.top_m else "dense",
    }
    return described(**{**read, **given})


def _n_outputs(block: Block, given: dict[str, Any]) -> int:
    if "n_outputs" in given:
        return as_count("n_outputs", given["n_outputs"])
    if "class_names" in given:
        return len(given["class_names"])
    if isinstance(block.predictions, TopM):
        raise InvalidInput("top-m predictions do not tell how many classes there are; give n_outputs")
    return block.predictions.shape[1] if block.predictions.ndim == 2 else 1
