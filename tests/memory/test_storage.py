import errno
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residual_memory.errors import CorruptFile, MemoryLocked, ResidualMemoryError, StorageFailure
from residual_memory.memory import Memory, storage
from residual_memory.memory.storage import Directory, FileRecord
from tests.memory.faults import WATCHED, Disk, watching
from tests.problems import LAYOUTS, classification, empty_memory, memory_of, told

Change = Callable[[Memory], Any]

MORE = classification(n=6, seed=1)


def add(memory: Memory) -> None:
    memory.append(MORE.keys, MORE.labels, told(memory, MORE), ids=np.arange(100, 106))


def erase(memory: Memory) -> None:
    memory.forget(memory.ids)
    memory.compact()


CHANGES: dict[str, Change] = {
    "append": add,
    "forget": lambda memory: memory.forget([2, 7]),
    "compact": lambda memory: memory.compact(),
    "erase": erase,
    "setting": lambda memory: memory.save_setting({"n_neighbors": 3}),
}


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    return Directory(tmp_path)


@pytest.fixture(params=["dense", "log8"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A closed memory of two segments, some of whose rows are forgotten."""
    path = tmp_path / "memory"
    with memory_of(classification(n=12), path, **LAYOUTS[request.param]) as memory:
        more = MORE.rows(slice(0, 3))
        memory.append(more.keys, more.labels, told(memory, more), ids=[50, 51, 52])
        memory.forget([0, 51])
    return path


MAY_BE_MISSING = {"manifest.copy", "reserve"}


def state(memory: Memory) -> dict[str, Any]:
    """Everything that a user can see of a memory but its version."""
    snapshot = memory.snapshot
    rows = np.flatnonzero(snapshot.alive)
    return {
        "ids": snapshot.ids.tolist(),
        "keys": snapshot.keys.take(rows).tolist(),
        "labels": snapshot.targets(rows).tolist(),
        "predictions": snapshot.predictions(rows).tolist(),
        "setting": memory.setting,
    }


def said(directory: Directory, record: FileRecord) -> str | None:
    """What a check says of a file."""
    damage = directory.check(record)
    return None if damage is None else damage.what


def files(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()} - MAY_BE_MISSING


def named(memory: Memory) -> set[str]:
    """The files that a memory should consist of, less those that may be missing."""
    return {"manifest.json", "lock"} | {record.name for record in memory.snapshot.manifest.files()}


# ---------------------------------------------------------------------- one file


@pytest.mark.parametrize("pieces", [[], [b""], [b"abc", b"", b"defg"], [memoryview(b"xyz")]])
def test_a_written_file_holds_its_pieces_and_passes_its_check(directory: Directory, pieces: list[bytes]) -> None:
    content = b"".join(pieces)
    record = directory.write("a", pieces, len(content))
    assert (directory.path / "a").read_bytes() == content
    assert (record.name, record.length) == ("a", len(content))
    assert directory.check(record) is None


def test_a_checksum_covers_each_chunk(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MIN_CHUNK", 4)
    content = b"0123456789"
    record = directory.write("a", [content[:3], content[3:]], 10)
    assert record.crc32 == tuple(zlib.crc32(part) for part in (b"0123", b"4567", b"89"))
    (directory.path / "a").write_bytes(b"012345x789")
    assert said(directory, record) == "is damaged somewhere in bytes 4 to 7"


def test_a_check_says_what_is_missing_and_what_is_too_long(directory: Directory) -> None:
    record = directory.write("a", [b"1234"], 4)
    (directory.path / "a").write_bytes(b"12345")
    assert said(directory, record) == "has 5 bytes, expected 4"
    os.unlink(directory.path / "a")
    assert said(directory, record) == "is missing"


def test_a_file_that_exists_is_never_written_over(directory: Directory) -> None:
    directory.write("a", [b"first"], 5)
    with pytest.raises(StorageFailure):
        directory.write("a", [b"second"], 6)


def test_a_symbolic_link_is_no_file_of_a_memory(directory: Directory) -> None:
    record = directory.write("a", [b"1234"], 4)
    os.rename(directory.path / "a", directory.path / "b")
    os.symlink(directory.path / "b", directory.path / "a")
    assert directory.length("a") is None
    assert said(directory, record) == "is missing"


def test_reading_more_than_the_limit_is_refused(directory: Directory) -> None:
    directory.write("a", [b"12345"], 5)
    assert directory.read("a", 5) == b"12345"
    with pytest.raises(CorruptFile, match="more than 4 bytes"):
        directory.read("a", 4)


def test_a_mapped_column_cannot_be_written_to_and_outlives_its_file(directory: Directory) -> None:
    directory.write("a", [np.arange(6, dtype="<f8").tobytes()], 48)
    column = directory.map("a", "<f8", (2, 2), 8)
    directory.remove("a")
    assert column.tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match="read-only"):
        column[0, 0] = 9


def test_a_write_is_synced_before_the_directory_that_names_it(directory: Directory) -> None:
    with watching(Disk()) as disk:
        directory.write("a", [b"12", b"34"], 4)
    here = directory.path.name
    assert disk.calls == [
        ("create", "a"),
        ("write", "a"),
        ("write", "a"),
        ("sync", "a"),
        ("sync_folder", here),
    ]


def test_a_replacement_is_synced_then_renamed_then_its_directory_synced(directory: Directory) -> None:
    with watching(Disk()) as disk:
        directory.replace("a", b"new")
    here = directory.path.name
    assert disk.calls == [
        ("create", "a.part"),
        ("write", "a.part"),
        ("sync", "a.part"),
        ("rename", "a.part"),
        ("sync_folder", here),
    ]


def test_every_new_folder_above_a_new_memory_is_synced(tmp_path: Path) -> None:
    with watching(Disk()) as disk:
        Directory(tmp_path / "a" / "b" / "memory").make()
    synced = [target for name, target in disk.calls if name == "sync_folder"]
    assert {tmp_path.name, "a", "b"} <= set(synced), "after a power loss the memory's own folder may be gone"


@pytest.mark.parametrize("place", range(5))
def test_a_write_that_the_disk_refuses_leaves_nothing(directory: Directory, place: int) -> None:
    with watching(Disk(fails_at=place)), pytest.raises(StorageFailure, match=r"No space left.*free some space"):
        directory.write("a", [b"12", b"34"], 4)
    assert files(directory.path) == set()


@pytest.mark.parametrize("place", range(5))
def test_a_replacement_that_the_disk_refuses_leaves_the_old_or_the_new_file(directory: Directory, place: int) -> None:
    directory.replace("a", b"old")
    with watching(Disk(fails_at=place, error=errno.EIO)), pytest.raises(StorageFailure):
        directory.replace("a", b"new")
    assert files(directory.path) == {"a"}
    assert (directory.path / "a").read_bytes() == (b"old" if place <= 3 else b"new")


@pytest.mark.parametrize(
    ("error", "remedy"),
    [(errno.ENOSPC, "free some space"), (errno.EACCES, "must be writable"), (errno.EROFS, "file system is read-only")],
)
def test_a_refusal_says_where_why_and_what_to_do(directory: Directory, error: int, remedy: str) -> None:
    with watching(Disk(fails_at=0, error=error)), pytest.raises(StorageFailure, match=remedy) as caught:
        directory.write("rows", [b"1"], 1)
    assert str(directory.path / "rows") in str(caught.value)
    assert caught.value.errno == error


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES])
def test_a_file_that_cannot_be_read_is_a_storage_failure(directory: Directory, error: int) -> None:
    directory.replace("a", b"content")
    with watching(Disk(fails_at=0, error=error)), pytest.raises(StorageFailure):
        directory.read("a", 100)
    record = FileRecord("a", 7, 100, (zlib.crc32(b"content"),))
    with watching(Disk(fails_at=0, error=error)), pytest.raises(StorageFailure):
        directory.check(record)


def test_every_call_of_the_disk_can_be_refused() -> None:
    calls = {name for name, value in vars(storage.Disk).items() if callable(value) and not name.startswith("_")}
    assert calls == set(WATCHED)


# ---------------------------------------------------------------------- a whole memory


def calls_made(home: Path, copy: Path, change: Change) -> list[tuple[str, str]]:
    """The calls by which a change reaches the disk."""
    shutil.copytree(home, copy)
    with Memory.open(copy, writable=True) as memory, watching(Disk()) as disk:
        change(memory)
    return disk.calls


def may_be_refused(call: tuple[str, str]) -> bool:
    """Whether any change is made although the disk refuses this call: removing is tried again, copies are for luck."""
    return call[0] == "remove" or call[1] in MAY_BE_MISSING


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_wherever_the_disk_refuses_a_change_it_is_done_whole_or_not_at_all(
    home: Path, tmp_path: Path, change: Change, error: int
) -> None:
    calls = calls_made(home, tmp_path / "dry", change)
    wanted = state(Memory.open(tmp_path / "dry"))
    before = state(Memory.open(home))
    assert len(calls) >= 6
    assert wanted != before or change is CHANGES["compact"]
    for place, call in enumerate(calls):
        copy = tmp_path / f"refused-{place}"
        shutil.copytree(home, copy)
        with Memory.open(copy, writable=True) as memory:
            version = memory.version
            with watching(Disk(place, error)):
                if may_be_refused(call):
                    change(memory)
                elif change in (CHANGES["forget"], CHANGES["erase"]) and error == errno.ENOSPC:
                    with suppress(StorageFailure):  # there is room held for it, unless it was made already
                        change(memory)
                else:
                    with pytest.raises(StorageFailure):
                        change(memory)
            on_disk = Memory.open(copy, verify=True)
            assert state(memory) == state(on_disk), f"the handle and the disk disagree after refused call {place}"
            assert memory.version == on_disk.version
            assert state(memory) in (before, wanted)
            if memory.version == version:
                change(memory)
            assert state(memory) == wanted
            assert memory.verify().ok
        with Memory.open(copy, writable=True) as memory:
            assert state(memory) == wanted
            assert files(copy) == named(memory), "something was left behind"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES])
def test_a_memory_that_could_not_be_created_can_be_created_again(tmp_path: Path, error: int) -> None:
    problem = classification(n=3)
    with watching(Disk()) as disk:
        empty_memory(problem, tmp_path / "dry").close()
    for place in range(len(disk.calls)):
        path = tmp_path / f"refused-{place}"
        with watching(Disk(place, error)), pytest.raises(StorageFailure):
            empty_memory(problem, path)
        if (path / "manifest.json").exists():
            assert len(Memory.open(path, writable=True)) == 0
        else:
            assert len(memory_of(problem, path)) == 3


@pytest.mark.parametrize("writable", [False, True])
def test_a_memory_that_could_not_be_opened_can_be_opened_again(home: Path, writable: bool) -> None:
    with watching(Disk()) as disk:
        Memory.open(home, writable=writable).close()
    wanted = state(Memory.open(home))
    for place in range(len(disk.calls)):
        with watching(Disk(place, errno.EIO)), pytest.raises(StorageFailure):
            Memory.open(home, writable=writable)
        with Memory.open(home, writable=writable) as memory:
            assert state(memory) == wanted


def test_a_folder_that_may_not_be_written_to_is_refused_with_the_remedy(home: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    home.chmod(0o500)
    try:
        assert len(Memory.open(home)) == 13
        with pytest.raises(StorageFailure, match="writable"):
            Memory.open(home, writable=True).compact()
    finally:
        home.chmod(0o700)


def test_the_next_writer_sweeps_what_an_interrupted_one_left(home: Path) -> None:
    left = {"rows-00000099-deadbeef.safetensors", "gone-00000099-deadbeef.safetensors", "manifest.json.part"}
    for name in (*left, "notes.txt"):
        (home / name).write_bytes(b"half a fi")
    reader = Memory.open(home, verify=True)
    assert len(reader) == 13
    assert left <= files(home), "a reader removes nothing"
    with Memory.open(home, writable=True) as memory:
        assert files(home) == named(memory) | {"notes.txt"}


def test_a_writer_holds_room_for_forgetting_from_the_start(home: Path) -> None:
    (home / "reserve").unlink()
    Memory.open(home)
    assert not (home / "reserve").exists(), "a reader writes nothing"
    Memory.open(home, writable=True).close()
    assert (home / "reserve").stat().st_size >= 64 << 10


def test_room_that_cannot_grow_is_not_given_up(directory: Directory) -> None:
    directory.keep_reserve(100)
    with watching(Disk()) as disk:
        directory.keep_reserve(1_000)
    (directory.path / "reserve").unlink()
    directory.keep_reserve(100)
    for place in range(len(disk.calls)):
        with watching(Disk(place)):
            directory.keep_reserve(1_000)
        assert (directory.path / "reserve").stat().st_size == 200, "as much as before, on a disk that is full"
    directory.keep_reserve(1_000)
    assert (directory.path / "reserve").stat().st_size == 2_000


# ---------------------------------------------------------------------- one writer

WRITER = """
import sys
from residual_memory.memory import Memory
memory = Memory.open(sys.argv[1], writable=True)
print("open", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def writer(home: Path) -> Any:
    """Another process that holds the memory open for writing."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_writer_is_refused_at_once_and_told_who_writes(home: Path, writer: Any) -> None:
    started = time.monotonic()
    with pytest.raises(MemoryLocked, match=rf"process {writer.pid}\b.*read-only"):
        Memory.open(home, writable=True)
    assert time.monotonic() - started < 1
    assert len(Memory.open(home)) == 13, "readers are welcome"


def test_a_killed_writer_locks_nobody_out(home: Path, writer: Any) -> None:
    writer.kill()
    writer.wait()
    with Memory.open(home, writable=True) as memory:
        add(memory)
        assert len(memory) == 19


def test_a_second_writer_in_the_same_process_is_refused_too(home: Path) -> None:
    with Memory.open(home, writable=True):
        with pytest.raises(MemoryLocked, match=str(os.getpid())):
            Memory.open(home, writable=True)
    Memory.open(home, writable=True).close()


def test_a_memory_made_in_the_meantime_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = classification(n=3)
    lock = Directory.lock

    def lose_the_race(directory: Directory) -> None:
        monkeypatch.setattr(Directory, "lock", lock)
        memory_of(problem, directory.path / "elsewhere").close()
        for name in ("manifest.json", *(entry for entry in files(directory.path / "elsewhere") if "rows" in entry)):
            os.rename(directory.path / "elsewhere" / name, directory.path / name)
        lock(directory)

    monkeypatch.setattr(Directory, "lock", lose_the_race)
    with pytest.raises(ResidualMemoryError):
        empty_memory(problem, tmp_path / "memory")
    assert len(Memory.open(tmp_path / "memory")) == 3
