"""A disk that refuses one call, and remembers the order of all."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from residual_memory.memory.storage import Disk as SystemDisk

WATCHED = (
    "names",
    "make_folder",
    "create",
    "grow",
    "write",
    "sync",
    "rename",
    "link",
    "sync_folder",
    "remove",
    "open",
    "map",
    "lock",
)


class Disk:
    """Counts the calls that reach the disk; the one at place `fails_at` raises `error`.

    Attributes
    ----------
    calls : name and file (or directory) of each call, in order.
    """

    def __init__(self, fails_at: int | None = None, error: int = errno.ENOSPC) -> None:
        self.calls: list[tuple[str, str]] = []
        self._fails_at, self._error = fails_at, error

    def watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def reach(disk: SystemDisk, first: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, first.name if isinstance(first, Path) else os.path.basename(first.name)))
            if len(self.calls) - 1 == self._fails_at:
                raise OSError(self._error, os.strerror(self._error))
            return call(disk, first, *args, **kwargs)

        return reach

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@contextmanager
def watching(disk: Disk) -> Iterator[Disk]:
    """All input and output of memories goes through `disk` inside."""
    with pytest.MonkeyPatch.context() as patch:
        for name in WATCHED:
            patch.setattr(SystemDisk, name, disk.watched(name, getattr(SystemDisk, name)))
        yield disk
