"""Gain against the size of the training sample, and against the size of the network.

ResNet-8 is trained for the same number of steps on six samples, each of which holds the smaller ones. Settings are
chosen on the 5,000 held-out images, which no sample but the whole contains; the whole uses those of the 90 % sample.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.cifar100.measuring import Chosen, choose, figures, opened, predicted, see
from experiments.cifar100.networks import trained, weights_file
from experiments.cifar100.samples import FRACTIONS, SAMPLES
from experiments.results_file import RESULTS, Row
from residual_memory.demo.run import BEST, PLAIN
from residual_memory.metrics import Z95
from residual_memory.models.base import KeyChoice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "sample-size"
STEPS = 7_800
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "sample-size.png"


def run(*, quick: bool, fresh: bool) -> None:
    """Measure every row that the result file does not hold yet, draw the figure, and print the table."""
    data = "CIFAR-100 training samples of 10 % to 100 %, official test split; settings from 5,000 held-out images"
    train, test, results = opened(NAME, data, quick=quick, fresh=fresh)
    for choice in (PLAIN,) if quick else (PLAIN, BEST):
        chosen: Chosen | None = None
        for fraction in (0.1, 1.0) if quick else FRACTIONS:
            sample = f"{fraction:.0%}"
            setting = f"resnet8 {sample}, {choice.name}"
            if results.holds(setting, 0) or not weights_file("resnet8", sample, STEPS, 0).exists():
                continue
            network, rows = trained("resnet8", sample, STEPS), SAMPLES[sample](train)
            if fraction < 1 or chosen is None:
                other = trained("resnet8", "90%", STEPS) if fraction == 1 else network
                chosen = choose(other, train, SAMPLES["90%"](train) if fraction == 1 else rows, choice)
            seen = see(network, train, rows, test, choice)
            row = {**figures(seen, chosen, predicted(seen, chosen)), "fraction": fraction, "n": len(rows)}
            results.row(setting, 0, lambda: row)  # noqa: B023
        if not quick and all(results.holds(f"resnet8 {fraction:.0%}, {choice.name}", 0) for fraction in FRACTIONS):
            results.row(f"resnet8 slope, {choice.name}", 0, lambda: slope(_of(results.rows, choice)))  # noqa: B023
    print(results.table())
    if not quick:
        draw(json.loads((RESULTS / f"{NAME}.json").read_text())["rows"]).savefig(PICTURE, dpi=100)


def measured(sample: str, choice: KeyChoice) -> Row | None:
    """The row of one sample and choice, without its setting, where the result file has it."""
    path = RESULTS / f"{NAME}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    found = [row for row in rows if row["setting"] == f"resnet8 {sample}, {choice.name}"]
    return {name: value for name, value in found[0].items() if name not in ("setting", "seed")} if found else None


def slope(rows: list[Row]) -> Row:
    """Points of gain for every doubling of the sample: least squares weighted by the rows' own intervals.

    The interval is that of the test images' chance; the networks are one a sample, so their own chance is not in it.
    A row that the memory does not change (λ = 0) has no interval: it counts as the widest of the others.
    """
    doublings = np.log2([row["n"] for row in rows])
    gains = np.array([row["gain"] for row in rows])
    errors = np.array([(row["gain_high"] - row["gain_low"]) / (2 * Z95) for row in rows])
    weights = 1 / np.where(errors > 0, errors, errors.max()) ** 2
    centre = np.average(doublings, weights=weights)
    spread = float((weights * (doublings - centre) ** 2).sum())
    value = float((weights * (doublings - centre) * gains).sum() / spread)
    margin = Z95 / np.sqrt(spread)
    return {
        "method": "resmem",
        "metric": "gain per doubling of the sample",
        "gain": value,
        "gain_low": value - margin,
        "gain_high": value + margin,
        "n_samples": len(rows),
    }


def draw(rows: list[Row]) -> "Figure":
    """Accuracy of base and corrected, and gain, against the size of the sample."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for choice, name, colour in ((PLAIN, "plain", "tab:blue"), (BEST, "tuned", "tab:orange")):
        found = _of(rows, choice)
        if not found:
            continue
        sizes = [row["n"] for row in found]
        if choice is PLAIN:
            left.plot(sizes, [100 * row["base"] for row in found], "o-", color="tab:gray", label="base")
        left.plot(sizes, [100 * row["corrected"] for row in found], "o-", color=colour, label=f"with memory, {name}")
        gains = np.array([[row["gain"], row["gain_low"], row["gain_high"]] for row in found]) * 100
        reach = [gains[:, 0] - gains[:, 1], gains[:, 2] - gains[:, 0]]
        right.errorbar(sizes, gains[:, 0], reach, fmt="o-", color=colour, capsize=3, label=name)
    left.set_ylabel("test accuracy, %")
    right.set_ylabel("gain, points (95 %)")
    right.axhline(0, color="black", linewidth=0.8)
    for axis in (left, right):
        axis.set_xlabel("training images")
        axis.set_xscale("log", base=2)
        axis.set_xticks([row["n"] for row in _of(rows, PLAIN)], [f"{row['n']:,}" for row in _of(rows, PLAIN)])
        axis.minorticks_off()
        axis.tick_params(axis="x", labelrotation=45)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    pyplot.close(figure)
    return figure


def _of(rows: list[Row], choice: KeyChoice) -> list[Row]:
    """The rows of one choice, by size."""
    found = [row for row in rows if row["setting"].endswith(f", {choice.name}") and "fraction" in row]
    return sorted(found, key=lambda row: row["n"])
