"""Pictures from result tables: matplotlib figures that know nothing of models or memories."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from residual_memory.errors import MissingExtra

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtra("figures", "report") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASE, CORRECTED, LOSS = "#8a8f98", "#c2185b", "#3b6fb6"


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
    figure = Figure(figsize=(6.4, 0.24 * len(order) + 0.9), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(order))
    axes.barh(places, gains[order], color=np.where(gains[order] >= 0, CORRECTED, LOSS))
    axes.set_yticks(places, [f"{names[i].replace('_', ' ')}  ({100 * base[i]:.0f} %)" for i in order])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("gain in points (in brackets: the base's accuracy)")
    _plain(axes)
    return figure


def reliability(curves: Mapping[str, Sequence[Mapping[str, float]]], errors: Mapping[str, float]) -> Figure:
    """Accuracy against confidence, one curve a method, with the diagonal of perfect calibration.

    Parameters
    ----------
    curves : by name, the bins of `metrics.calibration_bins`.
    errors : by name, the calibration error, shown in the legend.
    """
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    for (name, bins), colour in zip(curves.items(), (BASE, CORRECTED), strict=True):
        axes.plot(
            [entry["confidence"] for entry in bins],
            [entry["accuracy"] for entry in bins],
            marker="o",
            markersize=4,
            color=colour,
            label=f"{name}: calibration error {100 * errors[name]:.1f} %",
        )
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    _plain(axes)
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
            axes.set_title(caption, fontsize=8.5 if place == 0 else 8, loc="center")
    return figure


def as_svg(figure: Figure) -> str:
    """The figure as an SVG element for an HTML page, the same bytes each time."""
    from matplotlib import rc_context

    stream = io.StringIO()
    with rc_context({"svg.hashsalt": "residual-memory"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _plain(axes: "Axes | Any") -> None:
    axes.spines[["top", "right"]].set_visible(False)
