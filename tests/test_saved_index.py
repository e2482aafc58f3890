"""An index saved with its memory saves the time to build it, and is never trusted."""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from numpy import ndarray

from residual_memory import correction
from residual_memory.correction import ResidualKNN
from residual_memory.errors import InvalidInput, ReadOnlyMemory, StorageFailure
from residual_memory.indexes import faiss as faiss_engine
from residual_memory.indexes import registry
from residual_memory.indexes.base import Index
from residual_memory.memory import Memory
from residual_memory.memory.format import canonical, checked_body
from residual_memory.memory.saved import BuiltPart
from tests.memory.faults import Disk, watching
from tests.problems import Problem, classification, knn_of, memory_of, same_bits

SPEC = "faiss:IVF16,PQ4x4fs?nprobe=16"
SCANN = pytest.param(
    "scann", marks=pytest.mark.skipif(importlib.util.find_spec("scann") is None, reason="scann is not installed")
)
PROBLEM = classification(n=800, q=20, d=8)


class Spy:
    """Counts the rows that are built, not loaded."""

    def __init__(self) -> None:
        self.built: list[tuple[int, int]] = []

    def __call__(self, spec: Any, keys: Any, first: int, n_rows: int, like: Index | None = None) -> Index:
        self.built.append((first, n_rows))
        return registry.build_index(spec, keys, first, n_rows, like)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy()
    monkeypatch.setattr(correction, "build_index", spy)
    return spy


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "memory"
    with memory_of(PROBLEM, path) as memory:
        knn_of(memory, index=SPEC).save_index()
    return path


@pytest.fixture
def home(template: Path, tmp_path: Path) -> Path:
    """A closed memory with a saved index."""
    return shutil.copytree(template, tmp_path / "memory")


def saved(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.glob("index-*"))


def answer(path: Path, index: str = SPEC) -> ndarray:
    return knn_of(Memory.open(path), index=index)(PROBLEM.queries)


@pytest.mark.parametrize("spec", [SPEC, "faiss:IVF16,Flat", "faiss:HNSW16,Flat", "faiss:IVF16,PQ4x4fs,RFlat", SCANN])
def test_a_saved_index_answers_as_before_and_nothing_is_built(tmp_path: Path, spec: str, spy: Spy) -> None:
    with memory_of(PROBLEM, tmp_path / "memory") as memory:
        knn = knn_of(memory, index=spec)
        before = knn(PROBLEM.queries)
        knn.save_index()
        description = knn.description
    assert spy.built == [(0, 800)]
    for writable in (False, True):
        with Memory.open(tmp_path / "memory", writable=writable) as memory:
            again = knn_of(memory, index=spec)
            assert same_bits(again(PROBLEM.queries), before)
            assert again.description == description
    assert spy.built == [(0, 800)]


def test_options_of_queries_may_differ_and_are_applied(home: Path, spy: Spy) -> None:
    few, many = (f"faiss:IVF16,PQ4x4fs?nprobe={nprobe}&k_factor=1" for nprobe in (1, 16))
    found = [knn_of(Memory.open(home), index=spec).search(PROBLEM.queries, 60)[1] for spec in (few, many)]
    assert spy.built == []
    assert (found[0].rows < 0).any()
    assert (found[1].rows >= 0).all()
    with pytest.raises(InvalidInput, match="nprobes"):
        answer(home, "faiss:IVF16,PQ4x4fs?nprobes=2")


def test_another_recall_is_chosen_from_what_was_measured_and_nothing_is_built_or_measured(
    home: Path, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faiss_engine, "calibrated", None)
    found = [knn_of(Memory.open(home), index=f"faiss:IVF16,PQ4x4fs?recall={recall}") for recall in (0.3, 0.9)]
    assert found[0].description != found[1].description
    assert spy.built == []


@pytest.mark.parametrize("spec", ["faiss:IVF8,PQ4x4fs", "faiss:IVF16,Flat", "exact", "auto"])
def test_another_index_is_built_not_loaded(home: Path, spec: str, spy: Spy) -> None:
    answer(home, spec)
    assert spy.built == [(0, 800)]


