"""Figures show what their tables say."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from residual_memory.errors import InvalidInput
from residual_memory.figures import (
    as_svg,
    gain_along,
    gain_by_class,
    gain_by_size,
    gallery,
    growth,
    reliability,
    risk_coverage,
)
from residual_memory.metrics import calibration_bins, gains_by
from residual_memory.metrics import risk_coverage as risk_coverage_of


def test_gain_by_class_shows_both_ends_in_points() -> None:
    names = [f"class_{i}" for i in range(40)]
    base, corrected = np.full(40, 0.5), np.linspace(0.4, 0.7, 40)
    axes = gain_by_class(names, base.tolist(), corrected.tolist(), shown=3).axes[0]
    widths = [patch.get_width() for patch in axes.patches]  # type: ignore[attr-defined]
    assert len(widths) == 6
    assert (min(widths), max(widths)) == pytest.approx((-10, 20))
    assert "class 0" in axes.get_yticklabels()[0].get_text()


def test_reliability_draws_one_curve_a_method_and_names_its_error() -> None:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), 200)
    bins = calibration_bins(probabilities, np.zeros(200, int))
    figure = reliability({"base": bins, "corrected": bins}, {"base": 0.1, "corrected": 0.05})
    assert len(figure.axes[0].lines) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "base: calibration error 10.0 %",
        "corrected: calibration error 5.0 %",
    ]


def test_names_are_shown_as_they_are_in_figures() -> None:
    """Dollars are no formulas, and what would turn a line around or move a cursor is shown as what it is."""
    names = ["costs $\\frac{1}{", "red \x1b[31m", "\u202egnp", "x" * 4096, "שלום", 'a id="axes_1" #000000 </svg>']
    svg = as_svg(gain_by_class(names, [0.5] * 6, [0.6] * 6))
    shown = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {"costs $\\frac{1}{ (50 %)", "red \\x1b[31m (50 %)", "\\u202egnp (50 %)"} <= {
        " ".join(s.split()) for s in shown
    }
    assert "שלום" in svg
    assert 'a id="axes 1" #000000 &lt;/svg&gt;' in svg
    assert "x" * 37 not in svg


def test_an_svg_takes_its_ink_from_the_page_and_asks_for_nothing() -> None:
    svg = as_svg(gain_by_class(["a", "b"], [0.5, 0.5], [0.6, 0.4]))
    assert "currentColor" in svg
    assert "var(--corrected, #c2185b)" in svg
    assert "#000000" not in svg
    assert "#ffffff" not in svg
    assert not re.search(r'(src|href)="(?!#)', svg)
    assert "<metadata" not in svg
    assert len(set(re.findall(r' id="([^"]*)"', svg))) == svg.count(' id="')


def test_more_curves_than_colours_are_refused() -> None:
    with pytest.raises(InvalidInput, match="7 curves, expected at most 6"):
        risk_coverage({str(n): [{"coverage": 1.0, "risk": 0.5}] for n in range(7)})


ROWS = [
    {
        "setting": "a",
        "n": n,
        "gain": gain,
        "gain_low": gain - 0.01,
        "gain_high": gain + 0.01,
        "queries_per_second": 1e6 / n,
    }
    for n, gain in ((1000, 0.02), (100, 0.01), (10_000, 0.04))
]


def drawn(figure: Figure) -> Any:
    """The axes, of whose parts the types do not tell all."""
    return figure.axes[0]


def test_gain_by_size_draws_the_rows_in_order_with_their_intervals() -> None:
    axes = drawn(gain_by_size({"plain": ROWS}))
    x, y = axes.lines[0].get_data()
    assert (list(x), list(y)) == ([100, 1000, 10_000], [1, 2, 4])
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0, 5))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["100", "1,000", "10,000"]


def test_labels_of_sizes_that_lie_close_together_are_left_out() -> None:
    rows = [{**ROWS[0], "n": n} for n in (10_000, 45_000, 50_000)]
    labels = gain_by_size({"plain": rows}).axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == ["10,000", "50,000"]


def test_gain_along_draws_each_bin_with_its_interval() -> None:
    bins = gains_by(np.arange(80), np.tile([0.0, 1.0], 40), n_bins=4)
    axes = drawn(gain_along(bins, "distance"))
    assert list(axes.lines[0].get_ydata()) == [50] * 4
    low, high = axes.collections[0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((100 * bins[0]["gain_low"], 100 * bins[0]["gain_high"]))
    assert axes.get_xlabel() == "distance"


def test_risk_coverage_draws_its_points() -> None:
    points = risk_coverage_of([0.9, 0.8, 0.3, 0.1], [0.0, 0.0, 1.0, 1.0])
    x, y = drawn(risk_coverage({"base": points})).lines[0].get_data()
    assert list(x) == [25, 50, 75, 100]
    assert list(y) == pytest.approx([0, 0, 100 / 3, 50])


def test_growth_names_the_power_that_fits() -> None:
    figure = growth({"exact": ROWS}, "queries_per_second", at="n")
    x, y = drawn(figure).lines[0].get_data()
    assert (list(x), list(y)) == ([100, 1000, 10_000], [1e4, 1e3, 1e2])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["exact  (∝ size^-1.00)"]
    with pytest.raises(InvalidInput, match="0 has no place on a log axis"):
        growth({"exact": [{"n": 0, "queries_per_second": 1.0}]}, "queries_per_second", at="n")


def test_figures_can_be_saved_for_a_paper(tmp_path: Path) -> None:
    growth({"exact": ROWS}, "queries_per_second", at="n").savefig(tmp_path / "growth.pdf")
    assert (tmp_path / "growth.pdf").read_bytes().startswith(b"%PDF")


def test_a_gallery_has_a_picture_for_each_image_and_the_svg_is_the_same_each_time() -> None:
    image = np.zeros((3, 8, 8), np.uint8)
    figure = gallery([[(image, "rose"), (image, "poppy")], [(image, "cup")]])
    assert [len(axes.images) for axes in figure.axes] == [1, 1, 1, 0]
    assert as_svg(figure) == as_svg(figure)
    assert as_svg(figure).startswith("<svg")
