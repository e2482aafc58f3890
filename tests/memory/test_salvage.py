"""From a damaged memory each row that is as it was written comes back, but for those that were forgotten."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residual_memory.errors import CorruptFile, InvalidInput, MemoryNotFound, StorageFailure
from residual_memory.memory import Memory, segments, storage
from residual_memory.memory.salvage import Salvage, salvage
from tests.memory.faults import Disk, watching
from tests.memory.test_format import flipped, parsed, with_header
from tests.problems import LAYOUTS, Problem, classification, empty_memory, told

PROBLEM = classification(n=12, d=2, c=2)
NAMES = [f"row-{n}" if n % 2 else "ü" * (n + 1) for n in range(12)]
CARRYING = {"owners": "zoë", "tags": ["a", "b"], "expires": 7}
KINDS: dict[str, dict[str, Any]] = {
    "numbers": {},
    "names": {"ids": NAMES, "groups": [f"g{n // 2}" for n in range(12)], **CARRYING},
    "log8": {**LAYOUTS["log8"]},
}
FORGOTTEN = [1, 6]


@pytest.fixture(autouse=True)
def _segments_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MERGE_BYTES", 0)


def made(path: Path, kind: str) -> Path:
    """Three segments of four rows each, two of them forgotten."""
    options = dict(KINDS[kind])
    names = {name: options.pop(name, None) for name in ("ids", "groups")}
    carrying = {name: options.pop(name) for name in CARRYING if name in options}
    source = {"layer": "fc"}
    with empty_memory(PROBLEM, path, class_names=["no", "yes"], source=source, metric="cosine", **options) as memory:
        for first in (0, 4, 8):
            part = slice(first, first + 4)
            some = PROBLEM.rows(part)
            given = {name: values[part] for name, values in names.items() if values is not None}
            more = {**carrying, "snippets": NAMES[part]} if carrying and first else {}
            memory.append(some.keys, some.labels, told(memory, some), **given, **more)
        memory.save_setting({"n_neighbors": 3})
        memory.forget(memory.ids[FORGOTTEN])
    return path


@pytest.fixture(scope="module", params=KINDS)
def template(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "MERGE_BYTES", 0)
        return made(tmp_path_factory.mktemp("salvage") / "memory", request.param)


@pytest.fixture
def home(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "memory")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk: no power fails here."""
    monkeypatch.setattr(storage.Disk, "sync", lambda disk, file: None)
    monkeypatch.setattr(storage.Disk, "sync_folder", lambda disk, folder: None)


def rows_in(path: Path) -> dict[int, dict[str, Any]]:
    """All that is stored of each row, to the bit, by its place in the problem; by the key, which nobody forges."""
    snapshot = Memory.open(path, verify=True).snapshot
    rows = np.flatnonzero(snapshot.alive)
    places = {key.tobytes(): place for place, key in enumerate(unit_keys())}
    names = [name for name in snapshot.tables[0] if name not in ("keys", "ids", "groups") and "_" not in name]
    columns = {name: snapshot.column(name).take(rows) for name in names if name in NUMBERS}
    found = snapshot.attributes(rows)
    groups = snapshot.all_groups
    listed = {}
    for place, row in enumerate(rows):
        carried = (found.owners[place], int(found.expires[place]), found.tags[place], found.snippets[place])
        stored = {name: column[place].tobytes() for name, column in columns.items()}
        key = snapshot.keys.take(rows[place : place + 1])[0].tobytes()
        named = (snapshot.all_ids[row].item(), None if groups is None else groups[row].item())
        listed[places[key]] = {**stored, "carried": carried, "named": named}
    assert len(listed) == len(rows)
    return listed


NUMBERS = ("labels", "predictions", "indices", "probabilities", "rest")


def unit_keys() -> Any:
    memory = empty_memory(PROBLEM, metric="cosine")
    memory.append(PROBLEM.keys, PROBLEM.labels, PROBLEM.predictions)
    return memory.snapshot.keys.take(np.arange(12))


def bytes_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def rows_files(path: Path) -> list[str]:
    """In the order of their rows."""
    return [segment.file.name for segment in Memory.open(path).snapshot.manifest.segments]


def gone_file(path: Path) -> Path:
    return next(path.glob("gone-*"))


