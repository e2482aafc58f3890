"""`resmem tune`, `evaluate` and `bench`: what a memory is worth, and how fast it is."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer
from numpy import ndarray

from residual_memory import evaluation, tuning
from residual_memory.cli import options
from residual_memory.cli.data import Queries, Reading, examples_at, read_all, rows_for
from residual_memory.cli.loading import user_code
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
from residual_memory.cli.output import note, report, table
from residual_memory.cli.reporting import CROSS_FITTED, Out, ShownExamples, check_out, provenance
from residual_memory.cli.text import TextReading, text_at
from residual_memory.correction import ResidualKNN
from residual_memory.errors import InvalidInput
from residual_memory.evaluation import METRICS, Evaluation, HeldOut, Setting, corrected_predictions, evaluation_of
from residual_memory.indexes.registry import check_index
from residual_memory.memory import HELD_TOO_OFTEN, Memory, share_held
from residual_memory.progress import progress_bar
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
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Choose the setting on held-out data, and say whether the memory helps.

    The figures are cross-fitted: no row is measured with a setting that it chose. Exits with 1 where there is no gain.
    """
    check_out(out)
    text = TextReading(model, tokenizer, length, None, limit, batch_size, autocast)
    with options.open_memory(path, writable=save) as memory:
        check_index(index, memory.layout.dim)
        if (file := text_at(data)) is not None:
            others = {"--metric": metric is not None, "--no-gate": gate is False}
            leave_out(f"{data} is text", {**others, **_not_for_text(outputs, image_size)})
            tune_text(memory, file, text, kernel, index, save, out, as_json)
            return
        leave_out(f"{data} is no text", text.given)
        wanted = _metric(metric, memory)
        rows, warned = _held_out(data, memory, Reading(model, outputs, batch_size, image_size))
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
        if out is not None:
            from residual_memory.reports.measured import tuning_report

            facts = provenance(data)
            tuning_report(memory, result, result.best, facts=facts, notes=(CROSS_FITTED, *warned)).write(out)
        kept = f"saved with {path}" if save else "not saved"
        _report_evaluation(memory, data, result, result.best, kept, out, as_json)


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
    out: Out = None,
    examples: ShownExamples = None,
    as_json: Json = False,
) -> None:
    """Measure the saved setting on data that did not choose it. Exits with 1 where there is no gain."""
    check_out(out)
    memory = options.open_memory(path)
    check_index(index, memory.layout.dim)
    text, file = TextReading(model, tokenizer, length, stride, limit, batch_size, autocast), text_at(data)
    if file is not None:
        others = {
            "--metric": metric is not None,
            "--temperature": temperature is not None,
            "--examples": examples is not None,
        }
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
        evaluate_text(memory, file, text, given, index, out, as_json)
        return
    if examples is not None and out is None:
        raise InvalidInput("--examples is for the report; add --out FILE.html, or leave it out")
    of_memory = None if examples is None else examples_at("--examples", examples, memory, image_size)
    setting = saved_setting(memory, **given)
    rows, warned = _held_out(data, memory, Reading(model, outputs, batch_size, image_size))
    held_out = HeldOut.checked(memory, rows.keys, rows.labels, rows.predictions, wanted, rows.groups)
    said = corrected_predictions(memory, held_out.keys, held_out.predictions, setting, index=index)
    result = evaluation_of(held_out, said, rows.groups)
    if out is not None:
        from residual_memory.reports.measured import report_of

        with user_code("showing the examples", "are they what the memory was built from?"):
            report_of(
                memory,
                held_out,
                setting,
                said,
                result,
                index=index,
                groups=rows.groups,
                examples=of_memory,
                held_out=rows.examples,
                facts=provenance(data),
                notes=warned,
            ).write(out)
    _report_evaluation(memory, data, result, setting, None, out, as_json)


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


def _held_out(data: str, memory: Memory, reading: Reading) -> tuple[Queries, tuple[str, ...]]:
    """The rows, and what a reader of their figures is to be warned of."""
    rows = read_all(rows_for(data, memory, reading), memory)
    share = share_held(memory, rows.keys)
    if share <= HELD_TOO_OFTEN:
        return rows, ()
    warning = (
        f"{100 * share:.0f} % of {data} are rows that the memory holds, so the figures are too good; "
        "use data that it was not built from"
    )
    note(f"warning: {warning}")
    return rows, (f"Warning: {warning}.",)


def _report_evaluation(
    memory: Memory,
    data: str,
    result: Evaluation,
    setting: Setting,
    kept: str | None,
    out: Path | None,
    as_json: bool,
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
            "report": out,
        },
        table(result.table[0], result.table[1:], numbers=result.table[0][1:]),
        "",
        result.verdict,
        f"setting: {setting.text}",
        *([kept] if kept else []),
        *([f"report: {out}"] if out else []),
        as_json=as_json,
    )
    if not result.helps:
        raise typer.Exit(1)


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
