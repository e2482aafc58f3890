"""Result files: one JSON object a recipe, written row by row, so that an interrupted run goes on where it was."""

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from residual_memory.cli.output import plain

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


class ResultFile:
    """The rows of one recipe, keyed by setting and seed.

    Parameters
    ----------
    name : of the recipe, and of its file.
    command : that makes it.
    data : what was measured, on which split.
    fresh : forget what an earlier run wrote.
    """

    def __init__(self, name: str, command: str, data: str, *, folder: Path = RESULTS, fresh: bool = False) -> None:
        self.path = folder / f"{name}.json"
        self._name, self._command, self._data = name, command, data
        self.rows: list[Row] = []
        if self.path.exists() and not fresh:
            self.rows = json.loads(self.path.read_text())["rows"]

    def holds(self, setting: str, seed: int) -> bool:
        """Whether this row was measured already."""
        return any((row["setting"], row["seed"]) == (setting, seed) for row in self.rows)

    def row(self, setting: str, seed: int, measure: Callable[[], Row]) -> Row:
        """The row of this setting and seed, measured unless the file has it already."""
        for row in self.rows:
            if (row["setting"], row["seed"]) == (setting, seed):
                return row
        measured = {"setting": setting, "seed": seed, "commit": _commit(), **measure()}
        self.rows.append(measured)
        self._write()
        return measured

    def change(self, setting: str, seed: int, **more: Any) -> None:
        """Add figures to a row that is there."""
        next(row for row in self.rows if (row["setting"], row["seed"]) == (setting, seed)).update(more)
        self._write()

    def table(self) -> str:
        """The rows for a terminal, in per cent."""
        lines = [f"{'setting':<44}{'seed':>5}{'base':>8}{'memory':>8}{'corrected':>10}{'gain (95 %)':>24}"]
        for row in self.rows:
            figures = [
                f"{100 * row[name]:.2f}" if name in row else "–" for name in ("base", "memory_only", "corrected")
            ]
            gain, low, high = (
                "–" if row[name] is None else f"{100 * row[name]:+.2f}" for name in ("gain", "gain_low", "gain_high")
            )
            interval = f"{gain} [{low}, {high}]"
            lines.append(
                f"{row['setting']:<44}{row['seed']:>5}{figures[0]:>8}{figures[1]:>8}{figures[2]:>10}{interval:>24}"
            )
        return "\n".join(lines)

    def _write(self) -> None:
        head = stamped(self._name, self._command, self._data)
        content = json.dumps(plain({**head, "rows": self.rows}), indent=1, ensure_ascii=False, allow_nan=False)
        part = self.path.with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(content + "\n")
        os.replace(part, self.path)


def stamped(name: str, command: str, data: str) -> Row:
    """The head of a result file: what was run, on what, when and where."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "name": name,
        "command": command,
        "commit": _commit(),
        "machine": _machine(),
        "data": data,
        "created": created,
    }


def _commit() -> str:
    answer = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


def _machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
