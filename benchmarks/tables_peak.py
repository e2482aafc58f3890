"""A fit on a million rows, and what it needed: run by `benchmarks.tables` in a process of its own."""

import json
import resource
import time

from sklearn.base import clone
from sklearn.datasets import make_friedman1
from sklearn.ensemble import HistGradientBoostingRegressor

from benchmarks.tables import COLUMNS, MILLION
from residual_memory.models.sklearn import ResMemRegressor

QUERIES = 2_000


def main() -> None:
    """Print seconds and peak bytes as JSON."""
    X, y = make_friedman1(MILLION + QUERIES, n_features=COLUMNS, noise=0.5, random_state=0)
    base = HistGradientBoostingRegressor(random_state=0)
    start = time.perf_counter()
    clone(base).fit(X[:MILLION], y[:MILLION])
    alone = time.perf_counter() - start
    start = time.perf_counter()
    model = ResMemRegressor(base).fit(X[:MILLION], y[:MILLION])
    fit = time.perf_counter() - start
    start = time.perf_counter()
    model.predict(X[MILLION:])
    predict = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {"peak_bytes": peak, "base_fit_seconds": alone, "fit_seconds": fit}
    print(json.dumps({**figures, "queries_per_second": QUERIES / predict, "verdict": model.verdict_}))


if __name__ == "__main__":
    main()
