"""A simulator of power losses: what a disk may hold when the power fails, for every moment of a run.

What was synced is there. Of what was not, any part may be: each write whole, torn at 512 bytes or missing, each name in
a folder made, given to another file, or removed, or not. That is worse than what file systems promise, and what POSIX
allows.

References
----------
Pillai et al., "All file systems are not created equal: on the complexity of crafting crash-consistent applications",
OSDI 2014.
"""

import itertools
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from residual_memory.errors import ResidualMemoryError
from residual_memory.memory import Memory, storage
from residual_memory.memory.joining import joined
from residual_memory.memory.storage import LOCK, RESERVE, Directory, Disk
from residual_memory.selftest.workload import Step, add, create, folder_in_ram, state_of, steps, trace_of

SECTOR = 512
WORKLOAD = ("append", "append", "forget", "append", "setting", "compact", "forget", "append", "compact")
PARTS = {"first": range(20), "second": range(20, 32)}  # memories that are joined, and their ids
Event = tuple[Any, ...]
Site = tuple[str, str]  # the call of the disk, and who makes it


class RecordingDisk(Disk):
    """Does everything, and writes down what would matter if the power failed.

    Parameters
    ----------
    root : paths are counted from here.
    muted : a place in the code whose syncs or renames are left out, for the proof that the trials notice.

    Attributes
    ----------
    events : in order.
    sites : places in the code that sync or rename.
    """

    def __init__(self, root: Path, muted: Site | None = None) -> None:
        self.events: list[Event] = []
        self.sites: set[Site] = set()
        self._root, self._muted = root, muted

    def make_folder(self, folder: Path) -> None:
        super().make_folder(folder)
        self.events.append(("folder", self._name(folder)))

    def create(self, path: Path, *, fresh: bool) -> BinaryIO:
        file = super().create(path, fresh=fresh)
        self.events.append(("create", self._name(path)))
        return file

    def grow(self, path: Path) -> BinaryIO:
        if not path.exists():
            self.events.append(("touch", self._name(path)))
        return super().grow(path)

    def write(self, file: BinaryIO, piece: memoryview) -> int:
        n = super().write(file, piece)
        if Path(file.name).name not in (RESERVE, LOCK):  # of which it does not matter what they hold
            self.events.append(("write", self._name(Path(file.name)), bytes(piece[:n])))
        return n

    def sync(self, file: BinaryIO) -> None:
        if self._reached("sync"):
            super().sync(file)
            self.events.append(("sync", self._name(Path(file.name))))

    def rename(self, before: Path, after: Path) -> None:
        if self._reached("rename"):
            super().rename(before, after)
            self.events.append(("rename", self._name(before), self._name(after)))

    def link(self, before: Path, after: Path) -> None:
        super().link(before, after)
        self.events.append(("link", self._name(before), self._name(after)))

    def sync_folder(self, folder: Path) -> None:
        if self._reached("sync_folder"):
            super().sync_folder(folder)
            self.events.append(("sync_folder", self._name(folder)))

    def remove(self, path: Path) -> None:
        super().remove(path)
        self.events.append(("remove", self._name(path)))

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._root))

    def _reached(self, call: str) -> bool:
        frame = sys._getframe(2)
        while frame.f_code.co_filename != storage.__file__ and frame.f_back is not None:
            frame = frame.f_back  # of a type checker in between
        site = (call, frame.f_code.co_name)
        self.sites.add(site)
        return site != self._muted


@dataclass(frozen=True)
class Run:
    """A run that was recorded.

    Attributes
    ----------
    events : of the disk; between them ("begin", step) and ("done", step), where step −1 is the creation.
    steps : the changes.
    sites : places in the code that sync or rename.
    """

    events: list[Event]
    steps: list[Step]
    sites: frozenset[Site]


Judge = Callable[[Path, Run, int, int], str | None]


def record(folder: Path, *, muted: Site | None = None, names: Sequence[str] = WORKLOAD, seed: int = 0) -> Run:
    """Create a memory in the folder and change it, step by step."""
    disk = RecordingDisk(folder, muted)
    made = list(steps(names, frozenset(), seed=seed))
    disk.events.append(("begin", -1))
    memory = create(Directory(folder / "memory", disk))
    with memory:
        disk.events.append(("done", -1))
        for number, step in enumerate(made):
            disk.events.append(("begin", number))
            step.apply(memory)
            disk.events.append(("done", number))
    return Run(disk.events, made, frozenset(disk.sites))


# ---------------------------------------------------------------------- what a disk may hold


@dataclass
class _File:
    """Bytes that are safe, and writes that are not yet."""

    safe: bytes = b""
    waiting: list[bytes | None] = field(default_factory=list)  # None: cut to nothing