def damage(file: Path, place: int | None = None) -> None:
    content = file.read_bytes()
    file.write_bytes(flipped(content, len(content) // 2 if place is None else place, 0x10))


LIVING = set(range(12)) - set(FORGOTTEN)


# ---------------------------------------------------------------------- one damaged byte


@pytest.mark.usefixtures("quick", "unchecked")
def test_whatever_byte_is_damaged_the_rows_of_all_other_segments_come_back(home: Path, tmp_path: Path) -> None:
    wanted, order = rows_in(home), rows_files(home)
    assert set(wanted) == LIVING
    to = tmp_path / "saved"
    for name, content in bytes_of(home).items():
        if name in ("lock", "reserve"):
            continue
        for place in range(0, len(content), 13):
            (home / name).write_bytes(flipped(content, place, 1 << place % 8))
            before = bytes_of(home)
            if name.startswith("gone-"):
                with pytest.raises(CorruptFile, match=r"nobody knows which rows were forgotten.*keep_forgotten=True"):
                    salvage(home, to)
                assert not to.exists()
                result = salvage(home, to, keep_forgotten=True)
                assert set(rows_in(to)) == set(range(12))
                assert (result.rows, result.lost) == (12, 0)
            else:
                result = salvage(home, to)
                lost = range(4 * order.index(name), 4 * order.index(name) + 4) if name in order else []
                assert rows_in(to) == {row: held for row, held in wanted.items() if row not in lost}
                assert result.lost == len(LIVING & set(lost))
                assert result.rows == len(LIVING) - result.lost
                assert {problem.file for problem in result.problems} == {name} - {"manifest.copy"}
            assert bytes_of(home) == before, "the damaged memory is not changed"
            shutil.rmtree(to)
        (home / name).write_bytes(content)


def test_what_the_memory_says_of_itself_is_kept(home: Path, tmp_path: Path) -> None:
    file = home / rows_files(home)[1]
    damage(file, file.stat().st_size - 1)
    result = salvage(home, tmp_path / "saved")
    assert isinstance(result, Salvage)
    before, memory = Memory.open(home), Memory.open(tmp_path / "saved", writable=True)
    assert (memory.class_names, memory.source, memory.setting) == (("no", "yes"), {"layer": "fc"}, {"n_neighbors": 3})
    assert (memory.layout, memory.next_id) == (before.layout, before.next_id)
    assert (memory.n_forgotten, memory.version) == (0, 1)
    assert [(change.what, change.rows) for change in memory.history] == [("append", result.rows)]
    if memory.snapshot.manifest.id_kind == "integer":
        some = PROBLEM.rows([0])
        assert memory.append(some.keys, some.labels, told(memory, some)).tolist() == [12]
    memory.forget(memory.ids[:1])
    memory.compact()
    assert memory.verify().ok


def test_a_whole_memory_is_saved_whole_but_for_its_forgotten_rows(home: Path, tmp_path: Path) -> None:
    assert salvage(home, tmp_path / "saved") == Salvage(10, 0, ())
    assert rows_in(tmp_path / "saved") == rows_in(home)
    content = b"".join(bytes_of(tmp_path / "saved").values())
    assert not any(unit_keys()[row].tobytes() in content for row in FORGOTTEN)
    assert unit_keys()[0].tobytes() in content


@pytest.mark.parametrize("lose", [lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-9])])
def test_a_segment_that_is_missing_or_cut_costs_its_rows_alone(
    home: Path, tmp_path: Path, lose: Callable[[Path], Any]
) -> None:
    wanted = rows_in(home)
    lose(home / rows_files(home)[2])
    assert salvage(home, tmp_path / "saved").lost == 4
    assert rows_in(tmp_path / "saved") == {row: held for row, held in wanted.items() if row < 8}


# ---------------------------------------------------------------------- the manifest and what was forgotten