def test_an_automatic_index_is_saved_as_what_it_came_to(
    tmp_path: Path, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "EXACT_UP_TO", 100)
    monkeypatch.setattr(registry, "auto_factory", lambda width, n_rows, ram: f"IVF{n_rows // 100},Flat")
    with memory_of(PROBLEM, tmp_path / "memory") as memory:
        knn_of(memory, index="auto").save_index()
    answer(tmp_path / "memory", "auto")
    answer(tmp_path / "memory", "faiss:IVF8,Flat")
    assert spy.built == [(0, 800)]


# ---------------------------------------------------------------------- never trusted


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def linked(file: Path) -> None:
    shutil.move(file, file.with_suffix(".away"))
    file.symlink_to(file.with_suffix(".away"))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "flipped": flipped,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "empty": lambda file: file.write_bytes(b""),
    "missing": os.unlink,
    "linked": linked,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("kind", ["*.json", "*.bin"])
def test_a_damaged_index_is_built_again_and_the_memory_is_whole(
    home: Path, kind: str, damage: Callable[[Path], Any], spy: Spy
) -> None:
    right = answer(home)
    assert spy.built == []
    (file,) = home.glob(f"index-{kind}")
    damage(file)
    np.testing.assert_array_equal(answer(home), right)
    assert spy.built == [(0, 800)]
    report = Memory.open(home, verify=True).verify()
    assert report.ok
    assert [problem.file for problem in report.ignored] == (
        [] if not file.exists() and kind == "*.json" else [file.name]
    )
    with Memory.open(home, writable=True) as memory:
        knn_of(memory, index=SPEC).save_index()
        assert memory.verify().ignored == ()
    answer(home)
    assert len(spy.built) == 2


@pytest.mark.parametrize("place", range(0, 40_000, 3_333))
def test_no_byte_of_a_saved_index_may_differ(home: Path, place: int, spy: Spy) -> None:
    (file,) = home.glob("index-*.bin")
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 0x10
    file.write_bytes(content)
    answer(home)
    assert spy.built == [(0, 800)]


def test_an_index_of_another_memory_is_passed_over(home: Path, tmp_path: Path, spy: Spy) -> None:
    other = tmp_path / "other"
    problem = classification(n=800, d=8, seed=1)
    memory_of(problem, other).close()
    for name in saved(home):
        shutil.copy(home / name, other / name)
    answer(other)
    assert spy.built == [(0, 800)]


def test_another_version_of_the_engine_builds_its_own(home: Path, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss, "__version__", "0.1")
    answer(home)
    assert spy.built == [(0, 800)]


CRAFTED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "format": lambda body: body.update(format=1),
    "file": lambda body: body.update(file="index-0.json"),
    "generation": lambda body: body.update(generation=1),
    "rows": lambda body: body.update(n_rows=801),
    "no rows": lambda body: body.update(n_rows=0),
    "first": lambda body: body.update(first=-1),
    "sample": lambda body: body.update(sample=body["sample"] ^ 1),
    "name": lambda body: body.update(name=3),
    "description": lambda body: body.update(description=None),
    "measured": lambda body: body.update(measured=[]),
    "points": lambda body: body.update(measured={"n_queries": 1, "n_neighbors": [1], "points": [{"effort": 1}]}),
    "extra": lambda body: body.update(code="import os"),
    "outside": lambda body: body["pieces"]["index"].update(name="../memory/manifest.json"),
    "of the memory": lambda body: body["pieces"]["index"].update(name="manifest.json"),
    "length": lambda body: body["pieces"]["index"].update(length=1),
    "pieces": lambda body: body.update(pieces=[]),
    "other pieces": lambda body: body.update(pieces={"other": body["pieces"]["index"]}),
    "no pieces": lambda body: body.update(pieces={}),
}


@pytest.mark.parametrize("craft", CRAFTED.values(), ids=CRAFTED)
def test_a_description_that_does_not_fit_is_passed_over(
    home: Path, craft: Callable[[dict[str, Any]], Any], spy: Spy
) -> None:
    right = answer(home)
    (file,) = home.glob("index-*.json")
    body = checked_body(file.read_bytes(), "")
    craft(body)
    file.write_bytes(canonical(body))
    np.testing.assert_array_equal(answer(home), right)
    assert spy.built == [(0, 800)]


