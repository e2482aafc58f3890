"""The paper's theory, measured: a linear base that is too small, its memory of one neighbour, and Theorem 5.3.

`residual_memory.theory` gives the setting, the theorem, and what it does and does not promise. Each row is one n, d and
L, over independent draws of training and test rows; then come a row of slopes for each d and L, and the bound's hidden
constant: the smallest one with which it holds at every n, d and L that was measured.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.results_file import RESULTS, ResultFile, Row
from residual_memory.metrics import Estimate
from residual_memory.progress import progress_bar
from residual_memory.theory import (
    FIRST_EXPONENT,
    bound_terms,
    fitted_constant,
    leading_risk,
    log_log_slope,
    repeated_mean,
    risks,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "linear-regression"
DATA = (
    "synthetic: x uniform in the ball of radius sqrt(d + 2), so that E xx^T = I; y = x·θ* without noise, ‖θ*‖ = 1; "
    "base: least squares with ‖θ‖ ≤ L; memory: the nearest training row; risk: mean squared error on new rows; "
    "intervals 95 %, Student's, over independent draws of training and test rows"
)
CONSTANT = "all d, L and n: constant"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / f"{NAME}.png"


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Attributes
    ----------
    dimensions, radii, sizes : d, L and n.
    n_repeats : independent draws of each.
    n_test : new rows in each draw.
    """

    dimensions: Sequence[int] = (2, 3, 5, 10)
    radii: Sequence[float] = (0.5, 0.8)
    sizes: Sequence[int] = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
    n_repeats: int = 20
    n_test: int = 4_000


WHOLE = Grid()
QUICK = Grid(dimensions=(2, 10), sizes=(100, 1_000, 10_000), n_repeats=4, n_test=1_000)


def run(*, quick: bool, fresh: bool) -> None:
    """Measure every row that the result file does not hold yet, draw the picture, and print the tables."""
    folder = Path(tempfile.mkdtemp()) if quick else RESULTS
    results = ResultFile(NAME, f"python -m experiments {NAME}", DATA, folder=folder, fresh=fresh)
    measure(results, QUICK if quick else WHOLE)
    if not quick:
        figure(results.rows).savefig(PICTURE, dpi=100)
    print(tables(results.rows))


def measure(results: ResultFile, grid: Grid) -> None:
    """All rows of a grid that are not there yet."""
    pairs = [(d, radius) for d in grid.dimensions for radius in grid.radii]
    everything = []
    with progress_bar("drawing", len(pairs) * len(grid.sizes) * grid.n_repeats) as advance:
        for d, radius in pairs:
            rows = []
            for n in grid.sizes:
                at_n = partial(_risk_row, n, d, radius, grid, advance)
                rows.append(results.row(f"d={d} L={radius} n={n}", 0, at_n))
            results.row(f"d={d} L={radius} slope", 0, partial(_slope_row, rows))
            everything += rows
    results.row(CONSTANT, 0, partial(_constant_row, everything))


def _risk_row(n: int, d: int, radius: float, grid: Grid, advance: Callable[[int], None]) -> Row:
    """The three risks, ResMem's over the labels' (paired by draw), and the bound beside them."""
    draws = []
    for seed in range(grid.n_repeats):
        draws.append(risks(n, d, radius, seed=seed, n_test=grid.n_test))
        advance(1)
    first, second = bound_terms(n, d, radius)
    return {
        "method": "resmem",
        "metric": "risk",
        "n": n,
        "d": d,
        "L": radius,
        **_fields("base_risk", repeated_mean([draw.base for draw in draws])),
        **_fields("resmem_risk", repeated_mean([draw.resmem for draw in draws])),
        **_fields("label_risk", repeated_mean([draw.labels for draw in draws])),
        **_fields("ratio", repeated_mean([draw.ratio for draw in draws])),
        "bound": first + second,
        "bound_first": first,
        "bound_second": second,
        "leading_risk": leading_risk(n, d, radius),
        "n_repeats": grid.n_repeats,
        "n_test": grid.n_test,
    }


def _slope_row(rows: Sequence[Row]) -> Row:
    """Exponents of n over all sizes and over the last decade, and the constant that this d and L need."""
    d, radius = rows[0]["d"], rows[0]["L"]
    last = [row for row in rows if row["n"] >= rows[-1]["n"] / 10]
    return {
        "method": "resmem",
        "metric": "slope",
        "d": d,
        "L": radius,
        **_fields("slope", _slope(rows, "resmem_risk")),
        **_fields("slope_last_decade", _slope(last, "resmem_risk")),
        **_fields("label_slope", _slope(rows, "label_risk")),
        **_fields("base_slope", _slope(rows, "base_risk")),
        "leading_exponent": -2 / d,
        "theorem_exponents": [FIRST_EXPONENT, -1 / d],
        "constant": _constant(rows),
    }


def _constant_row(rows: Sequence[Row]) -> Row:
    """The smallest constant with which the bound holds everywhere, and where it is needed."""
    constant = _constant(rows)
    tightest = max(rows, key=lambda row: row["resmem_risk"] / row["bound"])
    return {"method": "resmem", "metric": "constant", "constant": constant, "tight_at": tightest["setting"]}


