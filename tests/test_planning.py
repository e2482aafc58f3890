"""Plans: bytes as they then are, refusals that say what is missing, and a nearest plan that fits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import residual_memory as rm
from residual_memory.errors import InvalidInput, MissingExtra, StorageFailure
from residual_memory.indexes.faiss_planning import build_time, footprint
from residual_memory.indexes.footprint import example_keys
from residual_memory.machine import existing, free_disk_bytes, free_ram_bytes
from residual_memory.planning import most_rows, require_room, smallest

PLENTY = 10**15


def sized(n: int, d: int, c: int, **options: Any) -> rm.Plan:
    """A plan without a look at the machine."""
    return rm.estimate(n, d, c, **{"probe": False, "free_disk": PLENTY, "free_ram": PLENTY, **options})


@pytest.mark.parametrize("index", ["exact", "faiss:IVF64,PQ16x4fs", "faiss:IVF64_HNSW16,SQ8", "scann:num_leaves=100"])
def test_a_plan_says_what_then_lies_on_disk(tmp_path: Path, index: str) -> None:
    if index.startswith("scann"):
        pytest.importorskip("scann", reason="needs scann")
    n, d, c = 20_000, 32, 5
    random = np.random.default_rng(0)
    with rm.Memory.create(tmp_path / "mem", dim=d, n_outputs=c, key_dtype="float16") as memory:
        for start in range(0, n, 5000):
            keys = example_keys(n, d)[start : start + 5000]
            memory.append(keys, random.integers(0, c, 5000), random.dirichlet(np.ones(c), 5000))
        knn = rm.ResidualKNN(memory, bandwidth=1.0, index=index)
        if index != "exact":
            knn.save_index()
    plan = sized(n, d, c, key_dtype="float16", index=index)
    names = list((tmp_path / "mem").iterdir())
    saved = sum(file.stat().st_size for file in names if file.name.startswith("index-"))
    assert plan.footprint.saved == pytest.approx(saved, rel=0.1 if index.startswith("scann") else 0.05)
    assert plan.disk_bytes == pytest.approx(sum(file.stat().st_size for file in names), rel=0.03)


@pytest.mark.parametrize(
    ("factory", "near"),
    [
        ("IVF64,PQ8x4fs", 0.02),
        ("IVF64,PQ8x4fsr", 0.02),
        ("IVF64,PQ2np", 0.02),
        ("IVF64,Flat", 0.02),
        ("IVF64_HNSW16,PQ8x4fs", 0.02),
        ("RR8,IVF64,PQ4x4fs", 0.02),
        ("PCA8,IVF64,SQ8", 0.03),
        ("IVF64,RaBitQ", 0.02),
        ("PQ8x4fs", 0.02),
        ("SQ8", 0.02),
        ("HNSW16", 0.02),
        ("HNSW16,SQ8", 0.02),
    ],
)
def test_the_bytes_of_an_index_are_those_of_its_kind(factory: str, near: float) -> None:
    import faiss

    keys = example_keys(10_000, 16)
    index = faiss.index_factory(16, factory)
    if not index.is_trained:
        index.train(keys)
    index.add(keys)
    assert footprint(factory, 16, len(keys)).saved == pytest.approx(len(faiss.serialize_index(index)), rel=near)


def test_an_index_of_unknown_kind_is_refused_rather_than_guessed() -> None:
    with pytest.raises(InvalidInput, match=r"'NSG32' takes is not known; estimate an IVF"):
        footprint("NSG32", 16, 1000)


def test_distances_that_faiss_keeps_ready_count_in_ram_and_not_on_disk() -> None:
    found = footprint("IVF1024,PQ32", 64, 1_000_000)
    assert found.ram - found.saved == 4 * 1024 * 32 * 256
    assert footprint("IVF65536,PQ64", 64, 10_000_000).ram == footprint("IVF65536,PQ64", 64, 10_000_000).saved


def test_training_takes_ram_before_there_are_rows_to_hold() -> None:
    few, many = footprint("IVF4096,PQ8x4fs", 256, 300_000), footprint("IVF256,PQ8x4fs", 256, 300_000)
    assert few.building > 4 * 64 * 4096 * 256 > many.building


@pytest.mark.parametrize(
    "factory", ["IVF256,PQ16x4fs", "IVF4096_HNSW16,SQ8", "OPQ4_8,IVF256,PQ4", "HNSW8", "PQ8", "PCA16,IVF16,Flat"]
)
def test_the_parts_of_a_build_are_timed_whatever_its_kind(factory: str) -> None:
    small, large = build_time(factory, 16, 20_000), build_time(factory, 16, 20_000_000)
    assert 0 < small.filling < large.filling
    assert 0 < small.measuring < large.measuring
    assert (small.training > 0) == (factory != "HNSW8")


def test_a_probe_leaves_nothing_behind_and_makes_no_memory(tmp_path: Path) -> None:
    plan = rm.estimate(50_000, 16, 3, path=tmp_path / "a" / "memory", seconds_per_row=0.01)
    assert plan.fits
    assert plan.seconds is not None
    assert plan.seconds.extracting == pytest.approx(500)
    assert min(plan.seconds.writing, plan.seconds.filling) > 0
    assert plan.seconds.total == sum(vars(plan.seconds).values())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [{"task": "regression"}, {"top_m": 4, "prediction_dtype": "log8"}, {"top_m": 3}, {"key_dtype": "float64"}],
)
def test_every_kind_of_row_can_be_probed(tmp_path: Path, options: dict[str, Any]) -> None:
    plan = rm.estimate(500, 4, 9, path=tmp_path, index="exact:numpy", **options)
    assert plan.seconds is not None
    assert plan.seconds.writing > 0


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailure, match="cannot be written to"):
        rm.estimate(500, 4, 3, path=tmp_path / "file")


# ---------------------------------------------------------------------- what does not fit


def test_what_is_not_short_stays_as_it_is() -> None:
    short_of_ram = sized(2_000_000, 256, 1000, index="exact", free_ram=500 * 10**6)
    assert short_of_ram.shortages == ("search", "building")
    found = rm.nearest_fitting(short_of_ram)
    assert found is not None
    assert (found.layout, found.top_m) == (short_of_ram.layout, None)
    assert found.index.startswith("faiss:PCAR")
    short_of_disk = sized(1_000_000, 256, 10, free_disk=10**9)
    assert short_of_disk.shortages == ("disk",)
    found = rm.nearest_fitting(short_of_disk)
    assert found is not None
    assert (found.index, found.layout.key_dtype, found.layout.prediction_dtype) == ("auto", "float16", "float32")


@pytest.mark.parametrize(
    ("rows", "dim", "outputs", "disk", "ram", "options"),
    [
        (1_600_000_000, 512, 32_000, 4 * 10**12, 256 * 10**9, {"key_dtype": "float16"}),
        (1_600_000_000, 64, 32_000, 4 * 10**12, 112 * 10**9, {"top_m": 8, "prediction_dtype": "log8"}),
        (10_000_000, 128, 1000, 10**10, 10**9, {}),
        (10_000_000, 128, 3, 3 * 10**9, 10**9, {"task": "regression", "key_dtype": "float64"}),
    ],
)
def test_the_nearest_plan_fits_and_says_of_itself_what_it_is(
    rows: int, dim: int, outputs: int, disk: int, ram: int, options: dict[str, Any]
) -> None:
    plan = sized(rows, dim, outputs, free_disk=disk, free_ram=ram, **options)
    assert not plan.fits
    found = rm.nearest_fitting(plan)
    assert found is not None
    assert found.fits
    assert sized(rows, dim, outputs, free_disk=disk, free_ram=ram, **found.options) == found


def test_where_nothing_fits_the_number_of_rows_that_would_is_said() -> None:
    plan = sized(10**9, 64, 10, free_disk=10**10, free_ram=10**12)
    assert rm.nearest_fitting(plan) is None
    assert not smallest(plan).fits
    rows = most_rows(plan)
    for n, fits in ((rows, True), (int(1.02 * rows), False)):
        fewer = sized(n, 64, 10, free_disk=10**10, free_ram=10**12)
        assert (fewer.fits or rm.nearest_fitting(fewer) is not None) == fits


def test_a_plan_that_cannot_fit_is_not_probed(tmp_path: Path) -> None:
    assert rm.estimate(10**6, 64, 10, path=tmp_path, free_disk=1000).seconds is None


def test_rows_without_a_place_are_refused_before_they_are_written(tmp_path: Path) -> None:
    with pytest.raises(StorageFailure, match=r"the rows need 1,000,000,000,000,000 bytes, but .* free; make room"):
        require_room(tmp_path / "memory", PLENTY)
    require_room(tmp_path / "memory", 1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_m": 4}, "expected 1 to 3"),
        ({"prediction_dtype": "log8"}, "top-m"),
        ({"seconds_per_row": -1.0}, "seconds_per_row"),
        ({"free_ram": 0}, "free_ram"),
        ({"index": "exat"}, "did you mean 'exact'"),
    ],
)
def test_a_memory_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        sized(1000, 4, 3, **options)


def test_a_missing_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "faiss" else find(name))
    with pytest.raises(MissingExtra, match="faiss"):
        sized(100_000, 8, 2, index="faiss:IVF16,Flat")


# ---------------------------------------------------------------------- what the machine has


def machine(root: Path, available: int, cgroups: str = "", files: dict[str, str] | None = None) -> Path:
    """The files by which Linux tells of RAM."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {available // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(cgroups)
    for name, content in (files or {}).items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(content)
    return root


