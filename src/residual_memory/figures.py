"""Pictures from result tables, for pages and papers: matplotlib figures that know nothing of models or memories.

Each function takes what it draws, as a result file or `metrics` has it, and gives a `Figure`: `savefig("name.pdf")`
writes it for a paper, `as_svg` gives it to a page. A figure is as wide as a column of text, with letters of 9 points.
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from residual_memory.display import shown
from residual_memory.errors import InvalidInput, MissingExtra

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtra("figures", "report") from error

BASE, CORRECTED, LOSS = "#8a8f98", "#c2185b", "#3b6fb6"
COLOURS = (BASE, CORRECTED, LOSS, "#c98a1b", "#3f8f5f", "#7a5ba8")
WIDTH = 4.6  # inches
LETTERS = 9  # points
NAME_WIDTH = 36  # characters of a name
Row = Mapping[str, Any]


def gain_by_class(names: Sequence[str], base: Sequence[float], corrected: Sequence[float], shown: int = 12) -> Figure:
    """The classes that gain most and least, as bars in points.

    Parameters
    ----------
    names, base, corrected : of each class: its name, and the accuracies before and after.
    shown : classes at each end.
    """
    gains = 100 * (np.asarray(corrected) - np.asarray(base))
    order = np.argsort(gains, kind="stable")
    if len(order) > 2 * shown:
        order = np.concatenate([order[:shown], order[-shown:]])
    figure, axes = _canvas(0.21 * len(order) + 0.8)
    places = np.arange(len(order))
    axes.barh(places, gains[order], color=np.where(gains[order] >= 0, CORRECTED, LOSS), height=0.7)
    labels = [f"{_name(names[i])}  ({100 * base[i]:.0f} %)" for i in order]
    axes.set_yticks(places, labels, fontsize=LETTERS - 1, parse_math=False)
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.axvline(0, color="black", linewidth=0.8)
    figure.supxlabel("gain in points (in brackets: the base's accuracy)", fontsize=LETTERS)
    return figure


def gain_along(bins: Sequence[Row], what: str, *, unit: str = "points", factor: float = 100.0) -> Figure:
    """Where a gain comes from: its mean in bins of something, with 95 % intervals.

    Parameters
    ----------
    bins : of `metrics.gains_by`.
    what : the rows are sorted by, on the axis.
    unit, factor : of the gain, and what it is multiplied by for it.
    """
    figure, axes = _canvas(2.7)
    places = np.arange(len(bins))
    gain, low, high = (factor * np.array([row[name] for row in bins]) for name in ("gain", "gain_low", "gain_high"))
    reach = np.where(np.isfinite([gain - low, high - gain]), [gain - low, high - gain], 0)
    axes.errorbar(places, gain, reach, color=CORRECTED, marker="o", markersize=4, linestyle="", linewidth=1.2)
    captions = [f"{row['low']:.2g}–\n{row['high']:.2g}" for row in bins]
    axes.set_xticks(places, captions, fontsize=LETTERS - 1)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel=what, ylabel=f"gain, {unit}")
    return figure


def gain_by_size(
    curves: Mapping[str, Sequence[Row]], *, at: str = "n", unit: str = "points", factor: float = 100.0
) -> Figure:
    """Gain against the size of the sample or of the memory, with 95 % intervals.

    Parameters
    ----------
    curves : by name, rows of a result file with `gain`, `gain_low`, `gain_high`, and the size.
    at : the field of the size: "n", "rows", "fraction", …
    unit, factor : as in `gain_along`.
    """
    figure, axes = _canvas(3.2)
    for (name, rows), colour in zip(curves.items(), _colours(curves, COLOURS[1:]), strict=True):
        rows = sorted(rows, key=lambda row: row[at])
        sizes = [row[at] for row in rows]
        gain, low, high = (factor * np.array([row[end] for row in rows]) for end in ("gain", "gain_low", "gain_high"))
        axes.plot(sizes, gain, color=colour, marker="o", markersize=4, label=_name(name))
        axes.fill_between(sizes, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set_xscale("log")
    places = _apart(sorted({float(row[at]) for rows in curves.values() for row in rows}))
    axes.set_xticks(places, [f"{place:,g}" for place in places], rotation=45 if len(places) > 5 else 0)
    axes.minorticks_off()
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel=at.replace("_", " "), ylabel=f"gain, {unit}")
    _legend(figure)
    return figure


def reliability(curves: Mapping[str, Sequence[Row]], errors: Mapping[str, float]) -> Figure:
    """Accuracy against confidence, one curve a method, with the diagonal of perfect calibration.

    Parameters
    ----------
    curves : by name, the bins of `metrics.calibration_bins`.
    errors : by name, the calibration error, shown in the legend.
    """
    figure, axes = _canvas(4.2)
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    for (name, bins), colour in zip(curves.items(), _colours(curves), strict=True):
        axes.plot(
            [entry["confidence"] for entry in bins],
            [entry["accuracy"] for entry in bins],
            marker="o",
            markersize=4,
            color=colour,
            clip_on=False,
            label=f"{_name(name)}: calibration error {100 * errors[name]:.1f} %",
        )
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    _legend(figure)
    return figure


def risk_coverage(curves: Mapping[str, Sequence[Row]], *, risk: str = "error, %", factor: float = 100.0) -> Figure:
    """The risk of answering the surest queries alone, against how many those are.

    Parameters
    ----------
    curves : by name, of `metrics.risk_coverage`.
    risk : its name on the axis.
    factor : by which it is multiplied.
    """
    figure, axes = _canvas(3.2)
    for (name, points), colour in zip(curves.items(), _colours(curves), strict=True):
        coverage, values = (np.array([point[part] for point in points]) for part in ("coverage", "risk"))
        axes.plot(100 * coverage, factor * values, color=colour, label=_name(name))
    axes.set(xlabel="answered, % of the queries, the surest first", ylabel=risk, xlim=(0, 100), ylim=(0, None))
    _legend(figure)
    return figure


def growth(curves: Mapping[str, Sequence[Row]], value: str, *, at: str = "rows", unit: str = "") -> Figure:
    """How something grows with the size of a memory, on logarithmic axes, with the power of the size that fits it.

    Parameters
    ----------
    curves : by name, rows of a result file with the size and the value, both above 0.
    value : the field to draw: "queries_per_second", "bytes_per_row", "build_seconds", …
    at : the field of the size.
    unit : of the value, on the axis; by default the field's name.

    Raises
    ------
    InvalidInput : if a number to draw is not above 0.
    """
    figure, axes = _canvas(3.2)
    for (name, rows), colour in zip(curves.items(), _colours(curves, COLOURS[1:]), strict=True):
        points: Any = np.array(sorted((row[at], row[value]) for row in rows), float)
        if not (points > 0).all():
            raise InvalidInput(f"{name} holds a {at} or {value} of {points.min():g}, and 0 has no place on a log axis")
        several = len(np.unique(points[:, 0])) > 1
        sizes, values = np.log(points.T)
        power = f"  (∝ size^{np.polyfit(sizes, values, 1)[0]:.2f})" if several else ""
        axes.plot(*points.T, color=colour, marker="o", markersize=4, label=_name(name) + power)
    axes.set(xscale="log", yscale="log", xlabel=at.replace("_", " "), ylabel=unit or value.replace("_", " "))
    _legend(figure)
    return figure


def gallery(rows: Sequence[Sequence[tuple[UInt8[ndarray, "3 h w"], str]]]) -> Figure:
    """Pictures with captions: in each row a query, then the memories that corrected it.

    Parameters
    ----------
    rows : of (image, caption); the first of a row stands apart.
    """
    n_columns = max(len(row) for row in rows)
    figure = Figure(figsize=(1.55 * n_columns + 0.3, 1.95 * len(rows)), layout="constrained")
    ratios = [1.3] + [1.0] * (n_columns - 1)
    grid = figure.subplots(len(rows), n_columns, squeeze=False, gridspec_kw={"width_ratios": ratios})
    for line, row in zip(grid, rows, strict=True):
        for axes in line:
            axes.axis("off")
        for place, (axes, (image, caption)) in enumerate(zip(line, row, strict=False)):
            axes.imshow(np.moveaxis(image, 0, -1), interpolation="bicubic")
            axes.set_title(caption, fontsize=8.5 if place == 0 else 8, loc="center", parse_math=False)
    return figure


def as_svg(figure: Figure) -> str:
    """The figure as an SVG element for an HTML page, the same bytes each time.

    Black becomes the page's own ink and there is no background, so that it can be read on dark pages too; text is text.
    """
    from matplotlib import rc_context

    stream = io.StringIO()
    with rc_context({"svg.hashsalt": "residual-memory", "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # the reader's fonts have more
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", stream.getvalue(), flags=re.DOTALL)
    return re.sub(r"<[^>]*>", _tag_for_pages, text[text.index("<svg") :])


def _tag_for_pages(found: re.Match[str]) -> str:
    """A tag, never a name that a figure shows, with the page's ink and letters."""
    tag = re.sub(r' id="[a-z0-9.]+_\d+"', "", found[0])  # several figures on a page would repeat them
    tag = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", tag)
    for name, colour in (("base", BASE), ("corrected", CORRECTED), ("loss", LOSS)):
        tag = tag.replace(colour, f"var(--{name}, {colour})")  # a page may have colours of its own
    return tag.replace("#000000", "currentColor").replace("<svg ", '<svg fill="currentColor" role="img" ')


def _canvas(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=LETTERS)
    axes.xaxis.label.set_fontsize(LETTERS)
    axes.yaxis.label.set_fontsize(LETTERS)
    return figure, axes


def _legend(figure: Figure) -> None:
    """Above the axes, where it covers nothing."""
    legend = figure.legend(frameon=False, loc="outside upper left", fontsize=LETTERS)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _apart(places: Sequence[float], least: float = 0.1) -> list[float]:
    """Places on a log axis that have room for a label each, the largest first: parts of the axis that lie between."""
    kept: list[float] = []
    span = np.log(places[-1] / places[0]) or 1.0
    for place in reversed(places):
        if not kept or np.log(kept[0] / place) >= least * span:
            kept.insert(0, place)
    return kept


def _name(text: str) -> str:
    """A class or method as it is written in a figure."""
    return shown(text.replace("_", " "), NAME_WIDTH)


def _colours(curves: Mapping[str, Any], colours: Sequence[str] = COLOURS) -> Sequence[str]:
    if len(curves) > len(colours):
        raise InvalidInput(f"there are {len(curves)} curves, expected at most {len(colours)}; draw fewer in one figure")
    return colours[: len(curves)]
