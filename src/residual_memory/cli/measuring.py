"""`resmem tune`, `evaluate`, `estimate` and `bench`: what a memory is worth and what it takes."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, cast

import numpy as np
import typer
from numpy import ndarray
from rich.table import Table

from residual_memory import evaluation, tuning
from residual_memory.cli import options
from residual_memory.cli.data import Queries, Reading, read_all, rows_for
from residual_memory.cli.measuring_text import evaluate_text, tune_text
from residual_memory.cli.options import (
    BatchSize,
    Data,
    ImageSize,
    Index,
    Json,
    Length,
    Limit,
    MemoryPath,
    Model,
    Outputs,
    TextAutocast,
    Tokenizer,
    chosen,
    leave_out,
)
from residual_memory.cli.output import facts, note, report, size_text, table
from residual_memory.cli.text import TextReading, text_at
from residual_memory.correction import TABLE_BYTES, ResidualKNN
from residual_memory.errors import InvalidInput
from residual_memory.evaluation import METRICS, Evaluation, Setting
from residual_memory.indexes.registry import check_index, planned
from residual_memory.memory import HELD_TOO_OFTEN, Memory, share_held
from residual_memory.memory.codes import LOG_SCALES
from residual_memory.memory.format import Layout, check_layout
from residual_memory.memory.memory import RESERVE_BYTES
from residual_memory.metrics import Estimate
from residual_memory.progress import progress_bar
from residual_memory.types import Task
from residual_memory.validation import as_count, as_positive

BATCHES_TIMED = 10  # at least, so that the slowest of them means something

MetricOption = Annotated[
    str | None,
    typer.Option("--metric", metavar="METRIC", help="accuracy, log_loss or rmse; by default the task's first."),
]


def tune(
    path: MemoryPath,
    data: Data,
    model: Model = None,
    tokenizer: Tokenizer = None,
    outputs: Outputs = "logits",
    metric: MetricOption = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option("--kernel", metavar="KERNEL", help="exponential (the paper's), kriging, …; again to try several."),
    ] = None,
    gate: Annotated[
        bool | None,
        typer.Option(
            "--gate/--no-gate",
            help="Fit a trust by query, and calibrated probabilities; for text always.",
            show_default="no-gate",
        ),
    ] = None,
    index: Index = "auto",
    save: Annotated[bool, typer.Option("--save/--no-save", help="Keep the setting with the memory.")] = True,
    length: Length = None,
    limit: Limit = None,
    autocast: TextAutocast = None,
    batch_size: BatchSize = None,
    image_size: ImageSize = None,
    as_json: Json = False,
) -> None:
    """Choose the setting on held-out data, and say whether the memory helps.

    The figures are cross-fitted: no row is measured with a setting that it chose. Exits with 1 where there is no gain.
    """
    text = TextReading(model, tokenizer, length, None, limit, batch_size, autocast)
    with options.open_memory(path, writable=save) as memory:
        check_index(index, memory.layout.dim)
        if (file := text_at(data)) is not None:
            others = {"--metric": metric is not None, "--no-gate": gate is False}
            leave_out(f"{data} is text", {**others, **_not_for_text(outputs, image_size)})
            tune_text(memory, file, text, kernel, index, save, as_json)
            return
        leave_out(f"{data} is no text", text.given)
        wanted = _metric(metric, memory)
        rows = _held_out(data, memory, Reading(model, outputs, batch_size, image_size))
        seen = (memory, rows.keys, rows.labels, rows.predictions)
        result = tuning.tune(*seen, metric=wanted, kernel=kernel or "exponential", index=index, groups=rows.groups)
        if gate and result.best.shrinkage:
            gated = tuning.tune_gate(*seen, result.best, metric=wanted, index=index, groups=rows.groups)
            if gated.helps:
                result = gated
            else:
                note(f"the gate is left out, {gated.verdict}; the figures are those of the setting without it")
        if save:
            memory.save_setting(result.best.to_dict())
        kept = f"saved with {path}" if save else "not saved"
        _report_evaluation(memory, data, result, result.best, kept, as_json)


def evaluate(
    path: MemoryPath,
    data: Data,
    model: Model = None,
    tokenizer: Tokenizer = None,
    outputs: Outputs = "logits",
    metric: MetricOption = None,
    n_neighbors: Annotated[
        int | None, typer.Option("--n-neighbors", metavar="K", help="In place of the saved one.", show_default=False)
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option("--bandwidth", metavar="SIGMA", help="Likewise; a number or auto.", show_default=False)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", metavar="T", help="Likewise.", show_default=False)
    ] = None,
    shrinkage: Annotated[
        float | None, typer.Option("--shrinkage", metavar="LAMBDA", help="Likewise.", show_default=False)
    ] = None,
    index: Index = "auto",
    length: Length = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride",
            metavar="S",
            help="For text: how far a window begins after the one before; by default its length. Less gives more "
            "context and takes longer.",
        ),
    ] = None,
    limit: Limit = None,
    autocast: TextAutocast = None,
    batch_size: BatchSize = None,
    image_size: ImageSize = None,
    as_json: Json = False,
) -> None:
    """Measure the saved setting on data that did not choose it. Exits with 1 where there is no gain."""
    memory = options.open_memory(path)
    check_index(index, memory.layout.dim)
    text, file = TextReading(model, tokenizer, length, stride, limit, batch_size, autocast), text_at(data)
    if file is not None:
        others = {"--metric": metric is not None, "--temperature": temperature is not None}
        leave_out(f"{data} is text", {**others, **_not_for_text(outputs, image_size)})
    else:
        leave_out(f"{data} is no text", text.given)
    wanted = _metric(metric, memory)
    changes = {
        "n_neighbors": None if n_neighbors is None else as_count("--n-neighbors", n_neighbors),
        "bandwidth": None if bandwidth is None else _bandwidth(bandwidth),
        "temperature": None if temperature is None else as_positive("--temperature", temperature),
        "shrinkage": None if not shrinkage else as_positive("--shrinkage", shrinkage),
    }
    if shrinkage == 0:
        changes["shrinkage"] = 0.0
    given = {name: value for name, value in changes.items() if value is not None}
    if file is not None:
        evaluate_text(memory, file, text, given, index, as_json)
        return
    setting = saved_setting(memory, **given)
    rows = _held_out(data, memory, Reading(model, outputs, batch_size, image_size))
    result = evaluation.evaluate(
        memory, rows.keys, rows.labels, rows.predictions, setting, metric=wanted, index=index, groups=rows.groups
    )
    _report_evaluation(memory, data, result, setting, None, as_json)


def _not_for_text(outputs: str, image_size: int | None) -> dict[str, bool]:
    return {"--outputs": outputs != "logits", "--image-size": image_size is not None}


def saved_setting(memory: Memory, **changes: Any) -> Setting:
    """The setting that tuning saved, or the paper's, with changes."""
    if memory.setting is None and "n_neighbors" not in changes:
        note(f"no setting is saved with {memory.path}, so the paper's is used; resmem tune chooses one")
    if "shrinkage" in changes:
        changes["gate"] = None  # a gate stands in place of the shrinkage
    return replace(Setting.from_dict(memory.setting or {}), **changes)


