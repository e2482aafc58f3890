"""Reports of language models, by token."""

from collections.abc import Sequence

import numpy as np

from residual_memory import figures
from residual_memory.language import LanguageTuning, TokenScores
from residual_memory.metrics import gains_by, mean_interval
from residual_memory.reports.page import Chart, Comparison, Report

DOCUMENTS = "Whole documents are the draws of the intervals, since the tokens of one are not independent."
LEAD = "Nothing was trained again: the base stays as it is, and a memory of tokens corrects what it says."


def token_report(
    scores: TokenScores,
    *,
    title: str = "What the memory adds, by token",
    facts: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> Report:
    """What `ResMemForCausalLM.score` found: accuracy, log-loss, and which tokens gain."""
    accuracies = tuple((name.replace("_", " "), figure) for name, figure in scores.accuracies.items())
    losses = tuple(
        (name, mean_interval(loss, scores.documents))
        for name, loss in (("base", scores.base_loss), ("corrected", scores.corrected_loss))
    )
    _, owner, counts = np.unique(scores.labels, return_inverse=True, return_counts=True)
    bins = gains_by(counts[owner], scores.base_loss - scores.corrected_loss, groups=scores.documents)
    figure = figures.gain_along(bins, "times that the token stands in this text", unit="nats a token", factor=1.0)
    right, wrong = scores.corrected_hit & ~scores.base_hit, scores.base_hit & ~scores.corrected_hit
    return Report(
        title=title,
        lead=f"{len(scores):,} tokens of {len(np.unique(scores.documents)):,} documents. {LEAD}",
        verdict=scores.verdict,
        helps=scores.helps,
        comparisons=(
            Comparison("", "accuracy, %", accuracies, scores.accuracy_gain, "points", 100.0),
            Comparison("", "log-loss, nats a token", losses, scores.log_loss_gain, "nats"),
        ),
        charts=(Chart("Gain by frequency", "Tokens sorted by how often they stand in this text.", figure),),
        facts=(
            ("tokens put right", f"{right.sum():,}"),
            ("tokens put wrong", f"{wrong.sum():,}"),
            ("searched", f"{100 * scores.searched.mean():.1f} % of the tokens"),
            *facts,
        ),
        notes=(DOCUMENTS, *notes),
    )


def language_tuning_report(found: LanguageTuning, facts: Sequence[tuple[str, str]], notes: Sequence[str]) -> Report:
    """What `tune_language` found."""
    lines = (("base", found.base), ("corrected", found.corrected))
    return Report(
        title="What tuning found, by token",
        lead=LEAD,
        verdict=found.verdict,
        helps=found.helps,
        comparisons=(Comparison("", "log-loss, nats a token", lines, found.gain, "nats"),),
        facts=tuple(facts),
        notes=(DOCUMENTS, *notes),
    )
