"""Processes that are killed, or interrupted, while they change a memory: `python -m residual_memory.selftest.kills`.

One process forks a child for each trial, sends it the signal at a moment by chance, and then reads the memory: it holds
what the last acknowledged change left, or what the change under way would leave.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from residual_memory.errors import ResidualMemoryError
from residual_memory.memory import Memory
from residual_memory.selftest.workload import State, Step, add, create, state_of, steps

OPERATIONS = ("build", "append", "forget", "compact")
LONGEST_WAIT = 0.03  # seconds before the signal; on a slow disk as long as it takes to make ten memories
LARGE_ENOUGH = 200  # rows that a trial begins with at least
_ROUNDS = {
    "build": ("append",) * 400,
    "append": ("append",) * 400,
    "forget": ("forget",) * 60,
    "compact": ("append", "forget", "compact") * 130,
}


@dataclass(frozen=True)
class KillReport:
    """What kills did.

    Attributes
    ----------
    operation : "build", "append", "forget" or "compact".
    signal : that was sent, "SIGKILL" or "SIGINT".
    trials : processes that were sent it.
    under_way : of them, those that were in the middle of a change.
    acknowledged : changes that were acknowledged before the signal.
    violations : what was wrong afterwards; none where all is well.
    """

    operation: str
    signal: str
    trials: int
    under_way: int
    acknowledged: int
    violations: tuple[str, ...]


def kills(folder: Path, operation: str, n_trials: int, *, seed: int = 0, interrupt: bool = False) -> KillReport:
    """Run trials in a process of their own.

    Raises
    ------
    AssertionError : if that process itself does not end well.
    """
    sent = "SIGINT" if interrupt else "SIGKILL"
    command = [sys.executable, "-m", __spec__.name, str(folder), operation, str(n_trials), str(seed), sent]
    alone = {name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(command, env={**os.environ, **alone}, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"the trials ended with {done.returncode}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    return KillReport(**{**found, "violations": tuple(found["violations"])})


# ---------------------------------------------------------------------- in the process of the trials


@dataclass
class _Log:
    """What the child did, in a file that survives it: "b" when a change begins, "d" when it is acknowledged."""

    path: Path

    def __post_init__(self) -> None:
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)

    def write(self, mark: bytes) -> None:
        os.write(self._file, mark)

    def counts(self) -> tuple[int, int]:
        """Changes that began, and that were acknowledged."""
        content = self.path.read_bytes()
        os.close(self._file)
        return content.count(b"b"), content.count(b"d")


def _trials(folder: Path, operation: str, n_trials: int, seed: int, sent: signal.Signals) -> KillReport:
    random = np.random.default_rng([seed, OPERATIONS.index(operation)])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "memory"
    longest = max(LONGEST_WAIT, 10 * _seconds_of_making(folder / "first"))
    violations: list[str] = []
    under_way = acknowledged = 0
    for number in range(n_trials):
        if operation == "build":
            path = folder / f"memory-{number}"
        held = frozenset[int]() if operation == "build" else _ready(path)
        made = list(steps(_ROUNDS[operation], held, seed=seed * n_trials + number))
        log = _Log(folder / "log")
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        started = os.fork()
        if not started:
            _work(path, operation, made, log)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        time.sleep(float(random.uniform(0, longest)))
        os.kill(started, sent)
        _, status = os.waitpid(started, 0)
        begun, done = log.counts()
        under_way, acknowledged = under_way + (begun > done), acknowledged + done
        wrong = _judge(path, made, held, operation == "build", begun, done, status, sent)
        if wrong is not None:
            violations.append(f"trial {number}, {done} of {begun} changes acknowledged: {wrong}")
    return KillReport(operation, sent.name, n_trials, under_way, acknowledged, tuple(violations))


def _seconds_of_making(path: Path) -> float:
    started = time.perf_counter()
    create(str(path)).close()
    return time.perf_counter() - started


def _ready(path: Path) -> State:
    """What the memory holds, after making and filling it where it has become small."""
    with Memory.open(path, writable=True) if path.exists() else create(str(path)) as memory:
        held = state_of(memory)
        if len(held) < LARGE_ENOUGH:
            first = max(held, default=-1) + 1
            add(memory, range(first, first + 2 * LARGE_ENOUGH))
        elif len(held) > 20 * LARGE_ENOUGH:
            memory.forget(sorted(held)[LARGE_ENOUGH:])
            memory.compact()
        return state_of(memory)


def _work(path: Path, operation: str, made: list[Step], log: _Log) -> None:
    """The child: changes until the signal comes. An interrupted one goes on with the same handle."""
    code, memory = 1, None
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        with _change(log):
            memory = create(str(path)) if operation == "build" else Memory.open(path, writable=True)
        for step in made:
            with _change(log):
                step.apply(memory)
        code = 0
    except KeyboardInterrupt:
        code = 0 if memory is None else _goes_on(memory, path)
    finally:
        os._exit(code)


def _goes_on(memory: Memory, path: Path) -> int:
    """Whether a handle can be used after an interrupt, as an exit code."""
    found = state_of(memory)
    memory.save_setting({"after": "the interrupt"})
    return 0 if state_of(Memory.open(path, verify=True)) == found else 2


@contextmanager
def _change(log: _Log) -> Iterator[None]:
    log.write(b"b")
    yield
    log.write(b"d")


def _judge(
    path: Path, made: list[Step], held: State, building: bool, begun: int, done: int, status: int, sent: signal.Signals
) -> str | None:
    """What is wrong with the memory after a trial; the first change of each child is to create or open it."""
    if sent is signal.SIGINT and os.waitstatus_to_exitcode(status):
        return f"the interrupted process ended with {os.waitstatus_to_exitcode(status)}"
    if building and not done and not (path / "manifest.json").exists():
        return None

    def after(n: int) -> State:
        return made[n - 2].after if n > 1 else held

    try:
        found = state_of(Memory.open(path, verify=True))
        if found not in (after(done), after(begun)):
            return f"it holds {len(found)} rows, expected {len(after(done))} or {len(after(begun))}"
        with Memory.open(path, writable=True) as memory:
            if state_of(memory) != found:
                return "the next writer sees something else"
    except (ResidualMemoryError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _main() -> None:
    parser = argparse.ArgumentParser()
    kinds: dict[str, Callable[[str], object]] = {"folder": Path, "operation": str, "n_trials": int, "seed": int}
    for name, kind in kinds.items():
        parser.add_argument(name, type=kind)
    parser.add_argument("sent", type=lambda name: signal.Signals[name])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    print(json.dumps(asdict(_trials(**vars(parser.parse_args())))))


if __name__ == "__main__":
    _main()
