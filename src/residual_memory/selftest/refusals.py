"""A disk that refuses one call, whichever: full, or broken."""

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from residual_memory.errors import ResidualMemoryError, StorageFailure
from residual_memory.memory import Memory
from residual_memory.memory.storage import Directory, Disk
from residual_memory.selftest.workload import add, create, state_of

_CHANGES: dict[str, Callable[[Memory], object]] = {
    "append": lambda memory: add(memory, range(100, 106)),
    "forget": lambda memory: memory.forget([0, 3]),
    "compact": Memory.compact,
    "setting": lambda memory: memory.save_setting({"number": 1}),
}


class RefusingDisk(Disk):
    """Counts its calls from `arm` on, and refuses one of them."""

    def __init__(self, error: int = errno.ENOSPC) -> None:
        self.n_calls = 0
        self._armed, self._refused, self._error = False, -1, error

    def arm(self, refused: int | None) -> None:
        """Count from now on, and refuse the call of this number; None refuses none."""
        self._armed, self._refused = True, -1 if refused is None else refused

    def disarm(self) -> None:
        """Do everything again, uncounted."""
        self._armed = False

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.startswith("_") or name not in vars(Disk):
            return value

        def reach(*arguments: Any, **options: Any) -> Any:
            if self._armed:
                self.n_calls += 1
                if self.n_calls - 1 == self._refused:
                    raise OSError(self._error, os.strerror(self._error))
            return value(*arguments, **options)

        return reach


@dataclass(frozen=True)
class RefusalReport:
    """What refusals did.

    Attributes
    ----------
    trials : calls that were refused, one at a time.
    refused : changes that were not made then; the others did without the call.
    violations : what was wrong afterwards; none where all is well.
    """

    trials: int
    refused: int
    violations: tuple[str, ...]


def refusals(folder: Path, *, error: int = errno.ENOSPC) -> RefusalReport:
    """Refuse each call of each change in turn: the change is made whole, or not at all, and can be made again."""
    home = folder / "home"
    with create(str(home)) as memory:
        add(memory, range(12))
        add(memory, range(12, 15))
        memory.forget([5, 13])
    trials = refused = 0
    violations: list[str] = []
    for name, change in _CHANGES.items():
        for place in range(_calls_of(home, folder / "trial", change)):
            trials += 1
            try:
                refused += _refuse(home, folder / "trial", change, place, error)
            except (ResidualMemoryError, AssertionError) as wrong:
                violations.append(f"{name}, call {place} refused: {type(wrong).__name__}: {wrong}")
    return RefusalReport(trials, refused, tuple(violations))


def _calls_of(home: Path, copy: Path, change: Callable[[Memory], object]) -> int:
    disk = RefusingDisk()
    with _copied(home, copy, disk) as memory:
        disk.arm(None)
        change(memory)
    return disk.n_calls


def _refuse(home: Path, copy: Path, change: Callable[[Memory], object], place: int, error: int) -> bool:
    """Whether the change was refused.

    Raises
    ------
    AssertionError : if the memory is not as it was, or as it should be.
    """
    disk = RefusingDisk(error)
    with _copied(home, copy, disk) as memory:
        version = memory.version
        disk.arm(place)
        refused = False
        try:
            change(memory)
        except StorageFailure:
            refused = True
        disk.disarm()
        reader = Memory.open(copy, verify=True)
        if (state_of(reader), reader.version) != (state_of(memory), memory.version):
            raise AssertionError("the handle and the disk disagree")
        if not refused and memory.version == version:
            raise AssertionError("nothing was said, and nothing done")
        if memory.version == version:
            change(memory)
        made = state_of(memory)
    if made != state_of(Memory.open(copy, verify=True)):
        raise AssertionError("what was made is not what is there")
    return refused


def _copied(home: Path, copy: Path, disk: Disk) -> Memory:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(home, copy)
    return Memory.open(Directory(copy, disk), writable=True)