def _constant(rows: Sequence[Row]) -> float:
    return fitted_constant([row["resmem_risk"] for row in rows], [row["bound"] for row in rows])


def _slope(rows: Sequence[Row], name: str) -> Estimate:
    return log_log_slope([row["n"] for row in rows], [_estimate(row, name) for row in rows])


def _fields(name: str, estimate: Estimate) -> Row:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _estimate(row: Row, name: str) -> Estimate:
    return Estimate(row[name], row[f"{name}_low"], row[f"{name}_high"])


def tables(rows: Sequence[Row]) -> str:
    """The rows for a terminal of 100 columns: risks beside the bound, then slopes beside the theorem's exponents."""
    constant = next(row for row in rows if row["setting"] == CONSTANT)
    lines = [
        "risk on new rows; base and ratio (resmem / labels) go to (1 - L)^2; ± is half a 95 % interval",
        f"{'setting':<20}{'base':>7}{'labels':>10}{'resmem':>10}{'±':>7}{'ratio':>8}{'±':>7}"
        f"{'first':>10}{'second':>10}{'C·bound':>10}",
    ]
    for row in _of(rows, "risk"):
        lines.append(
            f"{row['setting']:<20}{row['base_risk']:>7.4f}{row['label_risk']:>10.2e}{row['resmem_risk']:>10.2e}"
            f"{_estimate(row, 'resmem_risk').margin:>7.0e}{row['ratio']:>8.4f}{_estimate(row, 'ratio').margin:>7.0e}"
            f"{row['bound_first']:>10.2e}{row['bound_second']:>10.2e}{constant['constant'] * row['bound']:>10.2e}"
        )
    lines += [
        f"first, second: terms of Theorem 5.3; C = {constant['constant']:.3g}: its hidden constant, the smallest that",
        f"holds in every row, tight at {constant['tight_at']}",
        "",
        "exponent of n with its 95 % interval; theorem: those of its two terms; own C: for this d and L alone",
        f"{'setting':<18}{'resmem, all n':>24}{'last decade':>24}{'-2/d':>8}{'theorem':>15}{'own C':>8}",
    ]
    for row in _of(rows, "slope"):
        first, second = row["theorem_exponents"]
        lines.append(
            f"{row['setting']:<18}{_interval(row, 'slope'):>24}{_interval(row, 'slope_last_decade'):>24}"
            f"{row['leading_exponent']:>8.3f}{f'{first:.2f}, {second:.2f}':>15}{row['constant']:>8.4f}"
        )
    return "\n".join(lines)


def _interval(row: Row, name: str) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(row[name], row[f"{name}_low"], row[f"{name}_high"])


def _of(rows: Sequence[Row], metric: str) -> list[Row]:
    return [row for row in rows if row["metric"] == metric]


def figure(rows: Sequence[Row]) -> "Figure":
    """Risk against n, one panel a dimension and radius, from the rows of the result file alone."""
    from matplotlib.figure import Figure

    constant = next(row for row in rows if row["setting"] == CONSTANT)["constant"]
    measured = _of(rows, "risk")
    dimensions, radii = (sorted({row[name] for row in measured}) for name in ("d", "L"))
    drawn = Figure(figsize=(2.5 * len(dimensions) + 0.4, 2.5 * len(radii) + 0.9), layout="constrained")
    grid = drawn.subplots(len(radii), len(dimensions), sharex=True, sharey="row", squeeze=False)
    for line, radius in zip(grid, radii, strict=True):
        for axes, d in zip(line, dimensions, strict=True):
            _panel(axes, [row for row in measured if (row["d"], row["L"]) == (d, radius)], constant)
            axes.set_title(f"d = {d}, L = {radius}", fontsize=10)
        line[0].set_ylabel("risk")
    for axes in grid[-1]:
        axes.set_xlabel("training rows n")
    handles, labels = grid[0][0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return drawn


def _panel(axes: Any, rows: Sequence[Row], constant: float) -> None:
    from residual_memory.figures import BASE, CORRECTED, LOSS

    sizes = [row["n"] for row in rows]
    curves = (
        ("base_risk", BASE, "base: stays at (1 − L)²"),
        ("label_risk", LOSS, "labels of the nearest row"),
        ("resmem_risk", CORRECTED, "ResMem"),
    )
    for name, colour, label in curves:
        axes.plot(sizes, [row[name] for row in rows], color=colour, marker="o", markersize=3, label=label)
        low, high = ([row[f"{name}_{end}"] for row in rows] for end in ("low", "high"))
        axes.fill_between(sizes, low, high, color=colour, alpha=0.25, linewidth=0)
    leading = [row["leading_risk"] for row in rows]
    axes.plot(sizes, leading, color=CORRECTED, linewidth=1, linestyle=":", label="its leading term, ∝ n^(−2/d)")
    bound = [constant * row["bound"] for row in rows]
    axes.plot(sizes, bound, color="black", linewidth=1, linestyle="--", label=f"Theorem 5.3, constant {constant:.2g}")
    axes.axhline(1, color="black", linewidth=0.6, label="predicting 0")
    axes.set(xscale="log", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
