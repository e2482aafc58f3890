"""Files of anybody's as memories: what is read off them, and what is refused with which words."""

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy import ndarray
from safetensors.numpy import save_file

import residual_memory as rm
from residual_memory.errors import (
    CorruptFile,
    DataNotFound,
    DimensionMismatch,
    DuplicateId,
    InvalidInput,
    ResidualMemoryError,
    StorageFailure,
    UnsupportedFormat,
)
from residual_memory.exchange import columns as columns_module
from residual_memory.exchange import open_rows
from residual_memory.memory import Memory, segments
from residual_memory.memory.format import encoded_strings
from tests.exchange.forms import SUFFIXES, assert_same, kept, names, values
from tests.memory.faults import Disk, watching
from tests.problems import Problem, classification, memory_of, regression, same_bits

FORMS = (*SUFFIXES, "")  # the last is a folder of .npy files
Columns = dict[str, ndarray]


def columns(problem: Problem, **more: Any) -> Columns:
    return {"keys": problem.keys, "labels": problem.labels, "predictions": problem.predictions, **more}


def saved(place: Path, data: Columns) -> Path:
    """A file as somebody else would write it, without a word on what it is."""
    if place.suffix == ".npz":
        np.savez(place, **data)  # type: ignore[arg-type]
    elif place.suffix == ".safetensors":
        save_file({name: encoded_strings(v) if v.dtype.kind == "U" else v for name, v in data.items()}, place)
    elif place.suffix == "":
        place.mkdir()
        for name, column in data.items():
            np.save(place / f"{name}.npy", column)
    else:
        called = {"labels": "label", "ids": "id", "groups": "group"}
        made = {called.get(name, name): pa.array(column.tolist()) for name, column in data.items()}
        if place.suffix == ".parquet":
            pq.write_table(pa.table(made), place, row_group_size=17)
        else:
            with pa.ipc.new_file(place, pa.table(made).schema) as file:
                file.write_table(pa.table(made), max_chunksize=17)
    return place


@pytest.fixture(params=FORMS)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"rows{request.param}"


