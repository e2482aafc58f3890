"""`resmem tune` and `evaluate` on text: perplexity and accuracy by token, with whole documents as the draws."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import typer

from residual_memory.cli.output import note, report, table
from residual_memory.cli.reporting import CROSS_FITTED, provenance
from residual_memory.cli.text import TextReading, reading
from residual_memory.errors import InvalidInput
from residual_memory.kernels import kernel_named
from residual_memory.language import LanguageSetting, LanguageTuning, TokenScores
from residual_memory.memory import Memory
from residual_memory.windows import TextFile, Windows


def tune_text(
    memory: Memory,
    file: TextFile,
    text: TextReading,
    kernels: Sequence[str] | None,
    index: str,
    save: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Choose the setting on a held-out text; exits with 1 where there is no gain."""
    for kernel in kernels or ():
        kernel_named(kernel)
    lm, windows, warned = _opened(memory, file, text, index, LanguageSetting())
    from residual_memory.models.transformers import tune_language

    options: dict[str, Any] = {} if text.limit is None else {"limit": text.limit}
    if kernels:
        options["kernels"] = tuple(kernels)
    with reading(file):
        result = tune_language(lm, windows, batch_size=text.batch_size, **options)
    if save:
        memory.save_setting(result.best.to_dict())
    if out is not None:
        from residual_memory.reports.language import language_tuning_report

        facts = (*provenance(str(file.path)), ("memory", repr(memory)), ("setting", result.best.text))
        language_tuning_report(result, facts, (CROSS_FITTED, *warned)).write(out)
    _report_tuning(memory, file, result, f"saved with {memory.path}" if save else "not saved", out, as_json)


def evaluate_text(
    memory: Memory,
    file: TextFile,
    text: TextReading,
    changes: Mapping[str, Any],
    index: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure the saved setting, with changes, on a text; exits with 1 where there is no gain."""
    setting = _saved_setting(memory, changes)
    lm, windows, warned = _opened(memory, file, text, index, setting)
    with reading(file):
        scores = lm.score(windows, limit=text.limit, batch_size=text.batch_size)
    if len(np.unique(scores.documents)) < 2:
        raise InvalidInput(
            f"what was read of {file.path} is one document, from which no interval follows; "
            "put a blank line between documents, or read more of them"
        )
    if out is not None:
        from residual_memory.reports.language import token_report

        facts = (*provenance(str(file.path)), ("memory", repr(memory)), ("setting", setting.text))
        told = ("windows", f"{windows.length:,} tokens, stride {windows.stride:,}")
        token_report(scores, facts=(*facts, told), notes=warned).write(out)
    _report_scores(memory, file, scores, windows, setting, out, as_json)


def _opened(
    memory: Memory, file: TextFile, text: TextReading, index: str, setting: LanguageSetting
) -> tuple[Any, Windows, tuple[str, ...]]:
    """The model with the memory, the text in windows that it can read, and what a reader is to be warned of."""
    if memory.source is None:
        raise InvalidInput(
            f"the memory at {memory.path} was filled from arrays and does not say which layer its keys come from; "
            "give --data as arrays too"
        )
    model, tokenizer = text.load(file)
    from residual_memory.models.transformers import ResMemForCausalLM

    lm = ResMemForCausalLM(model, memory, setting=setting, tokenizer=tokenizer, autocast=text.precision, index=index)
    windows = text.windows(file, lm.watch, tokenizer)
    return lm, windows, _warn_if_held(memory, file, windows)


def _warn_if_held(memory: Memory, file: TextFile, windows: Windows) -> tuple[str, ...]:
    from residual_memory.models.watching import digest_of

    with reading(file):
        first = next(iter(windows), None)
    if first is None or not memory.source or memory.source["data"].get("first_item") != digest_of(first):
        return ()
    warning = (
        f"{file.path} begins as the text that the memory was built from, so the figures are too good; "
        "use text that it was not built from"
    )
    note(f"warning: {warning}")
    return (f"Warning: {warning}.",)


def _saved_setting(memory: Memory, changes: Mapping[str, Any]) -> LanguageSetting:
    if memory.setting is None and "n_neighbors" not in changes:
        note(f"no setting is saved with {memory.path}, so k 64 and shrinkage 0.25 are used; resmem tune chooses one")
    setting = LanguageSetting.from_dict(memory.setting or {})
    if "shrinkage" in changes:
        setting = replace(setting, gate=None)  # a gate stands in place of the shrinkage
    return replace(setting, **changes)


def _report_tuning(
    memory: Memory, file: TextFile, result: LanguageTuning, kept: str, out: Path | None, as_json: bool
) -> None:
    figures = result.perplexities
    report(
        {
            "memory": memory.path,
            "data": file.path,
            "metric": "perplexity",
            **{f"perplexity_{name}": figure.value for name, figure in figures.items()},
            **{f"perplexity_{name}_{end}": getattr(figures[name], end) for name in figures for end in ("low", "high")},
            "log_loss_gain": result.gain.value,
            "log_loss_gain_low": result.gain.low,
            "log_loss_gain_high": result.gain.high,
            "helps": result.helps,
            "verdict": result.verdict,
            "setting": result.best.to_dict(),
            "constant": result.constant.to_dict(),
            "knn_lm": result.knn_lm.to_dict(),
            "report": out,
        },
        table(result.table[0], result.table[1:], numbers=result.table[0][1:]),
        "",
        result.verdict,
        f"setting: {result.best.text}",
        kept,
        *([f"report: {out}"] if out else []),
        as_json=as_json,
    )
    if not result.helps:
        raise typer.Exit(1)


def _report_scores(
    memory: Memory,
    file: TextFile,
    scores: TokenScores,
    windows: Windows,
    setting: LanguageSetting,
    out: Path | None,
    as_json: bool,
) -> None:
    accuracy = scores.accuracies
    context = windows.length - windows.stride
    report(
        {
            "memory": memory.path,
            "data": file.path,
            "metric": "accuracy",
            **scores.summary(),
            **{f"{name}_{end}": getattr(figure, end) for name, figure in accuracy.items() for end in ("low", "high")},
            "length": windows.length,
            "stride": windows.stride,
            "helps": scores.helps,
            "verdict": scores.verdict,
            "setting": setting.to_dict(),
            "report": out,
        },
        table(scores.table[0], scores.table[1:], numbers=scores.table[0][1:]),
        "",
        scores.verdict,
        f"{len(scores):,} tokens in windows of {windows.length:,}, stride {windows.stride:,}"
        + (f", at least {context:,} tokens of context" if context else ""),
        f"setting: {setting.text}",
        *([f"report: {out}"] if out else []),
        as_json=as_json,
    )
    if not scores.helps:
        raise typer.Exit(1)
