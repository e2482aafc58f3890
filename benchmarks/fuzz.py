"""Requests that nobody would send, in the long form: 0 failures of the server, and every answer as documented."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from experiments.results_file import ResultFile
from tests.server.fuzzing import app_of_arrays, app_of_text, fuzz

RESULTS = Path(__file__).parent / "results"
CASES, RUNS = 25, 5
APPS: dict[str, Callable[[], FastAPI]] = {"a memory of arrays": app_of_arrays, "a memory of text": app_of_text}

Row = dict[str, Any]


def run(*, quick: bool = False) -> None:
    """Run what the result file lacks, and print a line for each row.

    Parameters
    ----------
    quick : a slice, which is written nowhere.
    """
    if quick:
        for setting, made in APPS.items():
            print(f"{setting}: {tried(made, 0, 2)}", flush=True)
        return
    data = "drawn from the OpenAPI document by schemathesis, and valid requests with parts exchanged"
    results = ResultFile("fuzz", "python -m benchmarks fuzz", data, folder=RESULTS)
    for number in range(RUNS):
        for setting, made in APPS.items():
            row = results.row(setting, number, lambda made=made, number=number: tried(made, number, CASES))  # type: ignore[misc]
            print(f"{setting}, run {number}: {row['requests']:,} requests, {row['violations']}", flush=True)
    print(f"{sum(row['requests'] for row in results.rows):,} requests")
    if any(row["violations"] for row in results.rows):
        raise SystemExit(1)


def tried(made: Callable[[], FastAPI], number: int, n_cases: int) -> Row:
    """What became of one run, on a server of its own."""
    started = time.monotonic()
    violations: list[str] = []
    statuses: dict[str, int] = {}
    try:
        statuses = dict(sorted(fuzz(made(), n_cases, number).items()))
    except (AssertionError, BaseExceptionGroup) as error:
        violations.append(str(error)[:2000])
    requests = sum(statuses.values())
    return {"requests": requests, "statuses": statuses, "violations": violations, "seconds": time.monotonic() - started}
