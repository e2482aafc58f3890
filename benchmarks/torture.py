"""The store under torture, in the long form: `make torture`. An interrupted run goes on where it was."""

import errno
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from experiments.results_file import ResultFile
from residual_memory.selftest.forging import damages, fuzz
from residual_memory.selftest.kills import OPERATIONS, kills
from residual_memory.selftest.power import power_losses
from residual_memory.selftest.readers import readers
from residual_memory.selftest.refusals import refusals
from residual_memory.selftest.workload import folder_in_ram
from tests.memory.test_memory import AnySequence

RESULTS = Path(__file__).parent / "results"
KILLS, INTERRUPTS = 2_000, 500
STATES, MOST = 20_000, 700
FORGED = 1_000_000
SECONDS, READERS = 600.0, 8
SEQUENCES, STEPS = 10_000, 12

Row = dict[str, Any]


def run() -> None:
    """Run what the result file lacks, and print a line for each row."""
    results = ResultFile("torture", "make torture", "rows that follow from their ids", folder=RESULTS)
    for setting, trial in trials().items():
        row = results.row(setting, 0, trial)
        figures = ", ".join(f"{name} {value:,}" for name, value in row.items() if type(value) is int and name != "seed")
        print(f"{setting}: {figures}, violations {len(row['violations'])}", flush=True)
    if any(row["violations"] for row in results.rows):
        raise SystemExit(1)


def trials() -> dict[str, Callable[[], Row]]:
    """What is done, by its name in the result file."""
    named: dict[str, Callable[[], Row]] = {}
    for operation in OPERATIONS:
        named[f"kill -9 during {operation}"] = lambda operation=operation: _on_disk(  # type: ignore[misc]
            lambda folder: kills(folder, operation, KILLS)
        )
        named[f"Ctrl-C during {operation}"] = lambda operation=operation: _on_disk(  # type: ignore[misc]
            lambda folder: kills(folder, operation, INTERRUPTS, interrupt=True)
        )
    named["power lost"] = _power
    named["power lost with one sync or rename left out"] = _mutations
    for error in (errno.ENOSPC, errno.EIO):
        named[f"each call refused, {errno.errorcode[error]}"] = lambda error=error: _on_disk(  # type: ignore[misc]
            lambda folder: refusals(folder, error=error)
        )
    named["every byte flipped, every cut"] = _damages
    named["forged manifests and segments"] = lambda: asdict(fuzz(FORGED))
    named["readers beside a writer"] = lambda: _on_disk(
        lambda folder: readers(folder, n_readers=READERS, seconds=SECONDS)
    )
    named["sequences of changes against a dict"] = _sequences
    return named


def _on_disk(trial: Callable[[Path], Any]) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        return asdict(trial(Path(folder)))


def _power() -> Row:
    violations: list[str] = []
    states = runs = 0
    while states < STATES:
        found = power_losses(most=MOST, seed=runs)
        states, runs = states + found.states, runs + 1
        violations += found.violations
    return {"runs": runs, "states": states, "violations": violations}


def _mutations() -> Row:
    """A violation is a sync or rename that can be left out without harm."""
    sites = sorted(power_losses(most=1).sites)
    noticed = {" in ".join(site): power_losses(most=MOST, muted=site, stop_at=1) for site in sites}
    return {
        "sites": len(sites),
        "states_until_noticed": {name: found.states for name, found in noticed.items() if found.violations},
        "violations": [name for name, found in noticed.items() if not found.violations],
    }


def _damages() -> Row:
    with folder_in_ram() as folder:
        return asdict(damages(folder))


def _sequences() -> Row:
    with _temporary_files_in_ram():
        long = settings(
            max_examples=SEQUENCES, stateful_step_count=STEPS, deadline=None, suppress_health_check=list(HealthCheck)
        )
        try:
            run_state_machine_as_test(AnySequence, settings=long)
        except Exception as error:
            return {"sequences": SEQUENCES, "violations": [f"{type(error).__name__}: {error}"]}
    return {"sequences": SEQUENCES, "steps": STEPS, "violations": []}


@contextmanager
def _temporary_files_in_ram() -> Iterator[None]:
    before = tempfile.tempdir
    with folder_in_ram() as folder:
        tempfile.tempdir = str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = before


if __name__ == "__main__":
    run()
