"""`resmem predict` and `resmem explain`: corrected predictions, and the memories behind them."""

import csv
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from jaxtyping import Float, Int64, Shaped
from numpy import ndarray

from residual_memory.cli import options
from residual_memory.cli.data import Reading, rows_for
from residual_memory.cli.measuring import saved_setting
from residual_memory.cli.options import BatchSize, Data, ImageSize, Index, Json, MemoryPath, Model, Outputs
from residual_memory.cli.output import report, table
from residual_memory.correction import ResidualKNN
from residual_memory.display import shown
from residual_memory.errors import InvalidInput, MissingExtra
from residual_memory.evaluation import Setting
from residual_memory.exchange import Block, Rows
from residual_memory.explanation import class_label, told_neighbors, told_outputs
from residual_memory.explanation import explain as explanation_of
from residual_memory.indexes.registry import check_index
from residual_memory.memory import Memory
from residual_memory.progress import progress_bar
from residual_memory.validation import as_count

SHOWN_ROWS = 20  # for people; files and JSON have all


def predict(
    path: MemoryPath,
    data: Data,
    model: Model = None,
    outputs: Outputs = "logits",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write all rows to a .npz, .csv or .parquet.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option("--top", metavar="N", help="Classes to name for each row.")] = 3,
    index: Index = "auto",
    batch_size: BatchSize = None,
    image_size: ImageSize = None,
    as_json: Json = False,
) -> None:
    """Corrected predictions; the data need no labels."""
    n_top = as_count("--top", top)
    if out is not None:
        _check_out(out)
    memory = options.open_memory(path)
    check_index(index, memory.layout.dim)
    rows = rows_for(data, memory, Reading(model, outputs, batch_size, image_size), labelled=False)
    setting = saved_setting(memory)
    knn = setting.knn(memory, index=index)
    sink: _Sink = _Listed(memory, n_top, None if as_json else SHOWN_ROWS)
    with _writing(out, memory, n_top) as file, progress_bar("predicting", rows.n_rows) as advance:
        n_rows = n_changed = 0
        for block in rows.blocks():
            answer = _answered(
                rows.checked(block, memory.layout.task, memory.layout.n_outputs, memory.layout.dim), knn, setting
            )
            (sink if file is None else file).take(answer)
            n_rows += len(answer.ids)
            n_changed += int(answer.changed.sum())
            advance(len(answer.ids))
    result = {"memory": path, "data": data, "rows": n_rows, "changed": n_changed, "setting": setting.to_dict()}
    if memory.layout.task == "regression":
        del result["changed"]
    summary = f"{n_rows:,} rows" + (
        f", {n_changed:,} with another class than the base's" if "changed" in result else ""
    )
    if out is not None:
        report({**result, "out": out}, f"{summary}, written to {out}", as_json=as_json)
        return
    listed = sink.entries if isinstance(sink, _Listed) else []
    more = [f"and {n_rows - len(listed):,} more rows; --out FILE or --json give all"] if len(listed) < n_rows else []
    report({**result, "predictions": listed}, _predictions_table(listed, memory), *more, summary, as_json=as_json)


@dataclass(frozen=True)
class _Answer:
    """Base and corrected predictions of some rows: probabilities, or values."""

    ids: Shaped[ndarray, " q"]
    base: Float[ndarray, "q c"]
    corrected: Float[ndarray, "q c"]

    @property
    def changed(self) -> ndarray:
        return self.base.argmax(axis=1) != self.corrected.argmax(axis=1)

    def top(self, n: int) -> Int64[ndarray, "q n"]:
        """The n classes of the largest corrected probability."""
        return np.argsort(-self.corrected, axis=1, kind="stable")[:, :n]


def _answered(block: Block, knn: ResidualKNN, setting: Setting) -> _Answer:
    said = block.whole.astype(np.float32) if block.whole.dtype == np.float16 else block.whole
    return _Answer(block.row_ids, said, setting.predict(knn, block.keys, said))


# ---------------------------------------------------------------------- where predictions go


class _Sink(ABC):
    """Takes answers, batch by batch."""

    @abstractmethod
    def take(self, answer: _Answer) -> None: ...

    def close(self) -> None:  # noqa: B027  # most have nothing left to write
        """Write what is left."""


