"""All input and output of a memory goes through one small class, so that a test can record, break and replay it.

A write is durable in this order and no other: write the file → fsync the file → (rename) → fsync the directory. The
manifest names what exists; a file that it does not name is a leftover, ignored by readers and swept by the next writer.
"""

import errno
import fcntl
import os
import secrets
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy import ndarray

from residual_memory.errors import CorruptFile, MemoryLocked, StorageFailure

LOCK = "lock"
PART = ".part"
MAX_CHUNKS = 1024
MIN_CHUNK = 1 << 20


@dataclass(frozen=True)
class FileRecord:
    """What the manifest remembers of a file: enough to notice any change.

    Attributes
    ----------
    name : inside the memory's directory.
    length : bytes.
    chunk : bytes that each checksum covers.
    crc32 : one checksum a chunk.
    """

    name: str
    length: int
    chunk: int
    crc32: tuple[int, ...]


class Directory:
    """The files of one memory: a flat directory."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: int | None = None

    def exists(self) -> bool:
        return self.path.is_dir()

    def make(self) -> None:
        """Create the directory and those above it, durably."""
        with _refusals(self.path):
            above = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            for folder in reversed(above):
                folder.mkdir(exist_ok=True)
                _fsync_directory(folder.parent)

    def names(self) -> list[str]:
        with _refusals(self.path):
            return sorted(entry.name for entry in os.scandir(self.path))

    def write(self, name: str, pieces: Iterable[bytes | memoryview], length: int) -> FileRecord:
        """Write a new file durably, in pieces; on any failure nothing of it stays.

        Raises
        ------
        StorageFailure : if the disk refuses.
        """
        target = self.path / name
        chunk = max(MIN_CHUNK, -(-length // MAX_CHUNKS))
        checksums = _Checksums(chunk)
        with _refusals(target):
            try:
                with open(target, "xb", buffering=0) as file:
                    for piece in pieces:
                        checksums.add(piece)
                        _write_all(file, piece)
                    os.fsync(file.fileno())
                _fsync_directory(self.path)
            except BaseException:
                self._forget(name)
                raise
        return FileRecord(name, length, chunk, checksums.all())

    def replace(self, name: str, content: bytes) -> None:
        """Put `content` in the place of the file, durably: readers see the old one or the new one.

        Raises
        ------
        StorageFailure : if the disk refuses; the old file is still there.
        """
        part, target = self.path / (name + PART), self.path / name
        with _refusals(target):
            try:
                with open(part, "wb", buffering=0) as file:
                    _write_all(file, content)
                    os.fsync(file.fileno())
                os.replace(part, target)
            except BaseException:
                self._forget(part.name)
                raise
            _fsync_directory(self.path)

    def read(self, name: str, limit: int) -> bytes:
        """The whole of a small file.

        Raises
        ------
        CorruptFile : if it is missing or longer than `limit` bytes.
        """
        target = self.path / name
        with _refusals(target):
            try:
                with open(target, "rb") as file:
                    content = file.read(limit + 1)
            except FileNotFoundError:
                raise CorruptFile(f"{target} is missing") from None
        if len(content) > limit:
            raise CorruptFile(f"{target} has more than {limit:,} bytes, which no such file needs")
        return content

    def holds(self, name: str, content: bytes) -> bool:
        """Whether the file holds just this; False too where it cannot be read."""
        try:
            return (self.path / name).read_bytes() == content
        except OSError:
            return False

    def head(self, name: str, size: int) -> bytes:
        """The first bytes of a file."""
        with _refusals(self.path / name), open(self.path / name, "rb") as file:
            return file.read(size)

    def length(self, name: str) -> int | None:
        """Bytes of the file; None where there is no plain file of that name."""
        target = self.path / name
        return None if target.is_symlink() or not target.is_file() else target.stat().st_size

    def chunks(self, record: FileRecord) -> Iterator[bytes]:
        """The file's content, chunk by chunk."""
        with _refusals(self.path / record.name), open(self.path / record.name, "rb", buffering=0) as file:
            while piece := file.read(record.chunk):
                yield piece

    def content(self, record: FileRecord) -> memoryview:
        """The whole of a file, if it is to the byte what was written.

        Raises
        ------
        CorruptFile : if it is not.
        """
        target = self.path / record.name
        if self.length(record.name) != record.length:
            raise CorruptFile(f"{target} is missing, or has not {record.length:,} bytes")
        content, filled = bytearray(record.length), 0
        for piece, expected in zip(self.chunks(record), record.crc32, strict=False):
            if zlib.crc32(piece) != expected:
                raise CorruptFile(f"{target} is damaged")
            content[filled : filled + len(piece)] = piece
            filled += len(piece)
        if filled != record.length or len(content) != record.length:
            raise CorruptFile(f"{target} is cut")
        return memoryview(content).toreadonly()

    def map(self, name: str, dtype: Any, shape: tuple[int, ...], offset: int) -> ndarray:
        """A read-only view of a column of a file; the file may be removed while the view lives."""
        if 0 in shape:
            return np.zeros(shape, dtype)
        with _refusals(self.path / name):
            return np.memmap(self.path / name, dtype, "r", offset, shape)

    def remove(self, name: str) -> None:
        """Remove a file that no manifest names any more; a failure is left for the next sweep."""
        self._forget(name)

    def check(self, record: FileRecord) -> str | None:
        """What is wrong with the file, and where; None if it is as it was written."""
        length = self.length(record.name)
        if length is None:
            return "is missing"
        if length != record.length:
            return f"has {length:,} bytes, expected {record.length:,}"
        for place, (piece, expected) in enumerate(zip(self.chunks(record), record.crc32, strict=True)):
            if zlib.crc32(piece) != expected:
                first = place * record.chunk
                return f"is damaged somewhere in bytes {first:,} to {first + len(piece) - 1:,}"
        return None

    def lock(self) -> None:
        """Become the one writer.

        Raises
        ------
        MemoryLocked : at once, if another process is; the message names it.
        """
        with _refusals(self.path / LOCK):
            descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _lock_file(descriptor, self.path)
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
            except BaseException:
                os.close(descriptor)
                raise
        self._lock = descriptor

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _forget(self, name: str) -> None:
        try:
            os.unlink(self.path / name)
        except OSError:
            pass


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that is there, durably, when the block has ended well, and of which nothing is there otherwise.

    Raises
    ------
    StorageFailure : if the disk refuses; a file that had the name before is still there.
    """
    part = part_of(path)
    with _refusals(path):
        try:
            with open(part, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        _fsync_directory(path.parent)


def part_of(path: Path) -> Path:
    """A free name beside a path, for what is not whole yet."""
    return path.with_name(f".{path.name}-{secrets.token_hex(4)}{PART}")


def move(part: Path, path: Path) -> None:
    """Give what is whole its name, durably.

    Raises
    ------
    StorageFailure : if the disk refuses.
    """
    with _refusals(path):
        os.replace(part, path)
        _fsync_directory(path.parent)


class _Checksums:
    """CRC-32 of each chunk of a stream of pieces."""

    def __init__(self, chunk: int) -> None:
        self._chunk, self._filled, self._current = chunk, 0, 0
        self._done: list[int] = []

    def add(self, piece: bytes | memoryview) -> None:
        view = memoryview(piece)
        while len(view):
            taken = view[: self._chunk - self._filled]
            self._current = zlib.crc32(taken, self._current)
            self._filled += len(taken)
            view = view[len(taken) :]
            if self._filled == self._chunk:
                self._done.append(self._current)
                self._filled = self._current = 0

    def all(self) -> tuple[int, ...]:
        return (*self._done, self._current) if self._filled else tuple(self._done)


def _lock_file(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 64).decode(errors="replace").strip() or "unknown"
        raise MemoryLocked(
            f"{path} is being written to by process {holder}; "
            "close that writer, or open this one read-only (writable=False)"
        ) from None


def _write_all(file: Any, piece: bytes | memoryview) -> None:
    view = memoryview(piece)
    while len(view):
        view = view[file.write(view) :]


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Say in the library's words what the system refused."""
    try:
        yield
    except StorageFailure:
        raise
    except OSError as error:
        remedy = {
            errno.ENOSPC: "; free some space and try again",
            errno.EACCES: "; the directory must be writable, or open the memory read-only",
            errno.EROFS: "; the file system is read-only",
        }.get(error.errno or 0, "")
        raise StorageFailure(error.errno, f"{path}: {error.strerror}{remedy}; the memory is as it was") from error