@dataclass(frozen=True, eq=False)
class _Change:
    """A change of names: "set" a name to a file or folder, "rename" it, "remove" it."""

    kind: str
    name: str
    file: _File | None = None  # None: a folder
    to: str = ""

    def apply(self, names: "dict[str, _File | None]") -> None:
        if self.kind == "rename" and self.file is None:
            inside = [name for name in names if _folder(name) == self.name]
            names.update({self.to + name.removeprefix(self.name): names.pop(name) for name in inside})
        if self.kind != "set":
            names.pop(self.name, None)
        if self.kind != "remove":
            names[self.to or self.name] = self.file


@dataclass
class _Disk:
    """Names that are safe, names as they are now, and the changes that are not safe yet."""

    safe: dict[str, _File | None] = field(default_factory=dict)
    now: dict[str, _File | None] = field(default_factory=dict)
    waiting: list[_Change] = field(default_factory=list)

    def apply(self, event: Event) -> None:
        kind, name = event[0], event[1]
        if kind == "sync_folder":
            for change in [change for change in self.waiting if _folder(change.name) == name]:
                change.apply(self.safe)
                self.waiting.remove(change)
            return
        file = self.now.get(name)
        if kind == "folder":
            self._change(_Change("set", name))
        elif kind == "remove":
            self._change(_Change("remove", name))
        elif kind == "rename":
            self._change(_Change("rename", name, file, event[2]))
        elif kind == "link":
            self._change(_Change("set", event[2], file))
        elif file is None:  # created, or grown from nothing
            self._change(_Change("set", name, _File()))
        elif kind == "create":
            file.waiting.append(None)
        elif kind == "write":
            file.waiting.append(event[2])
        else:
            file.safe, file.waiting = _content(file, ["whole"] * len(file.waiting)), []

    def _change(self, change: _Change) -> None:
        change.apply(self.now)
        self.waiting.append(change)

    def outcomes(self, random: np.random.Generator, most: int) -> Iterator[dict[str, bytes | None]]:
        """What may be there after a power loss now: all of it, or `most` by chance where there is more."""
        held = (*self.safe.values(), *(change.file for change in self.waiting))
        files = list({id(file): file for file in held if file is not None and file.waiting}.values())
        every: list[Sequence[Any]] = [(False, True)] * len(self.waiting) + [
            _fates(piece) for file in files for piece in file.waiting
        ]
        if math.prod(map(len, every)) <= most:
            chosen: Iterator[tuple[Any, ...]] = itertools.product(*every)
        else:
            chosen = (tuple(some[int(random.integers(len(some)))] for some in every) for _ in range(most))
        for fate in chosen:
            yield self._outcome(fate[: len(self.waiting)], files, fate[len(self.waiting) :])

    def _outcome(self, kept: Sequence[bool], files: Sequence[_File], fates: Sequence[str]) -> dict[str, bytes | None]:
        names = dict(self.safe)
        for change, stays in zip(self.waiting, kept, strict=True):
            if stays:
                change.apply(names)
        contents: dict[int, bytes] = {}
        for file in files:
            contents[id(file)] = _content(file, fates[: len(file.waiting)])
            fates = fates[len(file.waiting) :]
        return {
            name: None if file is None else contents.get(id(file), file.safe)
            for name, file in names.items()
            if _folder(name) == "." or _folder(name) in names
        }


def _folder(name: str) -> str:
    return str(Path(name).parent)


def _fates(piece: bytes | None) -> Sequence[str | bool]:
    """What may become of a write: whole, lost, or some of its sectors."""
    if piece is None or len(piece) <= SECTOR:
        return ["whole", "lost"]
    return ["whole", "lost", "first", "last"]


def _content(file: _File, fates: Sequence[str]) -> bytes:
    content, place = bytearray(file.safe), len(file.safe)
    for piece, fate in zip(file.waiting, fates, strict=True):
        if piece is None:
            if fate == "whole":
                content = bytearray()
            place = 0
            continue
        middle = len(piece) // 2 // SECTOR * SECTOR
        kept = {"whole": slice(None), "lost": slice(0, 0), "first": slice(0, middle), "last": slice(middle, None)}[fate]
        start = place + (kept.start or 0)
        if len(piece[kept]):
            if len(content) < start:
                content += bytes(start - len(content))
            content[start : start + len(piece[kept])] = piece[kept]
        place += len(piece)
    return bytes(content)


# ---------------------------------------------------------------------- the trials


@dataclass(frozen=True)
class PowerReport:
    """What power losses did.

    Attributes
    ----------
    states : different contents of the disk that were looked at.
    violations : what was wrong in some of them; none where all is well.
    sites : places in the code that sync or rename.
    """

    states: int
    violations: tuple[str, ...]
    sites: frozenset[Site]


def power_losses(*, most: int = 40, muted: Site | None = None, stop_at: int = 1_000_000, seed: int = 0) -> PowerReport:
    """Record a run, and look at what may be there after a power loss at any moment of it.

    After each, the memory is whole and holds what the last acknowledged change left, or what the change under way would
    leave; what was compacted away is in no file; and the next writer can go on.

    Parameters
    ----------
    most : states to look at for one moment.
    muted : as in `RecordingDisk`.
    stop_at : violations after which to stop.
    """
    with folder_in_ram() as folder:
        (folder / "run").mkdir()
        run = record(folder / "run", muted=muted, seed=seed)
        return _judged(run, _judge, folder / "trial", most, stop_at, seed)