class _Listed(_Sink):
    """Answers as plain entries, up to a number of rows."""

    def __init__(self, memory: Memory, n_top: int, limit: int | None) -> None:
        self._memory, self._n_top, self._limit = memory, n_top, limit
        self.entries: list[dict[str, Any]] = []

    def take(self, answer: _Answer) -> None:
        left = len(answer.ids) if self._limit is None else self._limit - len(self.entries)
        classes = answer.top(self._n_top)
        for row in range(min(left, len(answer.ids))):
            self.entries.append({"id": answer.ids[row].item(), **self._said(answer, row, classes[row])})

    def _said(self, answer: _Answer, row: int, classes: ndarray) -> dict[str, Any]:
        if self._memory.layout.task == "regression":
            return {"base": answer.base[row].tolist(), "corrected": answer.corrected[row].tolist()}
        base = int(answer.base[row].argmax())
        return {
            "base": self._entry(base, float(answer.base[row, base])),
            "top": [self._entry(int(label), float(answer.corrected[row, label])) for label in classes],
        }

    def _entry(self, label: int, probability: float) -> dict[str, Any]:
        return {"class": label, "name": class_label(self._memory, label), "probability": probability}


class _Npz(_Sink):
    """All rows in one .npz: ids, base and corrected [n c]."""

    def __init__(self, file: Any) -> None:
        self._file, self._answers = file, list[_Answer]()

    def take(self, answer: _Answer) -> None:
        self._answers.append(answer)

    def close(self) -> None:
        names = ("ids", "base", "corrected")
        columns = {name: [getattr(answer, name) for answer in self._answers] for name in names}
        joined = {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in columns.items()}
        np.savez(self._file, **joined)  # type: ignore[arg-type]


class _Csv(_Sink):
    """A line a row: the base's class and the top corrected ones, or the values."""

    def __init__(self, file: Any, memory: Memory, n_top: int) -> None:
        self._memory, self._n_top, self._writer = memory, min(n_top, memory.layout.n_outputs), csv.writer(file)
        if memory.layout.task == "regression":
            names = [f"{kind}_{output}" for kind in ("base", "corrected") for output in range(memory.layout.n_outputs)]
        else:
            places = [str(place + 1) for place in range(self._n_top)]
            names = [
                "base_class",
                "base_probability",
                *(f"{kind}_{p}" for p in places for kind in ("class", "probability")),
            ]
        self._writer.writerow(["id", *names])

    def take(self, answer: _Answer) -> None:
        classes = answer.top(self._n_top)
        for row, name in enumerate(answer.ids.tolist()):
            base, corrected = answer.base[row], answer.corrected[row]
            if self._memory.layout.task == "regression":
                self._writer.writerow([name, *base.tolist(), *corrected.tolist()])
                continue
            listed = [(int(base.argmax()), base.max()), *((int(label), corrected[label]) for label in classes[row])]
            cells = [cell for label, p in listed for cell in (class_label(self._memory, label), f"{p:.6g}")]
            self._writer.writerow([name, *cells])


class _Parquet(_Sink):
    """A row each: id, base and corrected as lists, and the class's name."""

    def __init__(self, path: Path, memory: Memory) -> None:
        self._memory, self._path = memory, path
        self._writer: Any = None

    def take(self, answer: _Answer) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {"id": pa.array(answer.ids.tolist())}
        if self._memory.layout.task == "classification":
            names = [class_label(self._memory, int(label)) for label in answer.top(1)[:, 0]]
            columns["class"] = pa.array(names, pa.string())
        for name, values in (("base", answer.base), ("corrected", answer.corrected)):
            flat = pa.array(np.ascontiguousarray(values).ravel())
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        part = pa.table(columns)
        self._writer = self._writer or pq.ParquetWriter(self._path, part.schema)
        self._writer.write_table(part)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _check_out(out: Path) -> None:
    """Refuse a place that cannot be written to before the work is done."""
    if out.suffix.lower() not in (".npz", ".csv", ".parquet"):
        raise InvalidInput(f"--out is {out}, expected a name that ends in .npz, .csv or .parquet")
    if not out.absolute().parent.is_dir():
        raise InvalidInput(f"--out is {out}, but there is no folder {out.parent}; make it first")
    if out.suffix.lower() == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise MissingExtra("writing Parquet", "report") from error


@contextmanager
def _writing(out: Path | None, memory: Memory, n_top: int) -> Iterator[_Sink | None]:
    """A sink for the file, which appears under its name only when it is whole."""
    if out is None:
        yield None
        return
    part = out.with_name(out.name + ".part")
    kind = out.suffix.lower()
    try:
        with open(part, "wb") if kind != ".csv" else open(part, "w", newline="", encoding="utf-8") as file:
            sink: _Sink
            if kind == ".csv":
                sink = _Csv(file, memory, n_top)
            else:
                sink = _Npz(file) if kind == ".npz" else _Parquet(part, memory)
            yield sink
            sink.close()
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