def _metric(value: str | None, memory: Memory) -> evaluation.Metric | None:
    if value is None:
        return None
    return cast(evaluation.Metric, chosen("--metric", value, METRICS[memory.layout.task]))


def _bandwidth(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return as_positive("--bandwidth", float(text))
    except ValueError as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"--bandwidth is {text!r}, expected a number above 0 or 'auto'") from None


def _held_out(data: str, memory: Memory, reading: Reading) -> Queries:
    rows = read_all(rows_for(data, memory, reading), memory)
    share = share_held(memory, rows.keys)
    if share > HELD_TOO_OFTEN:
        note(
            f"warning: {100 * share:.0f} % of {data} are rows that the memory holds, so the figures are too good; "
            "use data that it was not built from"
        )
    return rows


def _report_evaluation(
    memory: Memory, data: str, result: Evaluation, setting: Setting, kept: str | None, as_json: bool
) -> None:
    figures = {"base": result.base, "memory_only": result.memory_only, "corrected": result.corrected}
    report(
        {
            "memory": memory.path,
            "data": data,
            **result.to_dict(),
            **{f"{name}_{end}": getattr(figure, end) for name, figure in figures.items() for end in ("low", "high")},
            "helps": result.helps,
            "verdict": result.verdict,
            "setting": setting.to_dict(),
        },
        _comparison(result),
        "",
        result.verdict,
        _setting_line(setting),
        *([kept] if kept else []),
        as_json=as_json,
    )
    if not result.helps:
        raise typer.Exit(1)


