"""`resmem doctor`: what is installed, and whether a memory is safe on the user's own disk."""

import errno
import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from residual_memory._version import __version__
from residual_memory.cli.options import Json
from residual_memory.cli.output import facts, report, table
from residual_memory.display import size_text
from residual_memory.errors import DataNotFound
from residual_memory.memory import Memory
from residual_memory.memory.storage import Directory
from residual_memory.progress import progress_bar
from residual_memory.selftest.forging import damages, fuzz
from residual_memory.selftest.kills import OPERATIONS, kills
from residual_memory.selftest.power import power_losses
from residual_memory.selftest.readers import readers
from residual_memory.selftest.refusals import refusals

EXTRAS: dict[str, tuple[str, ...]] = {
    "torch": ("torch", "safetensors"),
    "faiss": ("faiss-cpu",),
    "report": ("jinja2", "matplotlib", "pillow", "pyarrow"),
    "sklearn": ("scikit-learn", "pandas"),
    "transformers": ("transformers",),
    "scann": ("scann",),
    "ray": ("ray",),
    "serve": ("fastapi", "uvicorn"),
}
_ALWAYS = ("numpy", "scipy", "jaxtyping", "typer")
_KILLS, _STATES, _DAMAGED, _FORGED, _SECONDS = 10, 6, 5, 5_000, 2.0
_SPEED_ROWS, _SPEED_DIM = 20_000, 256

Check = tuple[str, int, int, str]  # what was done, how often, what was wrong, and what else there is to say


def doctor(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="On the disk to try; by default the working directory."),
    ] = None,
    only_versions: Annotated[
        bool, typer.Option("--only-versions", help="Leave the trials of the disk out, which take about a minute.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what is installed, and try whether a memory survives kills, power losses, flipped bytes and a full disk here.

    The trials write to a folder of their own, which is removed. Exits with 1 where something is wrong.
    """
    folder = Path.cwd() if path is None else path
    if not folder.is_dir():
        raise DataNotFound(f"there is no folder {folder}; name one on the disk that the memory will be on")
    environment, packages = _environment(folder), _packages()
    checks: list[Check] = []
    speed: dict[str, float] = {}
    if not only_versions:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".resmem-doctor-") as home:
            checks, speed = _checks(Path(home)), _speed(Path(home) / "speed")
    wrong = sum(check[2] for check in checks)
    result = {
        "environment": environment,
        "packages": packages,
        "checks": [dict(zip(("what", "trials", "wrong", "note"), check, strict=True)) for check in checks],
        "speed": speed,
        "ok": not wrong,
    }
    lines: list[Any] = [facts(list(environment.items())), _package_table(packages)]
    if checks:
        rows = [(what, f"{trials:,}", f"{bad:,}", note) for what, trials, bad, note in checks]
        lines += [table(("trial", "times", "wrong", ""), rows, numbers=("times", "wrong")), facts(_speed_lines(speed))]
        lines.append("all is well" if not wrong else f"{wrong:,} trials went wrong: do not keep a memory on this disk")
    report(result, *lines, as_json=as_json)
    if wrong:
        raise typer.Exit(1)


def _environment(folder: Path) -> dict[str, Any]:
    usage = shutil.disk_usage(folder)
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "residual-memory": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processors": len(os.sched_getaffinity(0)),
        "memory": size_text(pages * page),
        "disk": f"{size_text(usage.free)} free of {size_text(usage.total)}",
    }


def _packages() -> list[dict[str, str | None]]:
    """Each package of each extra, and the version that is installed; None where it is not."""
    found = []
    for extra, names in {"": _ALWAYS, **EXTRAS}.items():
        for name in names:
            try:
                version: str | None = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                version = None
            found.append({"extra": extra, "package": name, "version": version})
    return found


def _package_table(packages: list[dict[str, str | None]]) -> Any:
    rows = []
    for entry in packages:
        remedy = "" if entry["version"] else f"pip install 'residual-memory[{entry['extra']}]'"
        rows.append((entry["package"], entry["version"] or "–", entry["extra"] or "always", remedy))
    return table(("package", "version", "extra", ""), rows)


def _checks(home: Path) -> list[Check]:
    trials: list[Callable[[], Check]] = [
        *(lambda operation=operation: _kill(home, operation) for operation in OPERATIONS),
        lambda: _interrupt(home),
        _power,
        lambda: _refuse(home),
        lambda: _damage(home),
        _forge,
        lambda: _read(home),
    ]
    checks = []
    with progress_bar("trying the disk", len(trials)) as advance:
        for trial in trials:
            checks.append(trial())
            advance(1)
    return checks


def _kill(home: Path, operation: str) -> Check:
    found = kills(home / f"kill-{operation}", operation, _KILLS)
    note = f"{found.under_way} of them in the middle of a change"
    return f"killed during {operation}", found.trials, len(found.violations), note


def _interrupt(home: Path) -> Check:
    found = kills(home / "interrupt", "append", _KILLS, interrupt=True)
    return "Ctrl-C during append", found.trials, len(found.violations), f"{found.under_way} of them in the middle"


def _power() -> Check:
    found = power_losses(most=_STATES)
    return "power lost (simulated)", found.states, len(found.violations), "any part of what was not synced is lost"


def _refuse(home: Path) -> Check:
    full, broken = (refusals(home / f"refused-{error}", error=error) for error in (errno.ENOSPC, errno.EIO))
    violations = len(full.violations) + len(broken.violations)
    return "disk full or broken (simulated)", full.trials + broken.trials, violations, "each call refused in turn"


def _damage(home: Path) -> Check:
    found = damages(home / "damaged", every=_DAMAGED)
    return "byte flipped, file cut", found.trials, len(found.violations), f"{found.undetected} undetected"


def _forge() -> Check:
    found = fuzz(_FORGED)
    return (
        "file forged",
        found.manifests + found.segments,
        len(found.violations),
        "read, or refused with a word",
    )


def _read(home: Path) -> Check:
    found = readers(home / "readers", n_readers=4, seconds=_SECONDS)
    note = f"by {found.readers} readers beside a writer"
    return "whole memory read", found.reads, len(found.violations), note


def _speed(home: Path) -> dict[str, float]:
    """How fast rows become durable here, and are read and checked."""
    random = np.random.default_rng(0)
    keys = random.normal(size=(_SPEED_ROWS, _SPEED_DIM)).astype(np.float16)
    labels, said = np.zeros(_SPEED_ROWS, int), np.full((_SPEED_ROWS, 2), 0.5)
    with Memory.create(home, dim=_SPEED_DIM, n_outputs=2, key_dtype="float16") as memory:
        started = time.perf_counter()
        memory.append(keys, labels, said)
        bulk = time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(20):
            memory.append(keys[:1], labels[:1], said[:1])
        single = (time.perf_counter() - started) / 20
        started = time.perf_counter()
        Directory(home).check_all(memory.snapshot.manifest.files())
        checked = time.perf_counter() - started
        size = memory.n_bytes
    return {
        "append_bytes_per_second": size / bulk,
        "single_append_seconds": single,
        "verify_bytes_per_second": size / checked,
    }


def _speed_lines(speed: dict[str, float]) -> list[tuple[str, object]]:
    return [
        ("durable append", f"{size_text(speed['append_bytes_per_second'])} a second"),
        ("one row", f"{1000 * speed['single_append_seconds']:.1f} ms until it is durable"),
        ("verify", f"{size_text(speed['verify_bytes_per_second'])} a second"),
    ]