def _predictions_table(entries: Sequence[dict[str, Any]], memory: Memory) -> Any:
    if memory.layout.task == "regression":
        cells = [(entry["id"], _values(entry["base"]), _values(entry["corrected"])) for entry in entries]
        return table(("id", "base", "corrected"), cells)
    rows = []
    for entry in entries:
        named = ", ".join(_with_percent(found) for found in entry["top"])
        rows.append((shown(entry["id"], 20), _with_percent(entry["base"]), named))
    return table(("id", "base", "corrected"), rows)


def _with_percent(entry: dict[str, Any]) -> str:
    return f"{shown(entry['name'], 16)} {100 * entry['probability']:.1f} %"


def _values(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values[:5]) + (", …" if len(values) > 5 else "")


# ---------------------------------------------------------------------- explain


def explain(
    path: MemoryPath,
    data: Data,
    row: Annotated[int, typer.Option("--row", metavar="I", help="Row of the data, from 0.", show_default=False)],
    model: Model = None,
    outputs: Outputs = "logits",
    neighbors: Annotated[int, typer.Option("--neighbors", metavar="N", help="How many memories to show.")] = 10,
    top: Annotated[int, typer.Option("--top", metavar="N", help="How many classes to show.")] = 5,
    index: Index = "auto",
    image_size: ImageSize = None,
    as_json: Json = False,
) -> None:
    """Which memories corrected one prediction, and by how much."""
    n_neighbors, n_top = as_count("--neighbors", neighbors), as_count("--top", top)
    memory = options.open_memory(path)
    layout = memory.layout
    check_index(index, layout.dim)
    rows = rows_for(data, memory, Reading(model, outputs, image_size=image_size), labelled=False)
    block = rows.checked(_row(rows, row), layout.task, layout.n_outputs, layout.dim)
    setting = saved_setting(memory)
    knn = setting.knn(memory, index=index)
    base = setting.tempered(block.whole, layout.task)
    shares = {"shrinkage": setting.shrinkage, "residual_share": setting.residual_share}
    found = explanation_of(knn, block.keys, base, **shares)
    answer = _answered(block, knn, setting)
    listed = told_neighbors(memory, found)
    result = {
        "memory": path,
        "data": data,
        "row": row,
        "id": block.row_ids[0],
        "outputs": told_outputs(memory, answer.base[0], answer.corrected[0], n_top),
        "neighbors": listed[:n_neighbors],
        "setting": setting.to_dict(),
    }
    rest = listed[n_neighbors:]
    more = f"and {len(rest):,} more with {100 * sum(entry['share'] for entry in rest):.1f} % of the correction"
    report(
        result,
        _outputs_table(result["outputs"], layout.task),
        "",
        _neighbors_table(result["neighbors"], layout.task),
        *([more] if rest else []),
        *([] if setting.shrinkage else ["the setting's shrinkage is 0, so these memories change nothing"]),
        as_json=as_json,
    )


def _row(rows: Rows, row: int) -> Block:
    if not 0 <= row < rows.n_rows:
        raise InvalidInput(f"--row is {row}, but {rows.name} has {rows.n_rows:,} rows, from 0 to {rows.n_rows - 1:,}")
    return next(rows.blocks(first=row, size=1))


def _outputs_table(entries: Sequence[dict[str, Any]], task: str) -> Any:
    header = ("class" if task == "classification" else "output", "base", "corrected", "change")
    rows = []
    for entry in entries:
        base, corrected = entry["base"], entry["corrected"]
        if task == "classification":
            cells = (f"{100 * base:.1f} %", f"{100 * corrected:.1f} %", f"{100 * (corrected - base):+.1f}")
        else:
            cells = (f"{base:.4g}", f"{corrected:.4g}", f"{corrected - base:+.4g}")
        rows.append((entry["name"], *cells))
    return table(header, rows, numbers=header[1:])


def _neighbors_table(entries: Sequence[dict[str, Any]], task: str) -> Any:
    header = ("memory", "label", "distance", "weight", "share of correction")
    rows = [
        (
            shown(entry["id"], 20),
            entry["name"] if task == "classification" else _values(entry["label"]),
            f"{entry['distance']:.4g}",
            f"{entry['weight']:.4f}",
            f"{100 * entry['share']:.1f} %",
        )
        for entry in entries
    ]
    return table(header, rows, numbers=header[2:])