def test_bytes_that_the_engine_cannot_read_are_passed_over(home: Path, spy: Spy) -> None:
    """As if another engine had written them, under right checksums."""
    with Memory.open(home, writable=True) as memory:
        parts = memory.saved_parts(memory.snapshot)
        os.unlink(home / parts[0].file)
        memory.save_parts(
            memory.snapshot, [BuiltPart(parts[0].name, 0, 800, "faiss", None, lambda: {"index": b"IxFlnonsense"})]
        )
        assert memory.verify().ignored == ()
    answer(home)
    assert spy.built == [(0, 800)]


def test_what_is_saved_is_described_as_plain_json(home: Path) -> None:
    (file,) = home.glob("index-*.json")
    body = json.loads(file.read_bytes())["body"]
    assert body["name"].startswith("faiss ")
    assert body["name"].endswith(":IVF16,PQ4x4fs")
    assert (body["first"], body["n_rows"], body["generation"]) == (0, 800, 0)
    assert file.name.startswith("index-00000000-000000000000-000000000800-")


# ---------------------------------------------------------------------- with a memory that changes


def add(memory: Memory, n: int, seed: int = 5) -> Problem:
    more = classification(n=n, d=8, seed=seed)
    memory.append(more.keys, more.labels, more.predictions)
    return more


def test_rows_appended_after_saving_become_one_new_part(home: Path, spy: Spy) -> None:
    with Memory.open(home, writable=True) as memory:
        for seed in range(3):
            add(memory, 100, seed)
        knn = knn_of(memory, index="faiss:IVF16,PQ4x4fs?nprobe=16")
        assert spy.built == [(800, 300)]
        before = knn(PROBLEM.queries)
    assert same_bits(answer(home), before)


def test_saving_again_writes_what_is_new_and_keeps_the_rest(tmp_path: Path, spy: Spy) -> None:
    spec = "faiss:IVF2,Flat?nprobe=2"
    with memory_of(PROBLEM, tmp_path / "memory") as memory:
        knn = knn_of(memory, index=spec)
        knn.save_index()
        first = saved(tmp_path / "memory")
        add(memory, 200)
        knn.save_index()
        second = saved(tmp_path / "memory")
        assert set(first) < set(second)
        assert len(second) == 4
        add(memory, 300)  # joined with the 200
        knn.save_index()
        assert set(saved(tmp_path / "memory")) & set(second) == set(first)
        assert len(saved(tmp_path / "memory")) == 4
        before = knn(PROBLEM.queries)
    built = len(spy.built)
    assert same_bits(answer(tmp_path / "memory", spec), before)
    assert len(spy.built) == built


def test_a_memory_keeps_one_saved_index(home: Path, spy: Spy) -> None:
    with Memory.open(home, writable=True) as memory:
        knn_of(memory, index="faiss:IVF16,Flat").save_index()
    assert len(saved(home)) == 2
    answer(home, "faiss:IVF16,Flat")
    assert spy.built == [(0, 800)]


def test_forgotten_rows_are_not_found_by_an_index_saved_before(home: Path, spy: Spy) -> None:
    with Memory.open(home, writable=True) as memory:
        nearest = knn_of(memory, n_neighbors=1, index=SPEC).neighbors(PROBLEM.queries).ids[:, 0]
        memory.forget(np.unique(nearest))
    found = knn_of(Memory.open(home), index=SPEC).neighbors(PROBLEM.queries).ids
    assert not np.isin(found, nearest).any()
    assert spy.built == []


def test_compaction_removes_the_saved_index_for_it_holds_what_is_erased(home: Path, spy: Spy) -> None:
    with Memory.open(home, writable=True) as memory:
        memory.forget([3])
        assert len(saved(home)) == 2
        memory.compact()
        assert saved(home) == []
        knn = knn_of(memory, index=SPEC)
        assert spy.built == [(0, 799)]
        knn.save_index()
        assert all(name.startswith("index-00000001-") for name in saved(home))
    answer(home)
    assert len(spy.built) == 1


def test_an_index_of_rows_before_a_compaction_is_not_saved_after_it(home: Path) -> None:
    with Memory.open(home, writable=True) as memory:
        old = memory.snapshot
        memory.forget([3])
        memory.compact()
        with pytest.raises(InvalidInput, match="compacted"):
            memory.save_parts(old, [])