def joining_losses(*, most: int = 40, muted: Site | None = None, stop_at: int = 1_000_000) -> PowerReport:
    """The same of two memories that are joined and then removed: their rows are in them, or in the whole, or in both.

    Parameters
    ----------
    most, muted, stop_at : as in `power_losses`.
    """
    with folder_in_ram() as folder:
        (folder / "run").mkdir()
        run = _record_joining(folder / "run", muted)
        return _judged(run, _judge_joining, folder / "trial", most, stop_at, 0)


def _record_joining(folder: Path, muted: Site | None) -> Run:
    parts, disk = RecordingDisk(folder), RecordingDisk(folder, muted)
    for name, ids in PARTS.items():
        with create(Directory(folder / name, parts)) as memory:
            add(memory, ids)
    disk.events += [*parts.events, ("begin", 0)]
    joined(Directory(folder / "memory", disk), [Directory(folder / name, disk) for name in PARTS]).close()
    disk.events += [("done", 0), ("begin", 1)]
    for name in PARTS:
        part = Directory(folder / name, disk)
        for file in part.names():
            part.remove(file)
    disk.events.append(("done", 1))
    return Run(disk.events, [], frozenset(disk.sites))


def _judge_joining(trial: Path, run: Run, done: int, under_way: int) -> str | None:
    """What is wrong with this content of a disk; None where nothing is."""
    path = trial / "memory"
    if under_way < 0:
        return None  # the parts are being made
    try:
        if not (path / "manifest.json").exists():
            if done >= 0:
                return "the whole is gone"
            joined(path, [trial / name for name in PARTS]).close()
        if state_of(Memory.open(path, verify=True)) != frozenset().union(*PARTS.values()):
            return "the whole lacks rows"
        with Memory.open(path, writable=True) as memory:
            memory.save_setting({"after": "the power loss"})
    except (ResidualMemoryError, AssertionError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _judged(run: Run, judge: Judge, trial: Path, most: int, stop_at: int, seed: int) -> PowerReport:
    disk, random = _Disk(), np.random.default_rng(seed)
    seen: set[int] = set()
    violations: list[str] = []
    done, under_way = -2, -2
    for place, event in enumerate(run.events):
        if event[0] == "begin":
            under_way = event[1]
            continue
        if event[0] == "done":
            done = event[1]
        else:
            disk.apply(event)
        for outcome in disk.outcomes(random, most):
            known = hash((done, under_way, frozenset(outcome.items())))
            if known in seen:
                continue
            seen.add(known)
            _lay_out(outcome, trial)
            wrong = judge(trial, run, done, under_way)
            if wrong is not None:
                violations.append(f"after event {place} ({event[0]} {event[1]}): {wrong}")
                if len(violations) >= stop_at:
                    return PowerReport(len(seen), tuple(violations), run.sites)
    return PowerReport(len(seen), tuple(violations), run.sites)


def _lay_out(outcome: "dict[str, bytes | None]", trial: Path) -> None:
    """Make the trial's folder what the disk holds."""
    shutil.rmtree(trial, ignore_errors=True)
    trial.mkdir()
    for name, content in sorted(outcome.items()):
        if content is None:
            (trial / name).mkdir(parents=True, exist_ok=True)
        else:
            (trial / name).parent.mkdir(parents=True, exist_ok=True)
            (trial / name).write_bytes(content)


def _judge(trial: Path, run: Run, done: int, under_way: int) -> str | None:
    """What is wrong with this content of a disk; None where nothing is."""
    path = trial / "memory"
    if done == -2 and not (path / "manifest.json").exists():
        create(str(path)).close()  # it was never acknowledged, and can be made again
        return None
    allowed = {_after(run, done), _after(run, under_way)}
    try:
        found = state_of(Memory.open(path, verify=True))
        if found not in allowed:
            return f"{len(found)} rows, expected {' or '.join(str(len(ids)) for ids in allowed)}"
        if done >= 0 and run.steps[done].name == "compact" and (left := _traces_left(path, run, done)):
            return f"erased rows are still in {left}"
        with Memory.open(path, writable=True) as memory:
            if state_of(memory) != found:
                return "the next writer sees something else"
            memory.save_setting({"after": "the power loss"})
        if state_of(Memory.open(path, verify=True)) != found:
            return "the next change lost something"
    except (ResidualMemoryError, AssertionError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _after(run: Run, step: int) -> frozenset[int]:
    return run.steps[step].after if step >= 0 else frozenset()


def _traces_left(path: Path, run: Run, done: int) -> str | None:
    """A file that holds a row which a finished compaction erased."""
    ever = frozenset().union(*(step.after for step in run.steps[: done + 1]))
    erased = [trace_of(number).encode() for number in ever - run.steps[done].after]
    for file in path.iterdir():
        content = file.read_bytes()
        if any(trace in content for trace in erased):
            return file.name
    return None
