"""Who is in a memory: membership attacks on images and on text, and what a cap on weights costs and hides.

    python -m experiments privacy

Settings are chosen on held-out training images and held-out text; a cap is to be chosen on the rows of held-out
training images, where the network and its memory never saw them; test rows say whether the choice holds. The language
model is trained first: python -m experiments.language.train --tokens 2000000
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Shaped
from numpy import ndarray

from experiments.cifar100.comparisons import Seen
from experiments.cifar100.measuring import choose, opened, see
from experiments.cifar100.samples import SAMPLES
from experiments.language.corpus import WINDOW, tokens_of
from experiments.language.table import built, windows, with_memory
from experiments.language.train import Training, train
from experiments.results_file import ResultFile, Row
from residual_memory.demo.assets import shipped_network
from residual_memory.demo.cifar100 import Cifar100
from residual_memory.demo.run import FINE, PLAIN
from residual_memory.evaluation import Setting
from residual_memory.language import LanguageSetting, TokenScores, tune_tokens
from residual_memory.metrics import Estimate, auc
from residual_memory.models.base import KeyChoice
from residual_memory.models.transformers import ResMemForCausalLM, held_out_tokens, token_scores
from residual_memory.models.transformers import Seen as SeenTokens
from residual_memory.models.vocabulary import Said
from residual_memory.privacy import (
    MAX_WEIGHTS,
    Answers,
    PrivacyReport,
    audit_privacy,
    compared,
    most_telling,
    report_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "privacy"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "privacy.png"
HELD_OUT, TEST = "held-out training images", "test images"
TEXT_CAPS = (*MAX_WEIGHTS, 0.01, 0.005)  # hundreds of neighbours share the weight of a token
DATA = (
    "CIFAR-100: settings from 5,000 held-out training images, audited on them and on the 10,000 test images; "
    "enwiki: settings from the first 20,000 tokens of its valid split, audited on the first 20,480 of its test split"
)


@dataclass(frozen=True)
class TextPlan:
    """What is measured of text, and on how much.

    Attributes
    ----------
    training : of the base.
    rows : of the memory: the first tokens that the base was trained on.
    held_out : split and number of tokens that the setting is chosen by.
    tokens : members that are asked for, in whole windows, and as many test tokens.
    n_neighbors : values of k to choose from.
    """

    training: Training
    rows: int
    held_out: tuple[str, int]
    tokens: int
    n_neighbors: tuple[int, ...]


FULL_TEXT = TextPlan(Training(tokens=2_000_000), 1_000_000, ("valid", 20_000), 80 * WINDOW, (16, 64, 256))
QUICK_TEXT = TextPlan(Training("micro", 1_024, "c4", "valid", 20_000), 5_000, ("train", 3_000), 8 * WINDOW, (16,))


def run(*, quick: bool, fresh: bool) -> None:
    """Measure every row that the result file does not hold yet, print the table and draw the curves."""
    training, test, results = opened(NAME, DATA, quick=quick, fresh=fresh)
    for choice in (PLAIN,) if quick else (PLAIN, FINE):
        images(results, choice, training, test)
    plan = QUICK_TEXT if quick else FULL_TEXT
    if quick and not plan.training.weights().exists():
        train(plan.training)
    if plan.training.weights().exists():
        text(results, plan)
    else:
        print("the language model is not trained, so text is not measured: see the top of experiments/privacy.py")
    if not quick:
        figure(results.rows).savefig(PICTURE, dpi=100)
    print(shown(results.rows))


def images(results: ResultFile, choice: KeyChoice, training: Cifar100, test: Cifar100) -> None:
    """A memory of training images: of the network that never saw the held-out ones, then of the final one."""
    name = f"cifar100 {choice.name}"
    if _holds(results, f"{name}, {TEST}", MAX_WEIGHTS):
        return
    chosen = choose(shipped_network("resnet8-45000"), training, SAMPLES["90%"](training), choice)
    _write(results, f"{name}, {HELD_OUT}", _audited(chosen.seen, chosen.setting), chosen.setting, chosen.seen)
    seen = see(shipped_network("resnet8-50000"), training, np.arange(len(training)), test, choice)
    _write(results, f"{name}, {TEST}", _audited(seen, chosen.setting), chosen.setting, seen)


def _audited(seen: Seen, setting: Setting) -> PrivacyReport:
    queries = seen.queries
    return audit_privacy(seen.memory, queries.keys, queries.labels, np.asarray(queries.predictions), setting)


def _write(results: ResultFile, name: str, found: PrivacyReport, setting: Setting, seen: Seen) -> None:
    more = {"rows": len(seen.memory), "chosen": setting.to_dict()}
    for row in _rows(found):
        results.row(f"{name}, {_cap(row['max_weight'])}", 0, partial(dict, row, **more))


def _holds(results: ResultFile, name: str, caps: Sequence[float]) -> bool:
    return all(results.holds(f"{name}, {_cap(cap)}", 0) for cap in caps)


def _cap(max_weight: float) -> str:
    return f"max_weight {max_weight:g}"


def _rows(found: PrivacyReport) -> list[Row]:
    """A row a cap, each with the figures that no cap changes."""
    fixed = found.to_dict()
    caps = fixed.pop("caps")
    return [{"method": "audit", **fixed, **cap} for cap in caps]


def text(results: ResultFile, plan: TextPlan) -> None:
    """A memory of tokens: windows of the training text, as the memory read them, against windows of test text."""
    base = plan.training
    name = f"{base.corpus} {base.shape}, test text"
    if _holds(results, name, TEXT_CAPS):
        return
    stored = tokens_of(base.corpus, base.split, base.vocabulary, limit=base.tokens).first(plan.rows + 1)
    held_out, test = (tokens_of(base.corpus, split, base.vocabulary) for split in (plan.held_out[0], "test"))
    network = base.load()
    memory = built(network, stored, f"{base.weights().stem}-{plan.rows}")
    lm = with_memory(network, memory)
    tokens = held_out_tokens(lm, windows(held_out), max(plan.n_neighbors), limit=plan.held_out[1])
    tuning = tune_tokens(tokens, n_neighbors=plan.n_neighbors)
    print(f"{name}: {tuning.verdict}, k = {tuning.best.n_neighbors}", flush=True)
    whole = [item for item in windows(stored) if len(item["input_ids"]) > WINDOW]
    drawn = np.random.default_rng(0).choice(len(whole), plan.tokens // WINDOW, replace=False)
    lm = with_memory(network, memory, "exact").with_setting(tuning.best)  # codes lose some rows that ask for themselves
    members = ask(lm, [whole[place] for place in np.sort(drawn)], plan.tokens)
    others = ask(lm, windows(test), plan.tokens)
    found = report_of("accuracy", TEXT_CAPS, members, others)
    more = {"rows": len(memory), "index": lm.description, "chosen": tuning.best.to_dict()}
    for place, row in enumerate(_rows(found)):
        row |= _with_ends("auc_window", by_window(members, others, place))
        results.row(f"{name}, {_cap(row['max_weight'])}", 0, partial(dict, row, **more))
    memory.close()


def ask(lm: ResMemForCausalLM, items: Iterable[Any], limit: int) -> Answers:
    """What the language model says of every token of some windows under every cap, from one search."""
    parts: dict[float, list[TokenScores]] = {cap: [] for cap in TEXT_CAPS}
    nearest = []
    with torch.inference_mode():
        for batch in lm.watch.batches(items, limit=limit):
            for here in lm.blocks(len(batch)):
                some = batch.part(here)
                said = Said.of(some.logits)
                seen = lm.seen(some.logits, some.keys, said, always=True)
                assert seen is not None
                nearest.append(seen.recalled.distances[:, 0])
                for cap in TEXT_CAPS:
                    parts[cap].append(token_scores(some, said, capped(seen, lm.setting, cap)))
    scores = [TokenScores.joined(parts[cap]) for cap in TEXT_CAPS]
    base = np.exp(-scores[0].base_loss.astype(np.float64))
    corrected = np.exp(-np.stack([some.corrected_loss for some in scores]).astype(np.float64))
    return Answers(
        base,
        corrected,
        np.stack([compared(line, base) for line in corrected], axis=1),
        np.concatenate(nearest).astype(np.float64),
        1.0 - scores[0].base_hit,
        np.stack([1.0 - some.corrected_hit for some in scores]),
        scores[0].documents,
    )


def capped(seen: SeenTokens, setting: LanguageSetting, cap: float) -> SeenTokens:
    """What was found, used as a model with this `max_weight` uses it."""
    weights = np.minimum(seen.weights, cap)
    return replace(seen, weights=weights, amount=setting.amount(seen.recalled.distances, weights, seen.cues))


def by_window(members: Answers, others: Answers, cap: int) -> Estimate:
    """The attack on whole windows, by the mean over their tokens; windows that begin in one document are one draw."""
    ways = [[asked.corrected[cap], *asked.calibrated[:, cap]] for asked in (members, others)]
    found = []
    for scores in zip(*ways, strict=True):
        means, groups = zip(*map(_means, (members, others), scores), strict=True)
        found.append(auc(*means, positive_groups=groups[0], negative_groups=groups[1]))
    return most_telling(found)


def _means(asked: Answers, scores: ndarray) -> tuple[ndarray, Shaped[ndarray, " w"]]:
    assert asked.groups is not None
    return scores.reshape(-1, WINDOW).mean(axis=1), asked.groups[::WINDOW]


def _with_ends(name: str, figure: Estimate) -> Row:
    return {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}


# ---------------------------------------------------------------------- what is shown


def curves(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each memory and set of queries, from the loosest cap on."""
    names = dict.fromkeys(row["setting"].rpartition(", ")[0] for row in rows)
    return {
        name: sorted(
            (row for row in rows if row["setting"].rpartition(", ")[0] == name), key=lambda row: -row["max_weight"]
        )
        for name in names
    }


