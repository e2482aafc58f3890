"""Ctrl-C at any line of the store: the change is made whole or not at all, and the handle knows which."""

import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import residual_memory.memory
from residual_memory.memory import Memory, segments, storage
from tests.memory.test_storage import files, named, state
from tests.problems import LAYOUTS, Problem, classification, empty_memory, told

# A file that an interrupt leaves open is closed when nobody holds it any more.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SOURCE = str(Path(residual_memory.memory.__file__).parent)
PROBLEM = classification(n=12, d=2, c=3)
Place = tuple[str, int]
Call = Callable[[], Any]


class Tracer:
    """Follows the lines of the store, and interrupts at one of them.

    Lines on which a `with` ends are left out: Python looks for signals after the call that lets go, not before it.

    Parameters
    ----------
    interrupts_at : a line, and the how-manieth time that it is run.

    Attributes
    ----------
    times : how often each line was run.
    """

    def __init__(self, interrupts_at: tuple[Place, int] | None = None) -> None:
        self.times: Counter[Place] = Counter()
        self._at = interrupts_at

    def _following(self) -> Callable[[FrameType, str, Any], Any]:
        """What follows the lines of one call."""
        entered: set[int] = set()

        def line(frame: FrameType, event: str, _: Any) -> Any:
            place = (frame.f_code.co_filename, frame.f_lineno)
            if event != "line" or place[1] in entered:
                return line
            if place in begins_a_with():
                entered.add(place[1])
            self.times[place] += 1
            if self._at == (place, self.times[place]):
                raise KeyboardInterrupt
            return line

        return line

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        """What is dropped swallows its errors: nothing is followed from there on."""
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        caller: FrameType | None = frame
        while caller is not None:
            if caller.f_code.co_name == "__del__":
                return None
            caller = caller.f_back
        return self._following()

    def run(self, call: Call) -> KeyboardInterrupt | None:
        """The interrupt, with all that it holds on to as in a session where somebody looks at it."""
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            call()
        except KeyboardInterrupt as error:
            return error
        finally:
            sys.settrace(before)
        return None

    def moments(self) -> list[tuple[Place, int]]:
        """Lines that reach the disk or change the handle, at their first and last time; of others, every fourth."""
        chosen = set()
        for number, (place, times) in enumerate(self.times.items()):
            if Path(place[0]).name in ("memory.py", "storage.py"):
                chosen |= {(place, 1), (place, times)}
            elif number % 4 == 0:
                chosen.add((place, 1))
        return sorted(chosen)


@cache
def begins_a_with() -> set[Place]:
    lines = ((str(file), *line) for file in Path(SOURCE).glob("*.py") for line in enumerate(file.open(), 1))
    return {(file, number) for file, number, text in lines if text.lstrip().startswith("with ")}


def blocks(memory: Memory, *parts: slice) -> Iterator[dict[str, Any]]:
    for part in parts:
        some = PROBLEM.rows(part)
        ids = 200 + np.arange(len(PROBLEM))[part]
        yield {"keys": some.keys, "labels": some.labels, "predictions": told(memory, some), "ids": ids, "owners": "zoë"}


def append(memory: Memory) -> None:
    memory.append(**next(blocks(memory, slice(0, 3))))


CHANGES: dict[str, Callable[[Memory], Any]] = {
    "append": append,
    "extend": lambda memory: memory.extend(blocks(memory, slice(0, 3), slice(3, 5), slice(5, 12))),
    "forget": lambda memory: memory.forget(where={"label": int(PROBLEM.labels[0])}),
    "compact": lambda memory: memory.compact(),
    "setting": lambda memory: memory.save_setting({"n_neighbors": 3}),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    """Nothing waits for the disk, and segments are small."""
    monkeypatch.setattr(storage.Disk, "sync", lambda disk, file: None)
    monkeypatch.setattr(storage.Disk, "sync_folder", lambda disk, folder: None)
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 200)


def filled(path: Path | None, layout: str) -> Memory:
    """A memory of two segments, some of whose rows are forgotten."""
    memory = empty_memory(PROBLEM, path, **LAYOUTS[layout])
    for part in (slice(0, 8), slice(8, 12)):
        some: Problem = PROBLEM.rows(part)
        memory.append(some.keys, some.labels, told(memory, some), owners="alice")
    memory.forget([2, 9])
    return memory