def group(folder: str, limit: object, used: int, cache: int) -> dict[str, str]:
    return {
        f"{folder}memory.max": f"{limit}\n",
        f"{folder}memory.current": f"{used}\n",
        f"{folder}memory.stat": f"anon 5\ninactive_file {cache}\n",
    }


def test_free_ram_is_what_linux_calls_available(tmp_path: Path) -> None:
    assert free_ram_bytes(machine(tmp_path, 8 << 30)) == 8 << 30


def test_free_ram_is_what_the_tightest_cgroup_leaves(tmp_path: Path) -> None:
    files = {**group("a/b/", "max", 5, 0), **group("a/", 4 << 30, 3 << 30, 1 << 30)}
    assert free_ram_bytes(machine(tmp_path, 8 << 30, "0::/a/b\n", files)) == 2 << 30


def test_free_ram_in_a_container_is_what_its_own_limit_leaves(tmp_path: Path) -> None:
    assert free_ram_bytes(machine(tmp_path, 8 << 30, "0::/seen/outside\n", group("", 3 << 30, 1 << 30, 0))) == 2 << 30


def test_free_ram_knows_cgroups_of_version_1(tmp_path: Path) -> None:
    files = {
        "memory/a/memory.limit_in_bytes": f"{3 << 30}",
        "memory/a/memory.usage_in_bytes": f"{2 << 30}",
        "memory/a/memory.stat": f"total_inactive_file {1 << 20}\n",
        "memory/memory.limit_in_bytes": f"{(1 << 63) - 4096}",
    }
    root = machine(tmp_path, 8 << 30, "9:cpu:/a\n4:memory:/a\n0::/\n", files)
    assert free_ram_bytes(root) == (1 << 30) + (1 << 20)


def test_without_those_files_all_ram_counts(tmp_path: Path) -> None:
    assert free_ram_bytes(tmp_path) > 1 << 28


def test_the_disk_of_a_path_is_that_of_the_nearest_folder_above_it(tmp_path: Path) -> None:
    assert existing(tmp_path / "a" / "b") == tmp_path
    assert free_disk_bytes(tmp_path / "a" / "b") > 0
