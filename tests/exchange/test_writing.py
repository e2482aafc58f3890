"""Memories in files: every format, every layout, to the last bit; and what a disk that refuses leaves."""

import errno
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy import ndarray
from safetensors import safe_open
from safetensors.numpy import load_file

import residual_memory as rm
from residual_memory.errors import InvalidInput, StorageFailure
from residual_memory.exchange import fields
from residual_memory.memory import Column, Memory
from residual_memory.memory.format import decoded_strings
from tests.exchange.forms import KINDS, SUFFIXES, assert_same, kept, values
from tests.memory.faults import Disk, watching
from tests.problems import classification, memory_of, regression, same_bits


@pytest.fixture(params=SUFFIXES)
def suffix(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("text", [False, True], ids=["integers", "text"])
@pytest.mark.parametrize("groups", [False, True], ids=["", "groups"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_goes_out_and_in_is_the_same_memory(
    tmp_path: Path, kind: str, suffix: str, groups: bool, text: bool
) -> None:
    memory = kept(kind, text=text, groups=groups)
    file = tmp_path / f"rows{suffix}"
    assert rm.export_memory(memory, file) == 57
    with rm.import_memory(file, tmp_path / "memory") as found:
        assert_same(found, memory)
    assert_same(rm.import_memory(file), memory)
    assert Memory.open(tmp_path / "memory", verify=True).n_forgotten == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory", file.name]


def test_source_setting_and_class_names_come_along(tmp_path: Path, suffix: str) -> None:
    source = {"model": {"class": 'A "quoted" é'}, "layer": "fc", "side": "input", "complete": True}
    memory = memory_of(classification(), class_names=["a", "b", "ü", "d"], source=source)
    memory.save_setting({"n_neighbors": 3, "bandwidth": 0.25})
    memory.forget([59])
    rm.export_memory(memory, tmp_path / f"rows{suffix}")
    found = rm.import_memory(tmp_path / f"rows{suffix}")
    assert_same(found, memory)
    assert (found.source, found.setting) == (source, {"n_neighbors": 3, "bandwidth": 0.25})
    assert found.next_id == 60, "an id that was forgotten is not given again"


@pytest.mark.parametrize("kind", ["dense", "log8", "regression"])
@pytest.mark.parametrize("text", [False, True], ids=["integers", "text"])
def test_a_memory_without_rows_keeps_what_it_is(tmp_path: Path, kind: str, text: bool, suffix: str) -> None:
    memory = kept(kind, text=text, groups=True)
    memory.forget(memory.ids)
    assert rm.export_memory(memory, tmp_path / f"rows{suffix}") == 0
    with rm.import_memory(tmp_path / f"rows{suffix}", tmp_path / "memory") as found:
        assert_same(found, memory)
    never = Memory.create(dim=3, n_outputs=2)
    rm.export_memory(never, tmp_path / f"never{suffix}")
    assert_same(rm.import_memory(tmp_path / f"never{suffix}"), never)


def test_rows_of_many_segments_go_out_in_their_order(tmp_path: Path, suffix: str) -> None:
    whole = classification(n=90)
    with rm.Memory.create(tmp_path / "memory", dim=5, n_outputs=4) as memory:
        for start, end in ((0, 50), (50, 80), (80, 90)):
            part = whole.rows(slice(start, end))
            memory.append(part.keys, part.labels, part.predictions)
        memory.forget([10, 60, 85])
        rm.export_memory(memory, tmp_path / f"rows{suffix}")
    assert_same(rm.import_memory(tmp_path / f"rows{suffix}"), Memory.open(tmp_path / "memory"))


def test_the_same_memory_gives_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    memory = kept("dense", text=True, groups=True)
    for name in ("one", "two"):
        rm.export_memory(memory, tmp_path / f"{name}{suffix}")
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


# ---------------------------------------------------------------------- other tools


def stored(memory: Memory) -> dict[str, ndarray]:
    return {name: column for name, column in values(memory).items() if column.dtype.kind != "U"}


@pytest.mark.parametrize("kind", ["dense", "half", "top-m of many classes", "regression"])
def test_numpy_and_safetensors_read_the_columns(tmp_path: Path, kind: str) -> None:
    memory = kept(kind, text=True, groups=True)
    rm.export_memory(memory, tmp_path / "rows.npz")
    rm.export_memory(memory, tmp_path / "rows.safetensors")
    tensors = load_file(tmp_path / "rows.safetensors")
    with np.load(tmp_path / "rows.npz", allow_pickle=False) as arrays:
        assert json.loads(str(arrays["memory.json"][0]))["body"]["layout"] == vars(memory.layout)
        assert set(arrays) == {*values(memory), "memory.json"}
        for name, column in stored(memory).items():
            assert same_bits(arrays[name], column)
            assert same_bits(tensors[name], column)
        for name in ("ids", "groups"):
            wanted = values(memory)[name]
            assert (arrays[name] == wanted).all()
            assert (decoded_strings(tensors[name]) == wanted).all()
    with safe_open(tmp_path / "rows.safetensors", "np") as opened:
        assert json.loads(opened.metadata()["residual_memory"])["body"]["top_m"] == memory.snapshot.manifest.top_m


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
@pytest.mark.parametrize("kind", ["dense", "half", "top-m of many classes", "regression"])
def test_pyarrow_pandas_and_polars_read_the_columns(tmp_path: Path, kind: str, suffix: str) -> None:
    memory = kept(kind, text=True, groups=True)
    file = tmp_path / f"rows{suffix}"
    rm.export_memory(memory, file)
    if suffix == ".parquet":
        tables: list[Any] = [pq.read_table(file).to_pandas(), pandas.read_parquet(file)]
        wide = polars.read_parquet(file)
    else:
        tables = [pa.ipc.open_file(file).read_all().to_pandas(), pandas.read_feather(file)]
        wide = polars.read_ipc(file)
    called = {"labels": "label", "ids": "id", "groups": "group"}
    for name, column in values(memory).items():
        for table in tables:
            assert (np.array(table[called.get(name, name)].tolist()) == column).all()
        assert (np.array(wide[called.get(name, name)].to_list()) == column).all()


def test_half_precision_stays_half(tmp_path: Path) -> None:
    rm.export_memory(kept("half"), tmp_path / "rows.parquet")
    schema = pq.read_schema(tmp_path / "rows.parquet")
    assert schema.field("keys").type == pa.list_(pa.field("item", pa.float16(), nullable=False), 5)


def test_codes_go_out_as_probabilities_that_sum_to_1(tmp_path: Path) -> None:
    memory = kept("log16")
    rm.export_memory(memory, tmp_path / "rows.npz")
    with np.load(tmp_path / "rows.npz") as arrays:
        assert arrays["probabilities"].dtype == np.float32
        np.testing.assert_allclose(arrays["probabilities"].sum(axis=1) + arrays["rest"], 1, rtol=1e-3)


@pytest.mark.parametrize("tool", ["pandas", "polars"])
def test_what_another_tool_wrote_again_is_read(tmp_path: Path, tool: str) -> None:
    """Neither keeps what is written beside the columns; rows and types are enough."""
    memory = memory_of(regression(), key_dtype="float32", prediction_dtype="float32", ids=np.arange(60) * 2)
    rm.export_memory(memory, tmp_path / "rows.parquet")
    if tool == "pandas":
        pandas.read_parquet(tmp_path / "rows.parquet").to_parquet(tmp_path / "again.parquet")
    else:
        polars.read_parquet(tmp_path / "rows.parquet").write_parquet(tmp_path / "again.parquet")
    assert_same(rm.import_memory(tmp_path / "again.parquet"), memory)


# ---------------------------------------------------------------------- in blocks


@pytest.mark.parametrize("kind", ["dense", "log8"])
def test_no_more_than_a_block_is_taken_at_once(
    tmp_path: Path, kind: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = kept(kind, tmp_path / "memory", n=200, text=True, groups=True)
    monkeypatch.setattr(fields, "BLOCK_BYTES", 1 << 10)
    taken: list[int] = []
    whole = Column.take

    def take(self: Column, rows: ndarray) -> ndarray:
        found = whole(self, rows)
        taken.append(found.nbytes)
        return found

    monkeypatch.setattr(Column, "take", take)
    rm.export_memory(memory, tmp_path / f"rows{suffix}")
    monkeypatch.undo()
    assert max(taken) <= 1 << 10
    assert sum(taken) >= sum(column.nbytes for column in stored(memory).values()), "and all of it is"
    assert_same(rm.import_memory(tmp_path / f"rows{suffix}"), memory)


# ---------------------------------------------------------------------- whole or not at all


def test_a_file_that_is_there_is_left_alone(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(b"something")
    with pytest.raises(InvalidInput, match="is there already; name another file"):
        rm.export_memory(kept("dense"), file)
    assert file.read_bytes() == b"something"
    rm.export_memory(kept("dense"), file, overwrite=True)
    assert_same(rm.import_memory(file), kept("dense"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rows.npy", "is '.npz' meant?"),
        ("rows.parqet", "is '.parquet' meant?"),
        ("rows", "ends in '', expected .npz"),
        ("nowhere/rows.npz", "there is no folder"),
    ],
)
def test_a_name_that_cannot_be_written_is_refused(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        rm.export_memory(kept("dense"), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "rows.npz").mkdir()
    with pytest.raises(InvalidInput, match="is there already"):
        rm.export_memory(kept("dense"), tmp_path / "rows.npz", overwrite=True)


def test_a_file_is_flushed_before_it_gets_its_name_and_its_folder_after(tmp_path: Path, suffix: str) -> None:
    with watching(Disk()) as disk:
        rm.export_memory(kept("dense"), tmp_path / f"rows{suffix}")
    named = [call for call in disk.calls if call[0] != "write"]
    part = named[0][1]
    assert part.startswith(f".rows{suffix}-")
    assert named == [("create", part), ("sync", part), ("rename", part), ("sync_folder", tmp_path.name)]
    assert disk.names().count("write") >= 1


@pytest.mark.parametrize("before", [None, b"what was there"])
def test_a_call_that_the_disk_refuses_leaves_what_was_there(tmp_path: Path, suffix: str, before: bytes | None) -> None:
    file, memory = tmp_path / f"rows{suffix}", kept("dense")
    with watching(Disk()) as disk:
        rm.export_memory(memory, file)
    whole = file.read_bytes()
    assert len(disk.calls) >= 5
    for place, name in enumerate(disk.names()):
        file.unlink(missing_ok=True)
        if before is not None:
            file.write_bytes(before)
        with watching(Disk(place)), pytest.raises(StorageFailure) as refused:
            rm.export_memory(memory, file, overwrite=True)
        assert refused.value.errno == errno.ENOSPC
        wanted = [whole] if name == "sync_folder" else [] if before is None else [before]
        assert [path.read_bytes() for path in tmp_path.iterdir()] == wanted, (place, name)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond this: the system refuses it in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 20_000])
def test_a_disk_that_is_full_in_the_middle_leaves_nothing(tmp_path: Path, suffix: str, size: int) -> None:
    memory = kept("dense", n=3_000)
    with largest_file(size), pytest.raises(StorageFailure) as refused:
        rm.export_memory(memory, tmp_path / f"rows{suffix}")
    assert refused.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = kept("dense", n=200)
    monkeypatch.setattr(fields, "BLOCK_BYTES", 1 << 10)
    whole, count = Column.take, iter(range(100))

    def take(self: Column, rows: ndarray) -> ndarray:
        if next(count) == 7:
            raise KeyboardInterrupt
        return whole(self, rows)

    monkeypatch.setattr(Column, "take", take)
    with pytest.raises(KeyboardInterrupt):
        rm.export_memory(memory, tmp_path / f"rows{suffix}")
    assert not list(tmp_path.iterdir())