def free_for_another_thread(memory: Memory) -> bool:
    """Whether no change is still going on."""
    free: list[bool] = []

    def take() -> None:
        if taken := memory._changing.acquire(timeout=1):
            memory._changing.release()
        free.append(taken)

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return free == [True]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_interrupted_change_is_made_whole_or_not_at_all(tmp_path: Path, change: Callable[[Memory], Any]) -> None:
    home = tmp_path / "home"
    filled(home, "log8").close()
    before = state(Memory.open(home))
    shutil.copytree(home, tmp_path / "dry")
    tracer = Tracer()
    with Memory.open(tmp_path / "dry", writable=True) as memory:
        assert tracer.run(lambda: change(memory)) is None
        after = state(memory)
    assert len(tracer.moments()) > 40
    outcomes = set()
    for moment in tracer.moments():
        copy, where = tmp_path / "copy", f"interrupted at {moment}"
        shutil.copytree(home, copy)
        with Memory.open(copy, writable=True) as memory:
            version = memory.version
            interrupted = Tracer(moment).run(partial(change, memory))
            on_disk, held = Memory.open(copy), state(memory)
            assert (held, memory.version) == (state(on_disk), on_disk.version), where
            assert held == (before if memory.version == version else after), where
            assert interrupted is not None or memory.version > version, where
            outcomes.add(memory.version - version)
            assert memory.verify().ok, where
            assert free_for_another_thread(memory), where
            if memory.version == version:
                change(memory)
                assert state(memory) == after, where
            memory.save_setting({"further": True})
            assert Memory.open(copy).setting == {"further": True}
        with Memory.open(copy, writable=True) as memory:
            assert files(copy) == named(memory), f"{where}: something was left behind"
        shutil.rmtree(copy)
    assert outcomes == {0, 1}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_interrupted_change_in_ram_is_made_whole_or_not_at_all(change: Callable[[Memory], Any]) -> None:
    before = state(filled(None, "dense"))
    tracer, memory = Tracer(), filled(None, "dense")
    tracer.run(lambda: change(memory))
    after = state(memory)
    for moment in tracer.moments():
        memory = filled(None, "dense")
        version = memory.version
        interrupted = Tracer(moment).run(partial(change, memory))
        assert interrupted is not None or memory.version > version
        assert state(memory) == (before if memory.version == version else after)
        assert free_for_another_thread(memory)


def test_an_interrupted_creation_leaves_a_memory_or_room_for_one(tmp_path: Path) -> None:
    tracer = Tracer()
    tracer.run(lambda: empty_memory(PROBLEM, tmp_path / "dry"))
    assert len(tracer.moments()) > 40
    made = set()
    for number, moment in enumerate(tracer.moments()):
        path = tmp_path / str(number)
        error = Tracer(moment).run(partial(empty_memory, PROBLEM, path))
        assert error is not None
        made.add((path / "manifest.json").exists())
        if (path / "manifest.json").exists():
            memory = Memory.open(path, writable=True, verify=True)
        else:
            memory = empty_memory(PROBLEM, path)
        with memory:
            assert len(memory) == 0
            append(memory)
            assert files(path) == named(memory)
        del error
    assert made == {False, True}


def test_an_interrupted_opening_locks_nobody_out(tmp_path: Path) -> None:
    home = tmp_path / "home"
    filled(home, "dense").close()
    for name in ("rows-00000099-deadbeef.safetensors", "manifest.json.part"):
        (home / name).write_bytes(b"half a fi")
    wanted = state(Memory.open(home))
    tracer = Tracer()
    shutil.copytree(home, tmp_path / "dry")
    tracer.run(lambda: Memory.open(tmp_path / "dry", writable=True, verify=True))
    assert len(tracer.moments()) > 40
    for number, moment in enumerate(tracer.moments()):
        copy = shutil.copytree(home, tmp_path / str(number))
        error = Tracer(moment).run(partial(Memory.open, copy, writable=True, verify=True))
        assert error is not None, moment
        with Memory.open(copy, writable=True, verify=True) as memory:
            assert state(memory) == wanted
            assert files(copy) == named(memory)
        del error
