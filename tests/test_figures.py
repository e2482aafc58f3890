"""Figures show what their tables say."""

import numpy as np
import pytest

from residual_memory.figures import as_svg, gain_by_class, gallery, reliability
from residual_memory.metrics import calibration_bins


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
    axes = reliability({"base": bins, "corrected": bins}, {"base": 0.1, "corrected": 0.05}).axes[0]
    assert len(axes.lines) == 3
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "base: calibration error 10.0 %",
        "corrected: calibration error 5.0 %",
    ]


def test_a_gallery_has_a_picture_for_each_image_and_the_svg_is_the_same_each_time() -> None:
    image = np.zeros((3, 8, 8), np.uint8)
    figure = gallery([[(image, "rose"), (image, "poppy")], [(image, "cup")]])
    assert [len(axes.images) for axes in figure.axes] == [1, 1, 1, 0]
    assert as_svg(figure) == as_svg(figure)
    assert as_svg(figure).startswith("<svg")
