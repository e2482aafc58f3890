"""One writer and several readers, each a process: `python -m residual_memory.selftest.readers`.

The writer notes which rows each version holds before it commits it; a reader notes what it saw of which version. In
the end every version that was seen held just what the writer meant.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from residual_memory.memory import Memory
from residual_memory.selftest.workload import State, create, state_of, steps

_ROUND = ("append", "append", "forget", "append", "compact", "setting", "forget")


@dataclass(frozen=True)
class ReadersReport:
    """What readers saw.

    Attributes
    ----------
    readers, seconds : processes beside the writer, and for how long.
    versions : that the writer committed.
    reads : whole memories that were read and compared, row for row.
    seen : versions that some reader saw.
    violations : reads that were of no committed version; none where all is well.
    """

    readers: int
    seconds: float
    versions: int
    reads: int
    seen: int
    violations: tuple[str, ...]


def readers(folder: Path, *, n_readers: int = 8, seconds: float = 20.0) -> ReadersReport:
    """Run a writer and readers in processes of their own.

    Raises
    ------
    AssertionError : if the process that starts them does not end well.
    """
    command = [sys.executable, "-m", __spec__.name, str(folder), str(n_readers), str(seconds)]
    alone = {name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(command, env={**os.environ, **alone}, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"the readers ended with {done.returncode}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    errors = [done.stderr[-2000:]] if done.stderr else []
    return ReadersReport(**{**found, "violations": (*found["violations"], *errors)})


# ---------------------------------------------------------------------- in the process that starts them


def _run(folder: Path, n_readers: int, seconds: float) -> ReadersReport:
    folder.mkdir(parents=True, exist_ok=True)
    path, until = folder / "memory", time.monotonic() + seconds
    create(str(path)).close()
    jobs: list[Callable[[], None]] = [lambda: _write(path, folder / "written", until)]
    for number in range(n_readers):
        jobs.append(lambda number=number: _read(path, folder / f"read-{number}", until))  # type: ignore[misc]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in [_forked(job) for job in jobs]]
    meant = dict(_lines(folder / "written"))
    seen = [entry for number in range(n_readers) for entry in _lines(folder / f"read-{number}")]
    violations = [f"process {place} ended with {code}" for place, code in enumerate(codes) if code]
    violations += [
        f"version {version} was read as {what}"
        for version, what in seen
        if what != meant.get(version, _digest(State()))
    ]
    return ReadersReport(
        n_readers, seconds, len(meant), len(seen), len({version for version, _ in seen}), tuple(violations[:100])
    )


def _forked(job: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        job()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _write(path: Path, log: Path, until: float) -> None:
    number, held = 0, State()
    with Memory.open(path, writable=True) as memory, open(log, "w") as lines:
        while time.monotonic() < until:
            if len(held) > 3_000:
                memory.forget(sorted(held)[:2_500])
                held = state_of(memory)
                lines.write(f"{memory.version} {_digest(held)}\n")
            for step in steps(_ROUND, held, seed=number):
                print(memory.version + 1, _digest(step.after), file=lines, flush=True)
                step.apply(memory)
                held = step.after
            number += 1


def _read(path: Path, log: Path, until: float) -> None:
    random = np.random.default_rng(os.getpid())
    memory = Memory.open(path)
    with open(log, "w") as lines:
        while time.monotonic() < until:
            if random.random() < 0.1:
                memory = Memory.open(path)
            else:
                memory.refresh()
            print(memory.version, _digest(state_of(memory)), file=lines)


def _digest(held: State) -> str:
    return f"{len(held)}-{hash(tuple(sorted(held))) & 0xFFFFFFFF:08x}"  # of whole numbers: the same in every process


def _lines(log: Path) -> list[tuple[str, str]]:
    return [(version, what) for version, what in (line.split() for line in log.read_text().splitlines())]


def _main() -> None:
    parser = argparse.ArgumentParser()
    kinds: dict[str, Callable[[str], object]] = {"folder": Path, "n_readers": int, "seconds": float}
    for name, kind in kinds.items():
        parser.add_argument(name, type=kind)
    print(json.dumps(asdict(_run(**vars(parser.parse_args())))))


if __name__ == "__main__":
    _main()
