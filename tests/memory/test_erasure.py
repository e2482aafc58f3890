"""What is erased is in no file, leaves no trace in any prediction, and is certified to be gone only when it is."""

import datetime
import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray

from residual_memory.errors import CorruptFile, MemoryNotFound, StorageFailure
from residual_memory.memory import Memory, erasure, segments, storage
from residual_memory.memory.erasure import Certificate, Search
from residual_memory.memory.format import canonical
from residual_memory.memory.storage import Directory
from tests.problems import Problem, classification, empty_memory, knn_of, memory_of, same_bits

N, N_CANARIES = 3000, 1000
PROBLEM = classification(n=N + N_CANARIES, q=20, d=8, seed=7)
SPEC = "faiss:IVF4,Flat?nprobe=4"
BLOCKS = 4

Part = dict[str, Any]


@dataclass(frozen=True)
class Planted:
    """A memory into which canaries were put, and what they are made of."""

    path: Path
    canaries: ndarray
    marks: dict[str, list[bytes]]


def is_canary() -> ndarray:
    chosen = np.zeros(N + N_CANARIES, bool)
    chosen[np.random.default_rng(3).choice(N + N_CANARIES, N_CANARIES, replace=False)] = True
    return chosen


def ids_of(chosen: ndarray) -> ndarray:
    return np.array([f"{'canary' if c else 'living'}-id-{n:05d}" for n, c in enumerate(chosen)])


def block(chosen: ndarray, rows: ndarray) -> Part:
    kinds = ["canary" if chosen[row] else "living" for row in rows]
    some = PROBLEM.rows(rows)
    return {
        "keys": some.keys,
        "labels": some.labels,
        "predictions": some.predictions,
        "ids": ids_of(chosen)[rows],
        "owners": [f"{kind}-owner-{row}" for kind, row in zip(kinds, rows, strict=True)],
        "snippets": [f"{kind}-snippet-{row}" for kind, row in zip(kinds, rows, strict=True)],
        "tags": [[f"{kind}-tag-{row}", "all"] for kind, row in zip(kinds, rows, strict=True)],
    }


def in_blocks(chosen: ndarray, rows: ndarray) -> Iterator[Part]:
    return (block(chosen, part) for part in np.array_split(rows, BLOCKS))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    path, chosen = tmp_path_factory.mktemp("erasure") / "memory", is_canary()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "MERGE_BYTES", 0)
        with empty_memory(PROBLEM, path, key_dtype="float32") as memory:
            for part in in_blocks(chosen, np.arange(N + N_CANARIES)):
                memory.append(**part)
            knn_of(memory, index=SPEC).save_index()
            assert len(memory.snapshot.tables) == BLOCKS
    rows = np.flatnonzero(chosen)
    marks = {
        "keys": [PROBLEM.keys[row].astype(np.float32).tobytes() for row in rows],
        "ids": [name.encode() for name in ids_of(chosen)[rows].tolist()],
        "owners": [f"canary-owner-{row}".encode() for row in rows],
        "snippets": [f"canary-snippet-{row}".encode() for row in rows],
        "tags": [f"canary-tag-{row}".encode() for row in rows],
    }
    return Planted(path, ids_of(chosen)[rows], marks)


@pytest.fixture
def planted(template: Planted, tmp_path: Path) -> Planted:
    return replace(template, path=shutil.copytree(template.path, tmp_path / "memory"))


def finds(planted: Planted) -> dict[str, int]:
    """How many marks of the canaries lie in any file: read by another way than the library's."""
    content = b"\n".join(file.read_bytes() for file in sorted(planted.path.iterdir()))
    return {name: sum(content.find(mark) >= 0 for mark in marks) for name, marks in planted.marks.items()}


NONE = {"keys": 0, "ids": 0, "owners": 0, "snippets": 0, "tags": 0}
ALL = dict.fromkeys(NONE, N_CANARIES)