def test_without_manifest_and_copy_nothing_is_saved(home: Path, tmp_path: Path) -> None:
    damage(home / "manifest.json")
    damage(home / "manifest.copy")
    with pytest.raises(CorruptFile, match=r"so is its copy.*backup"):
        salvage(home, tmp_path / "saved")
    (home / "manifest.copy").unlink()
    with pytest.raises(CorruptFile, match=r"so is its copy.*missing"):
        salvage(home, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def with_an_older_copy(home: Path, change: Callable[[Memory], Any]) -> None:
    """Change a memory, and leave it with the copy of before and a manifest that cannot be read."""
    copy = (home / "manifest.copy").read_bytes()
    with Memory.open(home, writable=True) as memory:
        change(memory)
    (home / "manifest.copy").write_bytes(copy)
    damage(home / "manifest.json")


@pytest.mark.parametrize("times", [1, 2])
def test_rows_forgotten_after_the_copy_was_written_do_not_come_back(home: Path, tmp_path: Path, times: int) -> None:
    """Nor do those that were forgotten before: the file that the copy names is gone by then."""
    wanted = rows_in(home)
    with_an_older_copy(home, lambda memory: [memory.forget(memory.ids[[2]]) for _ in range(times)])
    salvage(home, tmp_path / "saved")
    gone = [3, 4][:times]
    assert rows_in(tmp_path / "saved") == {row: held for row, held in wanted.items() if row not in gone}


def test_where_a_later_list_of_forgotten_rows_cannot_be_read_nothing_is_saved(home: Path, tmp_path: Path) -> None:
    with_an_older_copy(home, lambda memory: memory.forget(memory.ids[[2]]))
    gone_file(home).write_bytes(gone_file(home).read_bytes()[:-3])
    with pytest.raises(CorruptFile, match="nobody knows which rows were forgotten"):
        salvage(home, tmp_path / "saved")
    assert salvage(home, tmp_path / "saved", keep_forgotten=True).rows == 12


def test_a_list_of_forgotten_rows_from_after_a_compaction_is_not_taken_for_one_from_before(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers count other rows: a forgotten row would come back, and a living one be lost."""
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 200)

    def change(memory: Memory) -> None:
        memory.compact()
        memory.forget(memory.ids[[9]])

    with_an_older_copy(home, change)
    assert any((home / name).exists() for name in names_in_copy(home))
    with pytest.raises(CorruptFile, match=r"since a compaction.*keep_forgotten=True"):
        salvage(home, tmp_path / "saved")


def names_in_copy(home: Path) -> list[str]:
    body = json.loads((home / "manifest.copy").read_bytes())["body"]
    return [segment["file"]["name"] for segment in body["segments"]]


@pytest.mark.parametrize("name", ["gone-00000099-deadbeef.safetensors", "gone-fishing.txt", "gone-", "gone-1-2-3"])
@pytest.mark.parametrize("copied", [False, True])
def test_what_an_interrupted_or_foreign_writer_left_makes_no_row_forgotten(
    home: Path, tmp_path: Path, name: str, copied: bool
) -> None:
    wanted = rows_in(home)
    shutil.copy(gone_file(home), tmp_path / "kept")
    (home / name).write_bytes(b"half a fi" if name.endswith("deadbeef.safetensors") else b"")
    if copied:
        damage(home / "manifest.json")
    if copied and name.endswith("deadbeef.safetensors"):
        with pytest.raises(CorruptFile, match="nobody knows"):
            salvage(home, tmp_path / "saved")
    else:
        salvage(home, tmp_path / "saved")
        assert rows_in(tmp_path / "saved") == wanted


# ---------------------------------------------------------------------- damage within a segment

N = 400
WIDE = classification(n=N, d=4, c=3)
CHUNK = 256
IDS = [f"é{n:04d}" for n in range(N)]


def chunked(path: Path, problem: Problem = WIDE, **options: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "MIN_CHUNK", CHUNK)
        with empty_memory(problem, path, **options) as memory:
            names = {"ids": IDS, "snippets": [f"snippet {n}" for n in range(N)]} if options == {} else {}
            memory.append(problem.keys, problem.labels, told(memory, problem), **names)
            memory.forget(memory.ids[[0, 399]])
    return path


def touched(header: dict[str, Any], start: int, length: int, place: int) -> set[int]:
    """Rows with a byte in the damaged chunk; by the plain rules of the page."""
    first, last = place // CHUNK * CHUNK, min((place // CHUNK + 1) * CHUNK, length)
    if place < start:
        return set(range(N))
    rows: set[int] = set()
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        low, high = max(first, begin), min(last, end)
        if low >= high:
            continue
        if name == "snippets_ends":
            return set(range(N))
        if name == "snippets":
            ends = np.cumsum([len(f"snippet {n}") for n in range(N)]) + begin
            rows |= {n for n in range(N) if ends[n] > low and ends[n] - len(f"snippet {n}") < high}
        else:
            width = (end - begin) // N
            rows |= set(range((low - begin) // width, (high - 1 - begin) // width + 1))
    return rows


@pytest.mark.parametrize("options", [{}, LAYOUTS["log8"]], ids=["names", "log8"])
@pytest.mark.usefixtures("quick", "unchecked")
def test_only_rows_in_the_damaged_chunk_are_lost(tmp_path: Path, options: dict[str, Any]) -> None:
    home = chunked(tmp_path / "memory", **options)
    snapshot = Memory.open(home).snapshot
    (name,) = rows_files(home)
    content = (home / name).read_bytes()
    header, data = parsed(home / name)
    few = 0
    for place in range(0, len(content), 499):
        (home / name).write_bytes(flipped(content, place, 0x80))
        result = salvage(home, tmp_path / "saved")
        saved = Memory.open(tmp_path / "saved", verify=True).snapshot
        kept = sorted(set(range(1, 399)) - touched(header, len(content) - len(data), len(content), place))
        assert saved.all_ids.tolist() == snapshot.all_ids[kept].tolist(), f"byte {place}"
        few += 0 < 398 - len(kept) < 60
        assert result.rows + result.lost == 398
        rows = np.searchsorted(snapshot.all_ids, saved.all_ids)
        for column in saved.layout.columns(saved.manifest.top_m):
            if len(rows):
                assert saved.column(column).take(np.arange(len(rows))).tobytes() == (
                    snapshot.column(column).take(rows).tobytes()
                ), "codes too are kept to the bit"
        if options == {}:
            assert saved.texts("snippets").decoded() == [f"snippet {row}" for row in rows]
        shutil.rmtree(tmp_path / "saved")
    assert few > 10


def test_a_damaged_header_that_tells_of_other_columns_costs_the_segment(tmp_path: Path) -> None:
    """As long as the right one and in itself in order, but for which column is where."""
    home = tmp_path / "memory"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "MIN_CHUNK", CHUNK)
        with empty_memory(WIDE, home) as memory:
            memory.append(WIDE.keys, WIDE.labels, WIDE.predictions, ids=np.arange(N), groups=np.arange(N)[::-1])
    (name,) = rows_files(home)
    header, data = parsed(home / name)
    header["ids"], header["groups"] = header["groups"], header["ids"]
    text = json.dumps(header, separators=(",", ":")).encode()
    content = with_header(text + b" " * (-len(text) % 8), data)
    assert len(content) == (home / name).stat().st_size
    (home / name).write_bytes(content)
    assert salvage(home, tmp_path / "saved").lost == N


# ---------------------------------------------------------------------- where to


def test_what_is_there_already_is_left_alone(home: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for to in ("notes", "file", "memory"):
        with pytest.raises(InvalidInput, match="already exists"):
            salvage(home, tmp_path / to)
    assert (tmp_path / "notes" / "todo.txt").read_text() == "x"
    with pytest.raises(MemoryNotFound):
        salvage(tmp_path / "nothing", tmp_path / "saved")
    (tmp_path / "empty").mkdir()
    assert salvage(home, tmp_path / "empty").rows == 10


@pytest.mark.usefixtures("quick")
def test_wherever_the_disk_refuses_there_is_a_whole_memory_or_none(home: Path, tmp_path: Path) -> None:
    with watching(Disk()) as disk:
        salvage(home, tmp_path / "dry")
    wanted = rows_in(tmp_path / "dry")
    assert len(disk.calls) > 20
    entries = set(os.listdir(tmp_path))
    for place in range(0, len(disk.calls), 2):
        with watching(Disk(place)):
            try:
                salvage(home, tmp_path / "saved")
            except (StorageFailure, CorruptFile):
                assert set(os.listdir(tmp_path)) <= entries | {"saved"}, "nothing half is left"
        if (tmp_path / "saved").exists():
            assert rows_in(tmp_path / "saved") == wanted
            shutil.rmtree(tmp_path / "saved")