@pytest.mark.parametrize("make", [classification, regression])
@pytest.mark.parametrize("text", [False, True], ids=["integers", "text"])
def test_a_foreign_file_tells_what_it_holds(file: Path, make: Callable[[], Problem], text: bool) -> None:
    problem = make()
    ids = names(np.arange(60)) if text else np.arange(60) * 2
    saved(file, columns(problem, ids=ids, groups=np.arange(60) // 9))
    found = rm.import_memory(file, key_dtype="float64", prediction_dtype="float64")
    wanted = memory_of(problem, ids=ids, groups=np.arange(60) // 9)
    assert_same(found, wanted)


def test_without_ids_rows_are_numbered_and_options_count_more_than_what_is_read(file: Path) -> None:
    saved(file, columns(classification()))
    found = rm.import_memory(file, n_outputs=6, metric="cosine", class_names=list("abcdef"))
    assert found.ids.tolist() == list(range(60))
    assert (found.layout.n_outputs, found.layout.metric, found.class_names) == (6, "cosine", tuple("abcdef"))
    assert (found.layout.key_dtype, found.layout.prediction_dtype) == ("float32", "float32")
    wide = rm.import_memory(file, class_names=list("abcde"))
    assert wide.layout.n_outputs == 5
    values_of_classes = rm.import_memory(saved(file.with_name(f"two{file.suffix}"), columns(regression(c=1))))
    assert (values_of_classes.layout.task, values_of_classes.layout.n_outputs) == ("regression", 1)


def test_top_m_columns_are_read(file: Path) -> None:
    problem = classification()
    cut = rm.top_m(problem.predictions, 2)
    data = columns(problem, indices=cut.indices, probabilities=cut.probabilities, rest=cut.rest)
    del data["predictions"]
    saved(file, data)
    found = rm.import_memory(file, n_outputs=4, key_dtype="float64", prediction_dtype="log16")
    assert_same(found, memory_of(problem, residuals="top-m", prediction_dtype="log16"))
    with pytest.raises(InvalidInput, match=r"rows.*: top-m predictions do not tell how many classes .*give n_outputs"):
        rm.import_memory(file)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_options_change_an_exported_memory(tmp_path: Path, suffix: str) -> None:
    memory = kept("log8", groups=True)
    rm.export_memory(memory, tmp_path / f"rows{suffix}")
    found = rm.import_memory(tmp_path / f"rows{suffix}", prediction_dtype="float32", key_dtype="float16", n_outputs=9)
    layout = found.layout
    assert (layout.prediction_dtype, layout.key_dtype, layout.n_outputs) == ("float32", "float16", 9)
    assert (found.ids == memory.ids).all()
    assert found.next_id == memory.next_id


def test_a_memory_that_was_imported_goes_on_as_the_one_that_was_exported(tmp_path: Path) -> None:
    memory = memory_of(classification())
    memory.forget([58, 59])
    rm.export_memory(memory, tmp_path / "rows.npz")
    found = rm.import_memory(tmp_path / "rows.npz")
    more = classification(n=1)
    assert found.append(more.keys, more.labels, more.predictions).tolist() == [60]


# ---------------------------------------------------------------------- refused


def test_a_missing_column_is_named_and_a_close_one_suggested(file: Path) -> None:
    data = columns(classification())
    data["kyes"] = data.pop("keys")
    if file.suffix == "":
        data["labels2"] = data["labels"]  # a folder is asked for its files by name
    with pytest.raises(InvalidInput, match=r"rows\S* holds no 'keys', it has"):
        rm.import_memory(saved(file, data), file.with_name("memory"))
    assert not file.with_name("memory").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_close_name_is_suggested(tmp_path: Path, suffix: str) -> None:
    data = columns(classification())
    data["prediction"] = data.pop("predictions")
    with pytest.raises(InvalidInput, match=r"holds no 'predictions'.*is 'prediction' meant to be it"):
        rm.import_memory(saved(tmp_path / f"rows{suffix}", data))


def test_labels_are_needed(file: Path) -> None:
    data = columns(classification())
    del data["labels"]
    with pytest.raises(InvalidInput, match="holds no labels, which a memory needs"):
        rm.import_memory(saved(file, data))


@pytest.mark.parametrize(
    ("column", "row", "value", "kind", "said"),
    [
        ("keys", (50, 2), np.nan, InvalidInput, r"keys\[\d+, 2\] is nan"),
        ("predictions", (50, 1), 7.0, InvalidInput, r"predictions\[\d+\] sums to"),
        ("labels", (50,), 4, InvalidInput, r"labels\[\d+\] is 4"),
        ("ids", (50,), 3, DuplicateId, r"id 3 is given"),
        ("ids", (50,), -3, InvalidInput, r"ids hold -3"),
    ],
)
def test_a_bad_value_is_refused_and_nothing_is_there(
    file: Path, column: str, row: Any, value: Any, kind: type[Exception], said: str
) -> None:
    data = columns(classification(), ids=np.arange(60))
    data[column][row] = value
    saved(file, data)
    with pytest.raises(kind, match=rf"rows(?s:.*){said}"):
        rm.import_memory(file, file.with_name("memory"))
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_columns_of_different_lengths_are_refused(tmp_path: Path) -> None:
    for suffix in (".npz", ".safetensors", ""):
        data = columns(classification(), ids=np.arange(59))
        with pytest.raises(InvalidInput, match=r"ids\S* has 59 rows, but there are 60 keys"):
            rm.import_memory(saved(tmp_path / f"rows{suffix}", data))


def test_python_objects_are_refused(tmp_path: Path) -> None:
    data = columns(classification(), ids=np.array([object()] * 60))
    for suffix in (".npz", ""):
        with pytest.raises(InvalidInput, match=r"ids\S* holds Python objects"):
            rm.import_memory(saved(tmp_path / f"rows{suffix}", data))


def test_columns_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    made = {"keys": [["a"], ["b"]], "label": [0, 1], "predictions": [[0.5, 0.5]] * 2}
    pq.write_table(pa.table(made), tmp_path / "rows.parquet")
    with pytest.raises(InvalidInput, match=r"column 'keys' of .*rows.parquet is list<.*>, expected numbers"):
        rm.import_memory(tmp_path / "rows.parquet")
    made = {**made, "keys": [[1.0], None]}
    with pa.ipc.new_file(tmp_path / "rows.arrow", pa.table(made).schema) as file:
        file.write_table(pa.table(made))
    with pytest.raises(InvalidInput, match=r"column 'keys' of .*rows.arrow has missing values"):
        rm.import_memory(tmp_path / "rows.arrow")


def test_a_type_that_numpy_lacks_is_refused_where_it_is_needed(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_tensors

    problem = classification()
    tensors = {name: torch.from_numpy(column) for name, column in columns(problem).items()}
    save_tensors({**tensors, "more": torch.zeros(3, dtype=torch.bfloat16)}, tmp_path / "rows.safetensors")
    assert len(rm.import_memory(tmp_path / "rows.safetensors")) == 60
    tensors["keys"] = tensors["keys"].to(torch.bfloat16)
    save_tensors(tensors, tmp_path / "rows.safetensors")
    with pytest.raises(InvalidInput, match=r"rows.safetensors:keys is BF16, expected"):
        rm.import_memory(tmp_path / "rows.safetensors")


def test_a_file_without_rows_says_nothing(file: Path) -> None:
    with pytest.raises(InvalidInput, match=r"rows\S*: there are no rows"):
        rm.import_memory(saved(file, {name: column[:0] for name, column in columns(classification()).items()}))


def test_keys_of_another_width_than_the_description_says_are_refused(tmp_path: Path) -> None:
    rm.export_memory(memory_of(classification()), tmp_path / "rows.npz")
    with np.load(tmp_path / "rows.npz") as arrays:
        data = dict(arrays)
    data["keys"] = data["keys"][:, :3]
    np.savez(tmp_path / "rows.npz", **data)
    with pytest.raises(DimensionMismatch, match=r"rows.npz: .*keys have dimension 3, but the memory holds keys of dim"):
        rm.import_memory(tmp_path / "rows.npz")


def test_keys_of_length_1_are_taken_as_they_are_and_no_others(tmp_path: Path) -> None:
    problem = classification()
    memory = memory_of(problem.rows([]), metric="cosine", prediction_dtype="float32")
    memory.append(problem.keys.astype(np.float16), problem.labels, problem.predictions)  # of length 1 within 1e-3
    rm.export_memory(memory, tmp_path / "rows.npz")
    assert_same(rm.import_memory(tmp_path / "rows.npz"), memory)
    assert_same(rm.merge_memories([memory]), memory)
    with np.load(tmp_path / "rows.npz") as arrays:
        data = dict(arrays)
    data["keys"][7] *= 3
    np.savez(tmp_path / "rows.npz", **data)
    with pytest.raises(InvalidInput, match=r"rows.npz: .*keys\[7\] has length 3, expected 1"):
        rm.import_memory(tmp_path / "rows.npz")
    assert rm.import_memory(tmp_path / "rows.npz", metric="euclidean").layout.metric == "euclidean"


def test_places_that_cannot_be_are_refused(tmp_path: Path) -> None:
    rm.export_memory(kept("dense"), tmp_path / "rows.npz")
    with pytest.raises(DataNotFound, match="there is no file"):
        rm.import_memory(tmp_path / "row.npz")
    np.save(tmp_path / "rows.npy", np.zeros(3))
    with pytest.raises(InvalidInput, match=r"of type '.npy', expected .npz"):
        rm.import_memory(tmp_path / "rows.npy")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InvalidInput, match="already exists and is not empty"):
        rm.import_memory(tmp_path / "rows.npz", tmp_path / "full")
    (tmp_path / "empty").mkdir()
    rm.import_memory(tmp_path / "rows.npz", tmp_path / "empty").close()
    assert_same(Memory.open(tmp_path / "empty"), kept("dense"))


# ---------------------------------------------------------------------- all or nothing


def test_a_disk_that_refuses_any_call_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1 << 10)
    monkeypatch.setattr(columns_module, "BLOCK_BYTES", 1 << 9)
    rm.export_memory(memory_of(classification()), tmp_path / "rows.npz")
    with watching(Disk()) as disk:
        rm.import_memory(tmp_path / "rows.npz", tmp_path / "memory").close()
    assert len(list((tmp_path / "memory").glob("rows-*"))) > 3
    calls = disk.names()
    until = len(calls) - 1 - calls[::-1].index("rename")  # after it the memory has its name
    refused = 0
    for place in range(until + 1):
        with watching(Disk(place)):
            try:
                rm.import_memory(tmp_path / "rows.npz", tmp_path / f"memory {place}").close()
            except StorageFailure:
                refused += 1
                assert not (tmp_path / f"memory {place}").exists()
    assert refused > until / 2, "some calls only tidy up"
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


# ---------------------------------------------------------------------- damage


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_cut_file_is_corrupt(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"rows{suffix}"
    rm.export_memory(kept("dense", text=True), file)
    content = file.read_bytes()
    for length in (0, 5, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(CorruptFile, match=file.name):
            rm.import_memory(file, tmp_path / "memory")
        assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
def test_a_description_that_was_changed_is_corrupt_and_one_of_a_newer_format_is_named(
    tmp_path: Path, suffix: str
) -> None:
    file = tmp_path / f"rows{suffix}"
    rm.export_memory(memory_of(classification(), prediction_dtype="float32"), file)
    for was, now, kind in ((b"euclidean", b"euclidian", CorruptFile), (b'"format":2', b'"format":3', CorruptFile)):
        assert rewritten(file, was, now)
        with pytest.raises(kind):
            rm.import_memory(file)
        rewritten(file, now, was)
    assert len(rm.import_memory(file)) == 60


def rewritten(file: Path, was: bytes, now: bytes) -> bool:
    """The file with other words in its description; checksums of the container are right."""
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            data = dict(arrays)
        text = str(data["memory.json"][0])
        data["memory.json"] = np.array([text.replace(was.decode(), now.decode())])
        np.savez(file, **data)
        return was.decode() in text
    if file.suffix == ".parquet":
        table = pq.read_table(file)
        text_bytes = table.schema.metadata[b"residual_memory"]
        pq.write_table(table.replace_schema_metadata({b"residual_memory": text_bytes.replace(was, now)}), file)
        return was in text_bytes
    content = file.read_bytes()
    escaped = [part.replace(b'"', b'\\"') for part in (was, now)]
    file.write_bytes(content.replace(escaped[0], escaped[1]))
    return escaped[0] in content


def test_a_file_of_format_1_makes_the_memory_that_it_was(tmp_path: Path) -> None:
    """As written before there was a history of changes, and before rows carried anything."""
    from residual_memory.memory.format import canonical

    memory = kept("dense", text=True, groups=True)
    rm.export_memory(memory, tmp_path / "rows.npz")
    with np.load(tmp_path / "rows.npz") as arrays:
        data = dict(arrays)
    body = json.loads(str(data["memory.json"][0]))["body"]
    old = {name: value for name, value in body.items() if name not in ("history", "carried")} | {"format": 1}
    data["memory.json"] = np.array([canonical(old).decode()])
    np.savez(tmp_path / "rows.npz", **data)
    assert_same(rm.import_memory(tmp_path / "rows.npz"), memory)


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    from residual_memory.memory.format import canonical

    rm.export_memory(memory_of(classification()), tmp_path / "rows.npz")
    with np.load(tmp_path / "rows.npz") as arrays:
        data = dict(arrays)
    body = json.loads(str(data["memory.json"][0]))["body"]
    data["memory.json"] = np.array([canonical({**body, "format": 99}).decode()])
    np.savez(tmp_path / "rows.npz", **data)
    with pytest.raises(UnsupportedFormat, match="upgrade"):
        rm.import_memory(tmp_path / "rows.npz")


def test_a_header_that_claims_terabytes_is_refused_before_they_are_allocated(tmp_path: Path) -> None:
    file = tmp_path / "rows.safetensors"
    rm.export_memory(kept("dense"), file)
    content = file.read_bytes()
    file.write_bytes(struct.pack("<Q", 1 << 40) + content[8:])
    with pytest.raises(CorruptFile, match="announces a header of 1,099,511,627,776 bytes"):
        rm.import_memory(file)
    for shape in ((1 << 40, 8), (1, 1 << 40), (-1, 8)):
        with zipfile.ZipFile(tmp_path / "rows.npz", "w") as archive:
            for name in ("keys", "labels", "predictions"):
                with archive.open(f"{name}.npy", "w") as member:
                    header = {"descr": "<f8", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, header)
        with pytest.raises(CorruptFile, match=r"rows.npz:keys .*announces the shape"):
            rm.import_memory(tmp_path / "rows.npz")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("seed", range(4))
def test_whatever_byte_is_changed_the_outcome_is_a_memory_or_an_error_of_ours(
    tmp_path: Path, suffix: str, seed: int
) -> None:
    """And under a checksum, which an .npz and a Parquet file have over their columns, no value is taken for another."""
    file = tmp_path / f"rows{suffix}"
    memory = kept("dense", n=30, text=True, groups=True)
    rm.export_memory(memory, file)
    content = file.read_bytes()
    random = np.random.default_rng(seed)
    refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        damaged[random.integers(len(content))] ^= 1 << int(random.integers(8))
        file.write_bytes(damaged)
        try:
            found = rm.import_memory(file)
        except ResidualMemoryError:
            refused += 1
            continue
        if suffix in (".npz", ".parquet"):
            # Where the key of the description is hit, the file is one of anybody's, whose types are the options'.
            whole = {name: column.astype(values(found)[name].dtype) for name, column in values(memory).items()}
            assert all((values(found)[name] == column).all() for name, column in whole.items())
    assert refused > 5


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_changed_value_of_an_npz_is_noticed(tmp_path: Path, save: Callable[..., None]) -> None:
    """Python's zipfile compares no checksum after a seek, so that nothing may seek in it."""
    save(tmp_path / "rows.npz", **columns(classification(n=300)))
    content = (tmp_path / "rows.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "rows.npz") as archive:
        places = {entry.filename: (entry.header_offset, entry.compress_size) for entry in archive.infolist()}
    for name, (start, size) in places.items():
        for place in np.linspace(start + 200, start + size, 20).astype(int).tolist():
            damaged = bytearray(content)
            damaged[place] ^= 2
            (tmp_path / "rows.npz").write_bytes(damaged)
            with pytest.raises(CorruptFile, match=name.removesuffix(".npy")):
                rm.import_memory(tmp_path / "rows.npz")


# ---------------------------------------------------------------------- rows


@pytest.mark.parametrize("first", [0, 16, 17, 18, 59, 60])
@pytest.mark.parametrize("size", [None, 1, 7, 1000])
def test_blocks_begin_at_any_row(file: Path, first: int, size: int | None) -> None:
    problem = classification()
    blocks = list(open_rows(saved(file, columns(problem))).blocks(first=first, size=size))
    assert [block.first for block in blocks] == list(first + np.cumsum([0, *map(len, blocks)])[:-1])
    found = np.concatenate([np.zeros((0, 5)), *(block.keys for block in blocks)])
    assert same_bits(found, problem.keys[first:])
    assert all(size is None or len(block) <= size for block in blocks)


def test_categories_and_compressed_batches_of_arrow_are_read(tmp_path: Path) -> None:
    problem, ids = classification(), names(np.arange(60))
    made = {
        "keys": problem.keys.tolist(),
        "label": problem.labels,
        "predictions": problem.predictions.tolist(),
        "id": pa.array(ids.tolist()),
        "group": pa.array(["a", "b", "c"] * 20).dictionary_encode(),
    }
    table = pa.table(made)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(tmp_path / "rows.arrow", table.schema, options=options) as file:
        file.write_table(table)
    found = rm.import_memory(tmp_path / "rows.arrow", key_dtype="float64", prediction_dtype="float64")
    assert_same(found, memory_of(problem, ids=ids, groups=np.array(["a", "b", "c"] * 20)))
