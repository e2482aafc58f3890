"""All input and output of a memory goes through one small class, so that a test can record, break and replay it.

A write is durable in this order and no other: write the file → fsync the file → (rename) → fsync the directory. The
manifest names what exists; a file that it does not name is a leftover, ignored by readers and swept by the next writer.
"""

import errno
import fcntl
import io
import os
import platform
import secrets
import stat
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy import ndarray

from residual_memory.errors import CorruptFile, MemoryLocked, PathNotShared, StorageFailure

LOCK = "lock"
RESERVE = "reserve"
PART = ".part"
MAX_CHUNKS = 1024
MIN_CHUNK = 1 << 20
PIECE = 1 << 18  # bytes that are read and summed at a time: they stay in the cache of a core
SPAN = 16 << 20  # bytes that a thread checks at a time
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)  # a second name cannot be had


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


@dataclass(frozen=True)
class Damage:
    """Bytes of a file that are not those that were written.

    Attributes
    ----------
    what : for people.
    first, last : the bytes among which a change lies; the whole file where it is missing or of another length.
    """

    what: str
    first: int
    last: int


@dataclass(frozen=True)
class MappedPlace:
    """Where an array lies that is mapped from a file.

    Attributes
    ----------
    path : of the file.
    dtype, shape : of the array.
    offset : bytes of the file before it.
    """

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    def open(self) -> ndarray:
        """The array, in this process.

        Raises
        ------
        PathNotShared : if the file is not here.
        StorageFailure : if it cannot be read.
        """
        directory = Directory(self.path.parent)
        if directory.length(self.path.name) is None:
            raise PathNotShared(
                f"{self.path} is not to be seen on {platform.node()}; the memory must be on a file system that all "
                "machines share, and if it was compacted meanwhile, refreshed"
            )
        return directory.map(self.path.name, self.dtype, self.shape, self.offset)


def mapped_place(array: ndarray) -> MappedPlace | None:
    """Where an array lies; None of one that is in RAM, or not in one piece."""
    mapped: Any = array
    while mapped is not None and not isinstance(mapped, np.memmap):
        mapped = getattr(mapped, "base", None)
    if mapped is None or mapped.filename is None or not array.flags.c_contiguous:
        return None
    offset = mapped.offset + array.ctypes.data - mapped.ctypes.data
    return MappedPlace(Path(mapped.filename), array.dtype, array.shape, offset)