def test_no_byte_of_a_thousand_canaries_is_left_in_any_file(planted: Planted) -> None:
    assert finds(planted) == ALL, "the scan would see them"
    assert list(planted.path.glob("index-*.bin"))
    with Memory.open(planted.path, writable=True) as memory:
        assert memory.forget(planted.canaries) == N_CANARIES
        assert finds(planted) == ALL, "masked rows are still there"
        certificate = memory.compact(search_files=True)
        assert finds(planted) == NONE
        assert not list(planted.path.glob("index-*"))
        assert certificate is not None
        assert (certificate.erased, certificate.rows) == (N_CANARIES, N)
        assert certificate.search is not None
        assert certificate.search.found == certificate.search.shared == 0
        assert certificate.search.traces >= 6 * N_CANARIES
        files = [file for file in planted.path.iterdir() if file.name not in ("lock", "reserve")]
        assert certificate.search.files == len(files)
        assert certificate.search.bytes == sum(file.stat().st_size for file in files)
        assert len(certificate.files_removed) == BLOCKS + 3
        assert memory.verify().ok
    assert finds(planted) == NONE


def test_predictions_are_those_of_a_memory_that_never_had_the_rows(planted: Planted) -> None:
    chosen = is_canary()
    never = empty_memory(PROBLEM, key_dtype="float32")
    for part in in_blocks(chosen, np.arange(N + N_CANARIES)):
        kept = [not name.startswith("canary") for name in part["ids"]]
        never.append(**{name: [v for v, k in zip(values, kept, strict=True) if k] for name, values in part.items()})
    wanted = knn_of(never, index="exact:numpy")
    with Memory.open(planted.path, writable=True) as memory:
        knn, indexed = knn_of(memory, index="exact:numpy"), knn_of(memory, index=SPEC)
        assert not same_bits(knn(PROBLEM.queries), wanted(PROBLEM.queries)), "the canaries matter"
        memory.forget(planted.canaries)
        assert same_bits(knn(PROBLEM.queries), wanted(PROBLEM.queries))
        memory.compact()
        assert same_bits(knn(PROBLEM.queries), wanted(PROBLEM.queries))
        indexed(PROBLEM.queries)
        assert not list(planted.path.glob("index-*"))
        indexed.save_index()
        assert finds(planted) == NONE
    found, rows = Memory.open(planted.path, verify=True).snapshot, np.arange(N)
    assert same_bits(found.residuals(rows, 1.5), never.snapshot.residuals(rows, 1.5))
    assert found.ids.tolist() == never.ids.tolist()
    assert vars(found.attributes(rows))["owners"] == never.attributes(never.ids).owners
    again = knn_of(Memory.open(planted.path), index="exact:numpy")
    assert same_bits(again(PROBLEM.queries), wanted(PROBLEM.queries))


def test_rows_forgotten_in_two_steps_are_erased_together(planted: Planted) -> None:
    with Memory.open(planted.path, writable=True) as memory:
        memory.forget(planted.canaries[:400])
        memory.forget(planted.canaries[400:])
        certificate = memory.compact()
        assert certificate is not None
        assert certificate.names(planted.canaries)
        assert not certificate.names(planted.canaries[400:])
        assert certificate.search is None
    assert finds(planted) == NONE


def test_readers_opened_before_keep_their_version_and_files_hold_nothing(planted: Planted) -> None:
    reader = Memory.open(planted.path)
    before = knn_of(reader, index="exact:numpy")(PROBLEM.queries)
    with Memory.open(planted.path, writable=True) as memory:
        memory.forget(planted.canaries)
        memory.compact()
    assert finds(planted) == NONE
    assert len(reader) == N + N_CANARIES
    assert same_bits(knn_of(reader, index="exact:numpy")(PROBLEM.queries), before)
    assert reader.refresh()
    assert len(reader) == N