def _comparison(result: Evaluation) -> Table:
    def cells(name: str, figure: Estimate) -> tuple[str, str, str]:
        if result.metric == "accuracy":
            low, high = max(figure.low, 0.0), min(figure.high, 1.0)  # the normal interval knows no ends
            return name, f"{100 * figure.value:.1f} %", f"{100 * low:.1f} to {100 * high:.1f}"
        return name, f"{figure.value:.4g}", f"{figure.low:.4g} to {figure.high:.4g}"

    names = {"accuracy": "accuracy", "log_loss": "log-loss, nats", "rmse": "RMSE"}
    figures = [("base", result.base), ("memory only", result.memory_only), ("corrected", result.corrected)]
    header = ("", names[result.metric], "95 % interval")
    return table(header, [cells(name, figure) for name, figure in figures], numbers=header[1:])


def _setting_line(setting: Setting) -> str:
    if not setting.shrinkage:
        return "setting: shrinkage 0, so predictions stay the base's"
    sigma = setting.bandwidth if isinstance(setting.bandwidth, str) else f"{setting.bandwidth:.4g}"
    more = f", residual share {setting.residual_share:g}" if setting.residual_share != 1 else ""
    return (
        f"setting: k {setting.n_neighbors}, bandwidth {sigma}{' of the k-th distance' if setting.local else ''}, "
        f"temperature {setting.temperature:g}, shrinkage {setting.shrinkage:g}{more}, kernel {setting.kernel}"
        f"{', gated' if setting.gate else ''}"
    )


# ---------------------------------------------------------------------- estimate


