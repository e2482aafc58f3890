"""The recipe of the theory: it resumes, its slice leaves the results alone, and the results show what they must."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import linear_regression as recipe
from experiments.linear_regression import CONSTANT, NAME, WHOLE, Grid, figure, measure, tables
from experiments.results_file import RESULTS, ResultFile, Row
from residual_memory import theory
from residual_memory.theory import bound_terms

SMALL = Grid(dimensions=(2,), radii=(0.5,), sizes=(50, 200), n_repeats=4, n_test=100)


def committed() -> list[Row]:
    return json.loads((RESULTS / f"{NAME}.json").read_text())["rows"]


def risk_rows() -> list[Row]:
    return [row for row in committed() if row["metric"] == "risk"]


def results_in(folder: Path) -> ResultFile:
    return ResultFile(NAME, "command", "data", folder=folder)


def test_rows_that_the_file_holds_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(results_in(tmp_path), SMALL)
    written = (tmp_path / f"{NAME}.json").read_text()

    def fail(*arguments: object, **options: object) -> theory.Risks:
        raise AssertionError("measured again")

    monkeypatch.setattr(recipe, "risks", fail)
    measure(results_in(tmp_path), SMALL)
    assert (tmp_path / f"{NAME}.json").read_text() == written


def test_rows_are_means_over_draws_and_the_ratio_is_paired_by_draw(tmp_path: Path) -> None:
    results = results_in(tmp_path)
    measure(results, SMALL)
    row = results.rows[0]
    draws = [theory.risks(50, 2, 0.5, seed=seed, n_test=100) for seed in range(4)]
    assert row["resmem_risk"] == pytest.approx(np.mean([draw.resmem for draw in draws]), rel=1e-12)
    assert row["ratio"] == pytest.approx(np.mean([draw.resmem / draw.labels for draw in draws]), rel=1e-12)
    assert [row["setting"] for row in results.rows] == [
        "d=2 L=0.5 n=50",
        "d=2 L=0.5 n=200",
        "d=2 L=0.5 slope",
        CONSTANT,
    ]


def test_the_quick_slice_runs_and_leaves_the_results_alone(capsys: pytest.CaptureFixture[str]) -> None:
    files = (RESULTS / f"{NAME}.json", recipe.PICTURE)
    before = [file.read_bytes() for file in files]
    recipe.run(quick=True, fresh=False)
    assert "d=10 L=0.8 slope" in capsys.readouterr().out
    assert [file.read_bytes() for file in files] == before


def test_the_tables_fit_a_terminal_of_100_columns() -> None:
    lines = tables(committed()).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) == len(committed()) - 1 + 7


def test_the_picture_shows_the_rows_and_nothing_else() -> None:
    drawn = figure(committed())
    panels = [axes for axes in drawn.axes if axes.lines]
    assert len(panels) == len(WHOLE.dimensions) * len(WHOLE.radii)
    row = next(row for row in risk_rows() if (row["d"], row["L"], row["n"]) == (2, 0.5, 100))
    starts = [line.get_ydata()[0] for line in panels[0].lines]  # type: ignore[index]
    constant = committed()[-1]["constant"]
    wanted = [row["base_risk"], row["label_risk"], row["resmem_risk"], row["leading_risk"], constant * row["bound"], 1]
    assert starts == pytest.approx(wanted)


def test_the_committed_results_hold_the_whole_grid() -> None:
    assert {(row["n"], row["d"], row["L"]) for row in risk_rows()} == {
        (n, d, radius) for n in WHOLE.sizes for d in WHOLE.dimensions for radius in WHOLE.radii
    }
    assert all(row["n_repeats"] == WHOLE.n_repeats for row in risk_rows())


def test_the_committed_base_risk_stays_at_one_minus_l_squared() -> None:
    for row in risk_rows():
        if row["n"] >= 10_000:
            assert row["base_risk"] == pytest.approx((1 - row["L"]) ** 2, rel=0.05)


def test_the_committed_ratio_to_label_memorization_is_one_minus_l_squared() -> None:
    for row in risk_rows():
        assert row["resmem_risk"] < row["label_risk"]
        if row["n"] >= 10_000:
            assert row["ratio"] == pytest.approx((1 - row["L"]) ** 2, rel=0.03)


def test_the_committed_slopes_are_about_minus_two_over_d_and_steeper_than_the_second_term() -> None:
    slopes = [row for row in committed() if row["metric"] == "slope"]
    assert len(slopes) == 8
    for row in slopes:
        assert row["slope_last_decade"] == pytest.approx(-2 / row["d"], rel=0.15)
        assert row["slope_low"] <= row["slope"] <= row["slope_high"] < -1 / row["d"]
        assert row["theorem_exponents"] == pytest.approx([-2 / 3, -1 / row["d"]])
        assert row["base_slope"] == pytest.approx(0, abs=0.02)


def test_the_committed_bound_is_the_theorems_and_holds_with_its_constant() -> None:
    constant = committed()[-1]
    assert constant["setting"] == CONSTANT
    for row in risk_rows():
        assert (row["bound_first"], row["bound_second"]) == bound_terms(row["n"], row["d"], row["L"])
        assert row["resmem_risk"] <= constant["constant"] * row["bound"] * (1 + 1e-12)
        if row["d"] == 10:
            assert row["bound"] > 1