def shown(rows: Sequence[Row]) -> str:
    """The table for a terminal: accuracies in per cent, and areas."""
    lines = []
    for name, curve in curves(rows).items():
        first = curve[0]
        lines += [
            f"{name}: base {100 * first['base']:.2f} %, AUC {_interval(first, 'auc_base')}, "
            f"of the nearest memory {first['auc_nearest']:.4f}",
            f"{'max_weight':>12}{'corrected':>11}{'gain (95 %)':>24}{'AUC corrected':>26}{'AUC with the base':>26}",
        ]
        for row in curve:
            gain, low, high = (f"{100 * row[end]:+.2f}" for end in ("gain", "gain_low", "gain_high"))
            window = f"  of a window {row['auc_window']:.3f}" if "auc_window" in row else ""
            lines.append(
                f"{row['max_weight']:>12g}{100 * row['corrected']:>11.2f}{f'{gain} [{low}, {high}]':>24}"
                f"{_interval(row, 'auc_corrected'):>26}{_interval(row, 'auc_calibrated'):>26}{window}"
            )
    return "\n".join(lines)


def page_table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """The table of docs/privacy.md: of some curves, the gain in points and the AUC with the base at hand, by cap."""
    found = curves(rows)
    lines = [
        "| max_weight | " + " | ".join(f"{name}: gain | AUC" for name in names) + " |",
        "|---|" + "---|---|" * len(names),
        "| base alone | " + " | ".join(f"0 | {found[name][0]['auc_base']:.3f}" for name in names) + " |",
    ]
    for cap in sorted({row["max_weight"] for name in names for row in found[name]}, reverse=True):
        cells = [next((_cells(row) for row in found[name] if row["max_weight"] == cap), " | ") for name in names]
        lines.append(f"| {cap:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(row: Row) -> str:
    margin = 50 * (row["gain_high"] - row["gain_low"])
    return f"{100 * row['gain']:+.2f} ± {margin:.2f} | {row['auc_calibrated']:.3f}"


def _interval(row: Row, name: str) -> str:
    return f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"


def figure(rows: Sequence[Row]) -> "Figure":
    """Attacks above, gain below, against the cap; one column a memory, from test rows alone."""
    from matplotlib.figure import Figure

    measured = {name: curve for name, curve in curves(rows).items() if not name.endswith(HELD_OUT)}
    drawn = Figure(figsize=(3.3 * len(measured) + 0.4, 4.8), layout="constrained")
    grid = drawn.subplots(2, len(measured), sharex="col", sharey="row", squeeze=False)
    for place, (name, curve) in enumerate(measured.items()):
        _attacks(grid[0, place], curve)
        _gains(grid[1, place], curve)
        grid[0, place].set_title(f"{name} ({curve[0]['rows']:,} rows)", fontsize=9)
        grid[1, place].set_xlabel("max_weight")
    grid[0, 0].set_ylabel("AUC of the attack")
    grid[1, 0].set_ylabel("gain in accuracy, points")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return drawn


def _attacks(axes: Any, curve: Sequence[Row]) -> None:
    from residual_memory.figures import BASE, CORRECTED, LOSS

    named = {
        "auc_calibrated": (CORRECTED, "corrected, with the base at hand"),
        "auc_corrected": (LOSS, "corrected alone"),
        "auc_base": (BASE, "base alone"),
    }
    for name, (colour, label) in named.items():
        _line(axes, curve, name, colour, label, 1)
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", ylim=(0.25, 1.0))
    axes.set_xticks([row["max_weight"] for row in curve], [f"{row['max_weight']:g}" for row in curve])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)


def _gains(axes: Any, curve: Sequence[Row]) -> None:
    from residual_memory.figures import CORRECTED

    _line(axes, curve, "gain", CORRECTED, "gain", 100)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _line(axes: Any, curve: Sequence[Row], name: str, colour: str, label: str, factor: float) -> None:
    places = [row["max_weight"] for row in curve]
    middle, low, high = ([factor * row[f"{name}{end}"] for row in curve] for end in ("", "_low", "_high"))
    axes.plot(places, middle, color=colour, marker="o", markersize=3, label=label)
    axes.fill_between(places, low, high, color=colour, alpha=0.25, linewidth=0)