def test_the_next_writer_sweeps_leftovers_and_readers_remove_nothing(home: Path) -> None:
    whole = saved(home)
    stem = "index-00000000-000000000000-000000000800-deadbeef"
    left = [f"{stem}.json", f"{stem}-0.bin", "index-00000007-000000000000-000000000800-deadbeef-0.bin"]
    for name in left:
        (home / name).write_bytes(b"half an ind")
    answer(home)
    assert set(left) < set(saved(home))
    Memory.open(home, writable=True).close()
    assert saved(home) == whole


def test_a_reader_loads_after_its_refresh_what_the_writer_saved(home: Path, spy: Spy) -> None:
    reader = Memory.open(home)
    follower = knn_of(reader, index="faiss:IVF2,Flat")
    assert spy.built == [(0, 800)]
    with Memory.open(home, writable=True) as memory:
        memory.forget([5])
        memory.compact()
        knn = knn_of(memory, index="faiss:IVF2,Flat")
        knn.save_index()
        reader.refresh()
        assert same_bits(follower(PROBLEM.queries), knn(PROBLEM.queries))
    assert spy.built == [(0, 800), (0, 799)]


def test_an_index_is_not_saved_in_ram_nor_read_only_nor_where_there_is_nothing_to_save(home: Path) -> None:
    with pytest.raises(InvalidInput, match="in RAM"):
        knn_of(memory_of(PROBLEM), index=SPEC).save_index()
    with pytest.raises(InvalidInput, match="in RAM"):
        knn_of(memory_of(PROBLEM)).save_index()
    with pytest.raises(ReadOnlyMemory):
        knn_of(Memory.open(home), index=SPEC).save_index()
    with Memory.open(home, writable=True) as memory:
        with pytest.raises(InvalidInput, match="nothing to save of exact"):
            knn_of(memory, index="exact").save_index()
        assert len(saved(home)) == 2


def test_rows_too_few_to_train_are_searched_exactly_and_not_saved(tmp_path: Path, spy: Spy) -> None:
    with memory_of(PROBLEM, tmp_path / "memory") as memory:
        add(memory, 30)
        knn_of(memory, index=SPEC).save_index()
    with Memory.open(tmp_path / "memory", writable=True) as memory:
        add(memory, 40)
        knn = knn_of(memory, index=SPEC)
        knn.save_index()
        before = knn(PROBLEM.queries)
    assert len(saved(tmp_path / "memory")) == 2
    assert spy.built == [(0, 830), (830, 40)]
    assert same_bits(answer(tmp_path / "memory"), before)
    assert spy.built == [(0, 830), (830, 40), (830, 40)]


def test_wherever_the_disk_refuses_the_saved_index_is_the_old_one_or_the_new_one(
    home: Path, tmp_path: Path, spy: Spy
) -> None:
    new = "faiss:IVF16,Flat?nprobe=16"

    def save(path: Path, disk: Disk) -> None:
        with Memory.open(path, writable=True) as memory:
            knn = ResidualKNN(memory, n_neighbors=7, bandwidth=0.5, index=new)
            with watching(disk):
                knn.save_index()

    shutil.copytree(home, tmp_path / "dry")
    disk = Disk()
    save(tmp_path / "dry", disk)
    assert len(disk.calls) > 12
    right = answer(home), answer(tmp_path / "dry", new)
    for place in range(len(disk.calls)):
        path = tmp_path / f"refused-{place}"
        shutil.copytree(home, path)
        try:
            save(path, Disk(place))
        except StorageFailure:
            assert Memory.open(path, verify=True).verify().ignored == ()
        spy.built.clear()
        np.testing.assert_array_equal(answer(path), right[0])
        np.testing.assert_array_equal(answer(path, new), right[1])
        assert len(spy.built) <= 1, "one of the two is there, and whole"
        Memory.open(path, writable=True).close()
        left = 1 if disk.calls[place][0] == "remove" else 0  # what cannot be removed is passed over
        assert len(saved(path)) in (2, 4, 2 + left, 4 + left)
        shutil.rmtree(path)