def test_large_segments_without_forgotten_rows_stay_as_they_are(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Memory.open(planted.path, writable=True) as memory:
        names = [segment.file.name for segment in memory.snapshot.manifest.segments]
        monkeypatch.setattr(segments, "SEGMENT_BYTES", memory.snapshot.manifest.segments[0].file.length)
        where = [row for row, name in enumerate(memory.ids.tolist()) if "canary" in name and 1000 <= row < 2000]
        memory.forget(memory.ids[where])
        contents = {name: (planted.path / name).read_bytes() for name in names}
        certificate = memory.compact(search_files=True)
        assert certificate is not None
        assert certificate.search is not None
        assert certificate.search.found == 0
        kept = [segment.file.name for segment in memory.snapshot.manifest.segments]
        assert [name for name in kept if name in names] == [names[0], names[2], names[3]]
        assert not (planted.path / names[1]).exists()
        assert all((planted.path / name).read_bytes() == contents[name] for name in kept if name in names)
        assert memory.verify().ok
    chosen = is_canary()
    assert len(where) == chosen[1000:2000].sum()
    gone = [f"canary-snippet-{row}".encode() for row in where]
    content = b"".join(file.read_bytes() for file in planted.path.iterdir())
    assert not any(mark in content for mark in gone)
    stayed = np.setdiff1d(np.arange(N + N_CANARIES), where)
    found = Memory.open(planted.path)
    assert found.ids.tolist() == ids_of(chosen)[stayed].tolist()
    np.testing.assert_array_equal(
        found.snapshot.keys.take(np.arange(len(stayed))), PROBLEM.keys[stayed].astype(np.float32)
    )


# ---------------------------------------------------------------------- the search


def small(path: Path | None = None, **carrying: Any) -> tuple[Memory, Problem]:
    problem = classification(n=20)
    memory = empty_memory(problem, path)
    memory.append(problem.keys, problem.labels, problem.predictions, **carrying)
    return memory, problem


def searched(memory: Memory) -> Search:
    certificate = memory.compact(search_files=True)
    assert certificate is not None
    assert certificate.search is not None
    return certificate.search


@pytest.mark.parametrize("where", [0, 1, 4096, 12345])
def test_an_erased_row_in_a_stray_file_is_found(tmp_path: Path, where: int) -> None:
    memory, problem = small(tmp_path / "memory", snippets=[f"a snippet of {n:02}" for n in range(20)])
    stray = tmp_path / "memory" / "backup.tmp"
    stray.write_bytes(bytes(where) + problem.keys[3].tobytes() + b"..." + b"a snippet of 03" + bytes(7))
    memory.forget([3, 5])
    assert searched(memory).found == 2
    stray.unlink()
    memory.forget([4])
    assert searched(memory).found == 0


def test_a_living_row_of_the_same_key_is_told_apart(tmp_path: Path) -> None:
    problem = classification(n=20)
    keys = problem.keys.copy()
    keys[[5, 6]] = keys[3]
    memory = empty_memory(problem, tmp_path / "memory")
    memory.append(keys, problem.labels, problem.predictions)
    memory.forget([3])
    found = searched(memory)
    assert (found.found, found.shared) == (0, 2)


def test_a_living_row_of_the_same_owner_is_told_apart_whatever_else_has_that_text(tmp_path: Path) -> None:
    """An erased row's group, tag and snippet may be the same text as its owner, which other rows have too."""
    memory, _ = small(
        tmp_path / "memory",
        owners=["alice@example.org"] * 20,
        groups=["alice@example.org"] * 20,
        snippets=["alice@example.org", *["nothing of interest"] * 19],
    )
    memory.forget([0])
    found = searched(memory)
    assert (found.found, found.shared) == (0, 38)


def test_values_of_living_rows_that_together_look_like_an_erased_one_are_told_apart(tmp_path: Path) -> None:
    """As in a tree, whose few leaves give few predictions: 0.7, 0.3 lies across two rows of 0.3, 0.7."""
    memory = Memory.create(tmp_path / "memory", dim=8, n_outputs=2)
    said = np.array([[0.7, 0.3]] + [[0.3, 0.7]] * 19)
    memory.append(classification(n=20, d=8).keys, [0] * 20, said)
    memory.forget([0])
    found = searched(memory)
    assert found.traces == 2
    assert (found.found, found.shared) == (0, 18)


def test_keys_that_are_too_plain_to_look_for_are_counted(tmp_path: Path) -> None:
    problem = classification(n=20)
    keys = problem.keys.copy()
    keys[[3, 4]] = 0
    memory = empty_memory(problem, tmp_path / "memory")
    memory.append(keys, problem.labels, problem.predictions, ids=np.arange(20))
    memory.forget([3, 5])
    found = searched(memory)
    assert found.found == found.shared == 0
    assert found.traces == 3, "one key and two predictions"
    assert found.too_plain == 1 + 2 + 2, "a key of zeros, small ids and labels"


def test_nothing_is_searched_in_ram_and_nothing_certified_without_erasing(problem: Problem, tmp_path: Path) -> None:
    memory = memory_of(problem)
    assert memory.compact(search_files=True) is None
    memory.forget([1])
    certificate = memory.compact(search_files=True)
    assert certificate is not None
    assert (certificate.memory, certificate.search, certificate.files_removed) == (None, None, ())
    assert certificate.names([1])
    with memory_of(problem, tmp_path / "memory") as memory:
        assert memory.compact(search_files=True) is None


@given(data=st.data())
@settings(max_examples=150)
def test_the_search_finds_what_find_finds_also_at_the_borders_of_blocks(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = data.draw(st.lists(st.binary(min_size=8, max_size=24), min_size=1, max_size=4, unique=True))
    chosen = {text: place for text in whole if (place := erasure._telling(text)) is not None}
    if not chosen:
        return
    filler = st.one_of(st.binary(max_size=40), st.sampled_from(whole), st.sampled_from(whole).map(lambda t: t[:-1]))
    content = b"".join(data.draw(st.lists(filler, max_size=12)))
    ordered = sorted(chosen, key=lambda text: int.from_bytes(text[chosen[text] : chosen[text] + 8], "little"))
    windows = np.array([int.from_bytes(t[chosen[t] : chosen[t] + 8], "little") for t in ordered], np.uint64)
    traces = erasure.Traces(
        ordered, [frozenset({"keys"})] * len(ordered), windows, np.array([chosen[t] for t in ordered]), 0
    )
    folder = tmp_path_factory.mktemp("blocks")
    (folder / "file").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(erasure, "BLOCK", data.draw(st.integers(1, 300)))
        found = sorted(erasure._finds(Directory(folder), "file", traces, erasure._filter(windows)))
    wanted = [
        (place, which)
        for which, text in enumerate(ordered)
        for place in range(len(content))
        if content[place : place + len(text)] == text
    ]
    assert found == sorted(wanted)


# ---------------------------------------------------------------------- the certificate


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    memory, _ = small(tmp_path / "memory", owners="zoë")
    memory.save_setting({"n_neighbors": 3})
    memory.save_source({"projection": {"rank": 4}})
    memory.forget([2, 3, 17])
    found = memory.compact(search_files=True)
    assert found is not None
    return found


def test_a_certificate_says_what_was_done(certificate: Certificate, tmp_path: Path) -> None:
    assert (certificate.memory, certificate.erased, certificate.rows) == ("memory", 3, 17)
    assert (certificate.version_before, certificate.version) == (4, 5)
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(certificate.at)
    assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=5)
    assert len(certificate.files_removed) == 2
    assert not any((tmp_path / "memory" / name).exists() for name in certificate.files_removed)
    said = " ".join(certificate.remains)
    assert all(word in said for word in ("base model", "setting", "projection", "backups"))


def test_a_certificate_comes_back_from_its_file(certificate: Certificate, tmp_path: Path) -> None:
    for one in (certificate, replace(certificate, search=None, memory=None, files_removed=())):
        one.save(tmp_path / "certificate.json")
        assert Certificate.load(tmp_path / "certificate.json") == one
    with pytest.raises(MemoryNotFound):
        Certificate.load(tmp_path / "none.json")


def test_a_certificate_with_any_byte_changed_or_cut_is_refused(certificate: Certificate, tmp_path: Path) -> None:
    file = tmp_path / "certificate.json"
    certificate.save(file)
    content = file.read_bytes()
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        with pytest.raises(CorruptFile):
            Certificate.load(file)
        file.write_bytes(content[:place])
        with pytest.raises(CorruptFile):
            Certificate.load(file)


@pytest.mark.parametrize(
    "change",
    [{"format": 9}, {"format": None}, {"search": 1}, {"search": {}}, {"remains": 1}, {"added": 1}],
    ids=str,
)
def test_a_file_that_is_no_certificate_is_refused_under_a_right_checksum(
    certificate: Certificate, tmp_path: Path, change: dict[str, Any]
) -> None:
    file = tmp_path / "certificate.json"
    certificate.save(file)
    body = json.loads(file.read_bytes())["body"]
    file.write_bytes(canonical({**body, **change}))
    with pytest.raises(CorruptFile, match="no certificate"):
        Certificate.load(file)


def test_a_certificate_names_its_rows_and_no_others(certificate: Certificate) -> None:
    assert certificate.names([17, 2, 3])
    for ids in ([2, 3], [2, 3, 17, 18], [2, 3, 18], ["2", "3", "17"]):
        assert not certificate.names(ids)


# ---------------------------------------------------------------------- a disk that removes nothing


@pytest.mark.parametrize("prefix", ["rows-", "index-"])
def test_files_that_cannot_be_removed_are_named_and_the_next_call_ends_it(
    planted: Planted, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = storage.Disk.remove

    def refuse(disk: storage.Disk, path: Path) -> None:
        if path.name.startswith(prefix):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        remove(disk, path)

    with Memory.open(planted.path, writable=True) as memory:
        memory.forget(planted.canaries)
        monkeypatch.setattr(storage.Disk, "remove", refuse)
        with pytest.raises(StorageFailure, match=rf"{prefix}.*may still be there.*compact\(\) once more"):
            memory.compact()
        assert (len(memory), memory.n_forgotten) == (N, 0)
        assert not [name for name in memory.ids.tolist() if "canary" in name]
        assert finds(planted)["keys"] == N_CANARIES
        with pytest.raises(StorageFailure, match="may still be there"):
            memory.compact()
        reader = Memory.open(planted.path, verify=True)
        assert reader.ids.tolist() == memory.ids.tolist()
        knn_of(memory, index=SPEC)(PROBLEM.queries)
        monkeypatch.setattr(storage.Disk, "remove", remove)
        certificate = memory.compact(search_files=True)
        assert certificate is not None, "the proof is not lost with the call that failed"
        assert certificate.names(planted.canaries)
        assert certificate.search is not None
        assert (certificate.search.found, certificate.search.traces > N_CANARIES) == (0, True)
        assert memory.compact() is None
        assert finds(planted) == NONE
        assert not list(planted.path.glob("index-*"))
        assert memory.verify().ok


def test_a_disk_that_cannot_say_that_files_are_gone_says_so(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    with Memory.open(planted.path, writable=True) as memory:
        memory.forget(planted.canaries)
        sync, calls = storage.Disk.sync_folder, []

        def last_refused(disk: storage.Disk, folder: Path) -> None:
            calls.append(folder)
            if len(calls) == 3:  # after the rows and the manifest
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            sync(disk, folder)

        monkeypatch.setattr(storage.Disk, "sync_folder", last_refused)
        with pytest.raises(StorageFailure, match="may still be there"):
            memory.compact()
        assert len(memory) == N
        certificate = memory.compact()
        assert certificate is not None, "the proof is not lost with the call that failed"
        assert certificate.names(planted.canaries)
        assert memory.compact() is None
        assert finds(planted) == NONE
