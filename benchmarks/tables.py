"""What a memory costs for scikit-learn: fitting and predicting over the base alone, and a fit on a million rows."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from sklearn.base import clone
from sklearn.datasets import make_friedman1
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.core import Row, in_turns, row_of
from experiments.results_file import stamped
from residual_memory.models.sklearn import ResMemRegressor

RESULTS = Path(__file__).parent / "results" / "tables.json"
ROWS, QUERIES = 20_000, 5_000
MILLION, COLUMNS = 1_000_000, 20
LIMIT = 24 * 2**30


def run() -> None:
    """Measure everything, write the result file and print it."""
    network = make_pipeline(
        StandardScaler(), MLPRegressor(hidden_layer_sizes=(128, 64), early_stopping=True, random_state=0)
    )
    rows = [
        *costs("boosting", HistGradientBoostingRegressor(max_iter=300, random_state=0)),
        *costs("mlp", network),
        million(),
    ]
    content = {**stamped("tables", "make bench", "make_friedman1 of scikit-learn, 10 or 20 columns"), "rows": rows}
    RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    for row in rows:
        print(f"{row['setting']}: {row['ratio']:.3f} of {row['against']}")


def costs(name: str, base: Any) -> list[Row]:
    """Fitting with everything chosen, with plain keys alone, and predicting: each over the base alone."""
    X, y = make_friedman1(ROWS + QUERIES, n_features=10, noise=0.5, random_state=0)
    train, labels, queries = X[:ROWS], y[:ROWS], X[ROWS:]
    fitted, plain = ResMemRegressor(base).fit(train, labels), clone(base).fit(train, labels)
    quick = ResMemRegressor(base, embed="input", metric=None, kernel="exponential")
    size = f"{ROWS:,} x 10"
    pairs = {
        f"fit, all chosen, {name}, {size}": (lambda: clone(fitted).fit(train, labels), "base fit", 1),
        f"fit, scaled columns alone, {name}, {size}": (lambda: quick.fit(train, labels), "base fit", 1),
        f"predict, {name}, {QUERIES:,} rows": (lambda: fitted.predict(queries), "base predict", 7),
    }
    rows = []
    for setting, (ours, against, turns) in pairs.items():
        theirs = (lambda: plain.predict(queries)) if turns > 1 else (lambda: clone(base).fit(train, labels))
        own, other = in_turns(ours, theirs, turns)
        row = row_of(setting, against, 0.0, own, other)
        del row["goal"]  # none was set
        rows.append(row)
    return rows


def million() -> Row:
    """Peak memory and time of a fit on a million rows, in a process of its own."""
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.tables_peak"], check=True, capture_output=True, text=True
    )
    measured = json.loads(answer.stdout.splitlines()[-1])
    setting = f"peak memory of a fit, {MILLION:,} x {COLUMNS}, boosting"
    row = row_of(setting, "24 GiB", 1.0, measured.pop("peak_bytes"), LIMIT)
    return row | {"unit": "bytes"} | measured