def estimate(
    rows: Annotated[int, typer.Option("--rows", metavar="N", help="Examples to remember.", show_default=False)],
    dim: Annotated[int, typer.Option("--dim", metavar="D", help="Numbers in a key.", show_default=False)],
    n_outputs: Annotated[int, typer.Option("--outputs", metavar="C", help="Classes, or targets.", show_default=False)],
    key_dtype: Annotated[
        str, typer.Option("--key-dtype", metavar="TYPE", help="float16, float32 or float64.")
    ] = "float32",
    prediction_dtype: Annotated[
        str, typer.Option("--prediction-dtype", metavar="TYPE", help="Likewise; with --top-m also log8 or log16.")
    ] = "float32",
    top_m: Annotated[
        int | None,
        typer.Option("--top-m", metavar="M", help="Keep the M largest probabilities of each row, not all."),
    ] = None,
    task: Annotated[
        str, typer.Option("--task", metavar="TASK", help="classification or regression.")
    ] = "classification",
    index: Index = "auto",
    as_json: Json = False,
) -> None:
    """What a memory would take on disk, and its index in RAM, before it is built."""
    chosen("--key-dtype", key_dtype, options.DTYPES)
    chosen("--prediction-dtype", prediction_dtype, (*options.DTYPES, *LOG_SCALES))
    n, d, c = as_count("--rows", rows), as_count("--dim", dim), as_count("--outputs", n_outputs)
    m = None if top_m is None else as_count("--top-m", top_m)
    layout = _planned(d, c, options.task_named(task) or "classification", m, key_dtype, prediction_dtype)
    spec, index_bytes = planned(index, d, n)
    engine = f"{spec.engine}:{spec.build}" if spec.build else spec.engine
    itemsize = 8 if prediction_dtype == "float64" else 4
    residual_bytes = n * c * itemsize if n * c * itemsize <= TABLE_BYTES else 0
    row_bytes = layout.bytes_per_row(m)
    reserve = 2 * (RESERVE_BYTES + n // 8)  # as Memory keeps for forgetting on a full disk
    disk = n * row_bytes + reserve
    ram = index_bytes + residual_bytes + 9 * n  # ids, and a mark on each row that is not forgotten
    report(
        {
            "rows": n,
            "layout": vars(layout),
            "top_m": m,
            "disk_bytes": disk,
            "bytes_per_row": row_bytes,
            "reserve_bytes": reserve,
            "index": engine,
            "index_bytes": index_bytes,
            "residual_table_bytes": residual_bytes,
            "ram_bytes": ram,
        },
        facts(
            [
                ("on disk", f"{size_text(disk)}, {row_bytes:,} bytes a row and {size_text(reserve)} held"),
                ("in RAM", size_text(ram)),
                ("  index", f"{size_text(index_bytes)}, {engine}"),
                (
                    "  residuals",
                    size_text(residual_bytes) if residual_bytes else "read from disk: too many to keep ready",
                ),
                ("  ids", size_text(9 * n)),
            ]
        ),
        as_json=as_json,
    )


def _planned(d: int, c: int, task: Task, m: int | None, key_dtype: str, prediction_dtype: str) -> Layout:
    """The layout of a memory that is not there yet."""
    if m is None and prediction_dtype in LOG_SCALES:
        raise InvalidInput(f"--prediction-dtype {prediction_dtype} is for top-m predictions alone; add --top-m M")
    if m is not None and m > c:
        raise InvalidInput(f"--top-m is {m}, expected 1 to {c}, the number of classes")
    layout = Layout(d, c, task, "euclidean", "dense" if m is None else "top-m", key_dtype, prediction_dtype)
    check_layout(layout)
    return layout


# ---------------------------------------------------------------------- bench


def bench(
    path: MemoryPath,
    queries: Annotated[int, typer.Option("--queries", metavar="N", help="How many queries to time.")] = 500,
    batch: Annotated[int, typer.Option("--batch", metavar="B", help="Queries in a batch.")] = 64,
    index: Index = "auto",
    as_json: Json = False,
) -> None:
    """How fast this memory is on this machine.

    Queries are keys of the memory itself, each without its own row.
    """
    count, size = as_count("--queries", queries), as_count("--batch", batch)
    memory = options.open_memory(path)
    check_index(index, memory.layout.dim)
    if len(memory) < 2:
        raise InvalidInput(f"{path} holds {len(memory)} rows; at least 2 are needed to time a search")
    keys, own = _drawn(memory, max(count, BATCHES_TIMED * size))
    setting = saved_setting(memory)
    setting = replace(setting, n_neighbors=min(setting.n_neighbors, len(memory) - 1))
    started = time.perf_counter()
    knn = setting.knn(memory, index=index)
    build_seconds = time.perf_counter() - started
    _ = knn.bandwidth  # measured once, not on the clock
    work: dict[str, Callable[[ndarray, ndarray], object]] = {
        "search": lambda some, excluded: knn.search(some, setting.n_neighbors, excluded),
        "predict": lambda some, excluded: knn(some, excluded),
    }
    found = []
    with progress_bar("timing", len(work) * (count + len(keys))) as advance:
        for name, call in work.items():
            found.append({"work": name, "batch": 1, **_timed(call, keys[:count], own[:count], 1, advance)})
            found.append({"work": name, "batch": size, **_timed(call, keys, own, size, advance)})
    _report_speed(memory, knn, found, build_seconds, as_json)


def _drawn(memory: Memory, count: int) -> tuple[ndarray, ndarray]:
    """Keys of rows of the memory, and what to exclude so that none finds itself."""
    snapshot = memory.snapshot
    rows = np.random.default_rng(0).permutation(np.flatnonzero(snapshot.alive))
    rows = np.resize(rows, count)
    ids, groups = snapshot.all_ids, snapshot.all_groups
    as_group = groups is not None and groups.dtype.kind == ids.dtype.kind  # then exclude is read as a group
    return snapshot.keys.take(rows), (cast(ndarray, groups) if as_group else ids)[rows]


def _timed(
    call: Callable[[ndarray, ndarray], object], keys: ndarray, own: ndarray, size: int, advance: Callable[[int], None]
) -> dict[str, float]:
    call(keys[:size], own[:size])  # warm up
    seconds = []
    for start in range(0, len(keys) - size + 1, size):
        started = time.perf_counter()
        call(keys[start : start + size], own[start : start + size])
        seconds.append(time.perf_counter() - started)
        advance(size)
    p50, p99 = np.quantile(seconds, [0.5, 0.99])
    return {
        "queries_per_second": size * len(seconds) / sum(seconds),
        "p50_ms": 1e3 * float(p50),
        "p99_ms": 1e3 * float(p99),
    }


def _report_speed(
    memory: Memory, knn: ResidualKNN, found: list[dict[str, Any]], build_seconds: float, as_json: bool
) -> None:
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    header = ("", "batch", "queries/s", "p50, ms", "p99, ms")
    cells = [
        (row["work"], row["batch"], f"{row['queries_per_second']:,.0f}", f"{row['p50_ms']:.3g}", f"{row['p99_ms']:.3g}")
        for row in found
    ]
    report(
        {
            "memory": memory.path,
            "rows": len(memory),
            "dim": memory.layout.dim,
            "n_neighbors": knn.n_neighbors,
            "index": knn.description,
            "index_seconds": build_seconds,
            "machine": machine,
            "speed": found,
        },
        f"{len(memory):,} rows of {memory.layout.dim:,} numbers, k {knn.n_neighbors}, {knn.description}, on {machine}",
        f"index and residuals made ready in {build_seconds:.2f} s",
        table(header, cells, numbers=header[1:]),
        as_json=as_json,
    )