class Disk:
    """The calls to the system that a memory makes, and no others."""

    def names(self, folder: Path) -> list[str]:
        return sorted(entry.name for entry in os.scandir(folder))

    def make_folder(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)

    def create(self, path: Path, *, fresh: bool) -> BinaryIO:
        """A file to write to, unbuffered; with `fresh` there must be none of that name."""
        return open(path, "xb" if fresh else "wb", buffering=0)

    def grow(self, path: Path) -> BinaryIO:
        """A file to write to after its end, unbuffered; it is made where there is none."""
        return open(path, "ab", buffering=0)

    def write(self, file: BinaryIO, piece: memoryview) -> int:
        return file.write(piece)

    def sync(self, file: BinaryIO) -> None:
        os.fsync(file.fileno())

    def rename(self, before: Path, after: Path) -> None:
        os.replace(before, after)

    def link(self, before: Path, after: Path) -> None:
        """Give a file a second name."""
        os.link(before, after)

    def sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        os.unlink(path)

    def open(self, path: Path) -> BinaryIO:
        """A file to read from, unbuffered."""
        return open(path, "rb", buffering=0)

    def map(self, path: Path, dtype: Any, shape: tuple[int, ...], offset: int) -> ndarray:
        return np.memmap(path, dtype, "r", offset, shape)

    def lock(self, path: Path) -> BinaryIO:
        """The file, held by nobody else; it is given back when it is closed.

        Raises
        ------
        BlockingIOError : if somebody holds it.
        """
        file: BinaryIO = open(path, "a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BaseException:
            file.close()
            raise


class Directory:
    """The files of one memory: a flat directory.

    Parameters
    ----------
    path : of the directory.
    disk : what reaches the system; another one records or refuses.

    A directory that nobody refers to any more gives its lock back.
    """

    def __init__(self, path: str | os.PathLike[str], disk: Disk | None = None) -> None:
        self._lock: BinaryIO | None = None
        self.path = Path(path)
        self._disk = Disk() if disk is None else disk

    def __del__(self) -> None:
        self.unlock()

    def __fspath__(self) -> str:
        return str(self.path)

    @staticmethod
    def at(path: "str | os.PathLike[str] | Directory") -> "Directory":
        """The directory of a path; one that is a directory already is taken as it is."""
        return path if isinstance(path, Directory) else Directory(path)

    def exists(self) -> bool:
        return self.path.is_dir()

    def make(self) -> None:
        """Create the directory and those above it, durably."""
        with _refusals(self.path):
            above = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            for folder in reversed(above):
                self._disk.make_folder(folder)
                self._disk.sync_folder(folder.parent)

    def names(self) -> list[str]:
        with _refusals(self.path):
            return self._disk.names(self.path)

    def write(self, name: str, pieces: Iterable[bytes | memoryview], length: int) -> FileRecord:
        """Write a new file durably, in pieces; on any failure nothing of it stays.

        Raises
        ------
        StorageFailure : if the disk refuses.
        """
        target = self.path / name
        chunk = max(MIN_CHUNK, -(-length // MAX_CHUNKS))
        checksums = _Checksums(chunk)
        with _refusals(target), self._disk.create(target, fresh=True) as file:
            try:
                for piece in pieces:
                    with checksums.adding(piece):
                        self._write_all(file, piece)
                self._disk.sync(file)
                self._disk.sync_folder(self.path)
            except BaseException:
                self.remove(name)
                raise
        return FileRecord(name, length, chunk, checksums.all())

    def replace(self, name: str, content: bytes) -> None:
        """Put `content` in the place of the file, durably: readers see the old one or the new one.

        Raises
        ------
        StorageFailure : if the disk refuses; the old file is still there, unless the last step failed.
        """
        part, target = self.path / (name + PART), self.path / name
        with _refusals(target):
            try:
                with self._disk.create(part, fresh=False) as file:
                    self._write_all(file, content)
                    self._disk.sync(file)
                self._disk.rename(part, target)
            except BaseException:
                self.remove(part.name)
                raise
            self._disk.sync_folder(self.path)

    def take_over(self, home: "Directory", record: FileRecord, name: str) -> FileRecord:
        """Have a file of another directory here too, by a second name of it; by a copy where there can be none.

        The name is not safe before the next `replace`; the other directory stays as it is.

        Raises
        ------
        CorruptFile : if a copy is not, to the byte, what was written.
        StorageFailure : if the disk refuses.
        """
        target = self.path / name
        with _refusals(target):
            try:
                self._disk.link(home.path / record.name, target)
                return replace(record, name=name)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
        copied = self.write(name, home.blocks(record.name, MIN_CHUNK, 0), record.length)
        if copied != replace(record, name=name):
            self.remove(name)
            raise CorruptFile(f"{home.path / record.name} is damaged")
        return copied

    def move(self, path: Path) -> None:
        """Give the directory, which is whole, its name, durably.

        Raises
        ------
        StorageFailure : if the disk refuses; it has its old name still, unless the last step failed.
        """
        with _refusals(path):
            self._disk.rename(self.path, path)
            self.path = path
            self._disk.sync_folder(path.absolute().parent)

    def beside(self, path: Path) -> "Directory":
        """Another directory on the same disk."""
        return Directory(path, self._disk)

    def put(self, name: str, content: bytes) -> bool:
        """Put a file down that may be lost at any time, without waiting for the disk; whether it is there now."""
        try:
            with self._disk.create(self.path / name, fresh=False) as file:
                self._write_all(file, content)
        except OSError:
            self.remove(name)
            return False
        return True

    def read(self, name: str, limit: int) -> bytes:
        """The whole of a small file.

        Raises
        ------
        CorruptFile : if it is missing or longer than `limit` bytes.
        """
        target = self.path / name
        with _refusals(target):
            try:
                with self._disk.open(target) as file:
                    content = b"".join(map(bytes, _pieces(file, limit + 1)))
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
        with _refusals(self.path / name), self._disk.open(self.path / name) as file:
            return b"".join(map(bytes, _pieces(file, size)))

    def length(self, name: str) -> int | None:
        """Bytes of the file; None where there is no plain file of that name."""
        with _refusals(self.path / name):
            try:
                found = os.lstat(self.path / name)  # asked once: a writer may remove it at any time
            except (FileNotFoundError, NotADirectoryError):
                return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

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
        with _refusals(target), self._disk.open(target) as file:
            for expected in record.crc32:
                size = min(record.chunk, record.length - filled)
                found = 0
                for piece in _pieces(file, size):
                    found = zlib.crc32(piece, found)
                    content[filled : filled + len(piece)] = piece
                    filled += len(piece)
                if found != expected:
                    raise CorruptFile(f"{target} is damaged")
        if filled != record.length or len(content) != record.length:
            raise CorruptFile(f"{target} is cut")
        return memoryview(content).toreadonly()

    def map(self, name: str, dtype: Any, shape: tuple[int, ...], offset: int) -> ndarray:
        """A read-only view of a column of a file; the file may be removed while the view lives."""
        if 0 in shape:
            return np.zeros(shape, dtype)
        with _refusals(self.path / name):
            return self._disk.map(self.path / name, dtype, shape, offset)

    def remove(self, name: str) -> None:
        """Remove a file that no manifest names; a failure is left for the next sweep."""
        with suppress(OSError):
            self._disk.remove(self.path / name)

    def sync(self) -> None:
        """Make what was removed stay removed when the power fails."""
        with _refusals(self.path):
            self._disk.sync_folder(self.path)

    def check(self, record: FileRecord) -> Damage | None:
        """The first thing that is wrong with the file; None if it is as it was written."""
        return next(iter(self.check_all([record])[record.name]), None)

    def check_all(self, records: Sequence[FileRecord]) -> dict[str, list[Damage]]:
        """What is wrong with each file, by its name. Large ones are read by several threads.

        Raises
        ------
        StorageFailure : if a file cannot be read.
        """
        found: dict[str, list[Damage]] = {record.name: [] for record in records}
        spans: list[tuple[FileRecord, int, int]] = []
        for record in records:
            length = self.length(record.name)
            if length != record.length:
                what = "is missing" if length is None else f"has {length:,} bytes, expected {record.length:,}"
                found[record.name].append(Damage(what, 0, max(record.length - 1, 0)))
                continue
            step = max(SPAN // record.chunk, 1)
            spans += [(record, first, first + step) for first in range(0, len(record.crc32), step)]
        if len(spans) <= 2:
            checked = [self._check_span(*span) for span in spans]
        else:
            with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
                checked = list(pool.map(lambda span: self._check_span(*span), spans))
        for (record, _, _), damages in zip(spans, checked, strict=True):
            found[record.name] += damages
        return found

    def _check_span(self, record: FileRecord, begin: int, end: int) -> list[Damage]:
        """What is wrong with chunks `begin` to `end` of a file."""
        damages = []
        target = self.path / record.name
        with _refusals(target), self._disk.open(target) as file:
            file.seek(begin * record.chunk)
            for place, expected in enumerate(record.crc32[begin:end], begin):
                first = place * record.chunk
                size = min(record.chunk, record.length - first)
                found = 0
                for piece in _pieces(file, size):
                    found = zlib.crc32(piece, found)
                if found != expected:
                    last = first + size - 1
                    damages.append(Damage(f"is damaged somewhere in bytes {first:,} to {last:,}", first, last))
        return damages

    def blocks(self, name: str, size: int, overlap: int) -> Iterator[bytes]:
        """The file in pieces that begin with the last `overlap` bytes of the one before."""
        with _refusals(self.path / name), self._disk.open(self.path / name) as file:
            before = b""
            while piece := file.read(size):
                yield before + piece
                before = (before + piece)[-overlap:] if overlap else b""

    def lock(self) -> None:
        """Become the one writer.

        Raises
        ------
        MemoryLocked : at once, if another process is; the message names it.
        """
        path = self.path / LOCK
        with _refusals(path):
            try:
                self._lock = self._disk.lock(path)
                self._lock.truncate(0)
                self._write_all(self._lock, str(os.getpid()).encode())
            except BlockingIOError:
                holder = path.read_bytes()[:64].decode(errors="replace").strip() or "unknown"
                raise MemoryLocked(
                    f"{self.path} is being written to by process {holder}; "
                    "close that writer, or open this one read-only (writable=False)"
                ) from None
            except BaseException:
                self.unlock()
                raise

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def keep_reserve(self, size: int) -> None:
        """Hold at least this many bytes of the disk, for the change that must be possible when the disk is full."""
        held = self.length(RESERVE) or 0
        if held < size:
            # Random, so that a file system that compresses keeps room for it; twice as many, so that few changes grow
            # it. Where the disk refuses, what is held already stays.
            with suppress(OSError), self._disk.grow(self.path / RESERVE) as file:
                self._write_all(file, os.urandom(2 * size - held))

    def release_reserve(self) -> bool:
        """Give the held bytes back to the disk; whether there were any."""
        held = bool(self.length(RESERVE))
        self.remove(RESERVE)
        return held

    def _write_all(self, file: BinaryIO, piece: bytes | memoryview) -> None:
        view = memoryview(piece)
        while len(view):
            view = view[self._disk.write(file, view) :]


def _pieces(file: BinaryIO, size: int) -> Iterator[memoryview]:
    """At most `size` bytes from where the file is; a piece holds until the next one is asked for."""
    buffer = memoryview(bytearray(min(size, PIECE)))
    while size > 0:
        n = file.readinto(buffer[: min(size, PIECE)])  # type: ignore[attr-defined]
        if not n:
            return
        yield buffer[:n]
        size -= n


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that is there, durably, when the block has ended well, and of which nothing is there otherwise.

    Raises
    ------
    StorageFailure : if the disk refuses; a file that had the name before is still there.
    """
    disk, part = Disk(), part_of(path)
    with _refusals(path):
        try:
            with disk.create(part, fresh=True) as file:
                with io.BufferedWriter(_Through(disk, file)) as buffered:
                    yield buffered
                disk.sync(file)
            disk.rename(part, path)
        except BaseException:
            with suppress(OSError):
                disk.remove(part)
            raise
        disk.sync_folder(path.parent)


class _Through(io.RawIOBase):
    """A new file for those who want one of Python's, every write to which goes through the disk."""

    def __init__(self, disk: Disk, file: BinaryIO) -> None:
        self._disk, self._file = disk, file
        self.name, self.mode = file.name, file.mode

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, piece: Any) -> int:
        return self._disk.write(self._file, memoryview(piece))

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(place, whence)

    def tell(self) -> int:
        return self._file.tell()


def part_of(path: Path) -> Path:
    """A free name beside a path, for what is not whole yet."""
    return path.with_name(f".{path.name}-{secrets.token_hex(4)}{PART}")


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

    @contextmanager
    def adding(self, piece: bytes | memoryview) -> Iterator[None]:
        """Add a piece while the block runs: a large one in a thread of its own, beside what the disk does."""
        if memoryview(piece).nbytes < MIN_CHUNK:
            self.add(piece)
            yield
            return
        thread = threading.Thread(target=self.add, args=(piece,))
        thread.start()
        try:
            yield
        finally:
            thread.join()

    def all(self) -> tuple[int, ...]:
        return (*self._done, self._current) if self._filled else tuple(self._done)


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
