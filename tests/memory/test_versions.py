"""What a memory tells of its changes, what a look at it finds, and that memories of format 1 live on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residual_memory.errors import CorruptFile, MemoryNotFound
from residual_memory.memory import Memory, storage, verify
from residual_memory.memory.attributes import NEVER
from residual_memory.memory.format import FORMAT, MAX_HISTORY
from residual_memory.memory.storage import Directory, FileRecord
from tests.memory.golden.make import HERE, contents
from tests.memory.test_format import body_of, flipped, forge, gone_of, parsed, rows_of, with_header
from tests.problems import Problem, classification, empty_memory, memory_of

OLD = HERE / "format-1"

# ---------------------------------------------------------------------- format 1


def old(kind: str, path: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of a golden memory of format 1, and what it holds."""
    wanted = json.loads((OLD / kind / "contents.json").read_text())
    return shutil.copytree(OLD / kind, path / kind), wanted


def row_like(memory: Memory) -> dict[str, Any]:
    """A row that fits the memory."""
    layout, snapshot = memory.layout, memory.snapshot
    said = np.full((1, layout.n_outputs), 1 / layout.n_outputs)
    row: dict[str, Any] = {"keys": np.ones((1, layout.dim)), "predictions": said}
    row["labels"] = [0] if layout.task == "classification" else np.zeros((1, layout.n_outputs))
    if snapshot.manifest.id_kind == "string":
        row["ids"] = ["new"]
    if snapshot.manifest.group_kind is not None:
        row["groups"] = ["new"] if snapshot.manifest.group_kind == "string" else [99]
    return row


@pytest.mark.parametrize("kind", ["strings", "values", "empty"])
def test_rows_that_carry_something_join_a_memory_of_format_1(tmp_path: Path, kind: str) -> None:
    path, wanted = old(kind, tmp_path)
    assert body_of(path)["format"] == 1
    with Memory.open(path, writable=True) as memory:
        assert not len(memory.history)
        (name,) = memory.append(**row_like(memory), owners="zoë", tags=["x"], expires=5, snippets=["s"]).tolist()
        assert body_of(path)["format"] == FORMAT
        assert memory.find({"owner": "zoë", "tag": "x", "expired": 5}).tolist() == [name]
        assert memory.find({"owner": ""}).tolist() == wanted["ids"]
        (change,) = memory.history
        assert (change.what, change.rows, change.version) == ("append", 1, wanted["version"] + 1)
    again = Memory.open(path, verify=True)
    assert again.ids.tolist() == [*wanted["ids"], name]
    assert again.n_forgotten == wanted["n_forgotten"]
    found = again.attributes(again.ids)
    n = len(wanted["ids"])
    assert (found.owners, found.snippets) == ([""] * n + ["zoë"], [""] * n + ["s"])
    assert (found.tags, found.expires.tolist()) == ([()] * n + [("x",)], [NEVER] * n + [5])
    assert contents(again)["keys"][:n] == wanted["keys"]


@pytest.mark.parametrize("kind", ["strings", "values"])
def test_rows_of_a_memory_of_format_1_are_forgotten_beside_those_that_were(tmp_path: Path, kind: str) -> None:
    path, wanted = old(kind, tmp_path)
    with Memory.open(path, writable=True) as memory:
        memory.forget(memory.ids[:1])
        assert memory.n_forgotten == wanted["n_forgotten"] + 1
    with Memory.open(path, writable=True, verify=True) as memory:
        assert memory.ids.tolist() == wanted["ids"][1:]
        certificate = memory.compact(search_files=True)
        assert certificate is not None
        assert certificate.search is not None
        assert certificate.search.found == 0
        assert certificate.erased == wanted["n_forgotten"] + 1
    found = contents(Memory.open(path, verify=True))
    assert (found["ids"], found["keys"]) == (wanted["ids"][1:], wanted["keys"][1:])


# ---------------------------------------------------------------------- the history


def test_the_history_tells_each_change_in_order(problem: Problem, place: Path | None) -> None:
    memory = memory_of(problem, place)
    memory.extend([{"keys": problem.keys, "labels": problem.labels, "predictions": problem.predictions}] * 2)
    memory.forget([3, 4])
    memory.forget(where={"label": int(problem.labels[0])})
    n = memory.history[-1].rows
    memory.save_setting({})
    memory.save_source({})
    memory.compact()
    memory.forget([])
    if place is not None:
        memory.close()
        memory = Memory.open(place)
    told = [("append", 60), ("append", 120), ("forget", 2), ("forget", n), ("setting", 0), ("source", 0)]
    assert [(change.what, change.rows) for change in memory.history] == [*told, ("compact", 2 + n)]
    assert [change.version for change in memory.history] == list(range(1, 8))
    assert [change.at for change in memory.history] == sorted(change.at for change in memory.history)


def test_the_history_drops_its_oldest_changes(problem: Problem, place: Path | None) -> None:
    memory = empty_memory(problem, place)
    for number in range(MAX_HISTORY + 7):
        if number % 2:
            memory.save_setting({"n_neighbors": number})
        else:
            some = problem.rows(slice(0, 1 + number % 3))
            memory.append(some.keys, some.labels, some.predictions)
    if place is not None:
        memory.close()
        memory = Memory.open(place, verify=True)
    assert len(memory.history) == MAX_HISTORY == 100
    assert [change.version for change in memory.history] == list(range(8, MAX_HISTORY + 8))
    wanted = [("setting", 0) if number % 2 else ("append", 1 + number % 3) for number in range(7, MAX_HISTORY + 7)]
    assert [(change.what, change.rows) for change in memory.history] == wanted


