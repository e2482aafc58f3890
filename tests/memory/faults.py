"""A disk that refuses one call, and remembers the order of all."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from residual_memory.memory import format as file_format
from residual_memory.memory import storage

WATCHED = ("open", "fsync", "replace", "write", "ftruncate", "scandir")


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
        def reach(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, _target(args[0])))
            if len(self.calls) - 1 == self._fails_at:
                raise OSError(self._error, os.strerror(self._error))
            return call(*args, **kwargs)

        return reach

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


class _System:
    """The module `os`, with the watched calls in between."""

    def __init__(self, disk: Disk) -> None:
        for name in WATCHED:
            setattr(self, name, disk.watched(name, getattr(os, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


@contextmanager
def watching(disk: Disk) -> Iterator[Disk]:
    """All input and output of memories goes through `disk` inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "os", _System(disk))
        patch.setattr(storage, "_write_all", disk.watched("write", storage._write_all))
        patch.setattr(np, "memmap", disk.watched("map", np.memmap))
        for module in (storage, file_format):
            patch.setattr(module, "open", disk.watched("open", open), raising=False)
        yield disk


def _target(first: Any) -> str:
    descriptor = first if isinstance(first, int) else first.fileno() if hasattr(first, "fileno") else None
    return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}") if descriptor is not None else os.fspath(first))