# ---------------------------------------------------------------------- a fast look


@pytest.fixture
def home(tmp_path: Path) -> Path:
    with memory_of(classification(n=20), tmp_path / "memory") as memory:
        memory.forget([0, 7])
    return tmp_path / "memory"


LOSSES: dict[str, Callable[[Path], Any]] = {
    "missing": lambda file: file.unlink(),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "grown": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "emptied": lambda file: file.write_bytes(b""),
    "of a longer header": lambda file: file.write_bytes(flipped(file.read_bytes(), 0, 1)),
    "without braces": lambda file: file.write_bytes(flipped(file.read_bytes(), 8, 1)),
}


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("which", [rows_of, gone_of])
def test_a_fast_look_finds_files_that_cannot_be_read(
    home: Path, which: Callable[[Path], Path], lose: Callable[[Path], Any]
) -> None:
    assert verify(home, fast=True).ok
    file = which(home)
    lose(file)
    report = verify(home, fast=True)
    assert (report.ok, report.full) == (False, False)
    assert [problem.file for problem in report.problems] == [file.name]


def test_a_fast_look_finds_every_column_that_is_another_one(home: Path) -> None:
    """Letters of names, types and shapes; a bit in a place of the JSON where it says the same is none."""
    file = rows_of(home)
    content = file.read_bytes()
    header, data = parsed(file)
    found = 0
    for place in range(8, len(content) - len(data)):
        file.write_bytes(flipped(content, place, 1))
        try:
            other = parsed(file)[0]
        except ValueError:
            other = None
        assert verify(home, fast=True).ok == (other == header), f"byte {place}"
        found += other != header
    assert found > 200


def test_a_column_of_a_kind_that_numpy_does_not_have_is_refused(home: Path) -> None:
    """Of fewer bytes than its shape needs, under right checksums: it would be read on into the next column."""
    header, data = parsed(rows_of(home))
    first, last = header["predictions"]["data_offsets"]
    assert header["labels"]["data_offsets"] == [last, last + 80]
    header["predictions"] |= {"dtype": "F8_E4M3", "data_offsets": [first, last - 40]}
    header["labels"]["data_offsets"] = [last - 40, last + 40]
    forge(home, with_header(json.dumps(header).encode(), data[: last - 40] + data[last:]))
    assert not verify(home, fast=True).ok
    with pytest.raises(CorruptFile, match="column 'predictions' is F8_E4M3"):
        Memory.open(home, verify=True)


def test_a_fast_look_reads_no_rows_and_says_so(home: Path) -> None:
    file = rows_of(home)
    content = file.read_bytes()
    file.write_bytes(flipped(content, len(content) - 1, 1))
    assert (verify(home, fast=True).ok, verify(home, fast=True).full) == (True, False)
    assert (verify(home).ok, verify(home).full) == (False, True)
    with Memory.open(home) as memory:
        assert (memory.verify(fast=True).ok, memory.verify().ok) == (True, False)


def test_a_fast_look_at_a_manifest_that_cannot_be_read_names_it(home: Path, tmp_path: Path) -> None:
    (home / "manifest.json").write_bytes(flipped((home / "manifest.json").read_bytes(), 30, 1))
    report = verify(home, fast=True)
    assert [problem.file for problem in report.problems] == ["manifest.json"]
    assert not report.full
    with pytest.raises(MemoryNotFound):
        verify(tmp_path / "nothing", fast=True)


# ---------------------------------------------------------------------- many threads


@pytest.mark.parametrize("span", [1, 64, 200, 1 << 20])
def test_what_several_threads_find_is_what_one_would(
    tmp_path: Path, span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "MIN_CHUNK", 64)
    directory, random = Directory(tmp_path), np.random.default_rng(span)
    records: list[FileRecord] = []
    wanted: dict[str, list[tuple[int, int]]] = {}
    for number, length in enumerate([0, 1, 63, 64, 65, 1000, 4096, 5001]):
        content = random.bytes(length)
        records.append(directory.write(f"file-{number}", [content], length))
        damaged = sorted(set(random.integers(0, length, 3).tolist())) if length and number % 2 else []
        for place in damaged:
            content = flipped(content, place, 4)
        (tmp_path / f"file-{number}").write_bytes(content)
        chunks = sorted({place // 64 for place in damaged})
        wanted[f"file-{number}"] = [(64 * chunk, min(64 * chunk + 63, length - 1)) for chunk in chunks]
    (tmp_path / "file-6").unlink()
    wanted["file-6"] = [(0, 4095)]
    monkeypatch.setattr(storage, "SPAN", span)
    found = directory.check_all(records)
    assert {name: [(damage.first, damage.last) for damage in damages] for name, damages in found.items()} == wanted
    assert found["file-6"][0].what == "is missing"
    assert [directory.check(record) for record in records] == [next(iter(found[r.name]), None) for r in records]
