"""What rows carry (owners, expiry, tags, snippets) goes out and in, and what is no such thing is refused."""

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

import residual_memory as rm
from residual_memory.errors import CorruptFile, InvalidInput, ResidualMemoryError
from residual_memory.exchange import fields, open_rows
from residual_memory.exchange import rows as rows_module
from residual_memory.memory import Memory
from residual_memory.memory.attributes import NEVER, Attributes
from tests.exchange.forms import SUFFIXES, assert_same, kept, values
from tests.problems import classification, memory_of

N = 40
OWNERS = ["", "alice", "bob", "Zoë 猫", "a\nb\0c"]
TAGS: list[tuple[str, ...]] = [(), ("eu",), ("eu", "paid tier"), ("猫",)]
SNIPPETS = ["", "a cat", "x" * 300, "two\nlines \x1b[31m"]
LAST = 253_402_300_799  # of the year 9999


def carrying(place: Path | None = None, *only: str, n: int = N, seed: int = 0) -> Memory:
    """A memory of two segments, in the first of which rows carry something; with `only`, what is named there."""
    random = np.random.default_rng(seed)
    carried: dict[str, Any] = {
        "owners": [OWNERS[k] for k in random.integers(0, len(OWNERS), n)],
        "expires": np.array([NEVER, 0, 1_900_000_000, LAST])[random.integers(0, 4, n)],
        "tags": [TAGS[k] for k in random.integers(0, len(TAGS), n)],
        "snippets": [SNIPPETS[k] for k in random.integers(0, len(SNIPPETS), n)],
    }
    problem = classification(n=n, seed=seed)
    memory = Memory.create(place, dim=5, n_outputs=4)
    given = {name: value for name, value in carried.items() if not only or name in only}
    memory.append(problem.keys, problem.labels, problem.predictions, **given)
    plain = classification(n=7, seed=seed + 1)
    memory.append(plain.keys, plain.labels, plain.predictions)
    memory.forget([0, 9, n + 2])
    return memory


def attributes(memory: Memory) -> Attributes:
    return memory.attributes(memory.ids)


def assert_carry_the_same(found: Memory, wanted: Memory) -> None:
    mine, theirs = attributes(found), attributes(wanted)
    assert mine.expires.tolist() == theirs.expires.tolist()
    assert (mine.owners, mine.tags, mine.snippets) == (theirs.owners, theirs.tags, theirs.snippets)


@pytest.fixture(params=SUFFIXES)
def suffix(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("on_disk", [False, True], ids=["RAM", "disk"])
def test_what_rows_carry_goes_out_and_in(tmp_path: Path, suffix: str, on_disk: bool) -> None:
    memory = carrying(tmp_path / "first" if on_disk else None)
    assert len(set(attributes(memory).owners)) == len(OWNERS)
    rm.export_memory(memory, tmp_path / f"rows{suffix}")
    with rm.import_memory(tmp_path / f"rows{suffix}", tmp_path / "memory") as found:
        assert_same(found, memory)
        assert_carry_the_same(found, memory)
    again = Memory.open(tmp_path / "memory", verify=True)
    assert_carry_the_same(again, memory)
    assert again.inventory().owners == memory.inventory().owners


@pytest.mark.parametrize("name", ["owners", "expires", "tags", "snippets"])
def test_only_what_some_row_has_is_a_column(tmp_path: Path, suffix: str, name: str) -> None:
    memory = carrying(None, name)
    rm.export_memory(memory, tmp_path / f"rows{suffix}")
    columns = open_rows(tmp_path / f"rows{suffix}").columns
    assert columns == {"keys", "predictions", "labels", "ids", name}
    assert_carry_the_same(rm.import_memory(tmp_path / f"rows{suffix}"), memory)


def test_rows_that_carried_something_and_are_forgotten_leave_no_column(tmp_path: Path, suffix: str) -> None:
    memory = carrying()
    memory.forget([id for id in range(N) if id not in (0, 9)])
    rm.export_memory(memory, tmp_path / f"rows{suffix}")
    assert open_rows(tmp_path / f"rows{suffix}").columns == {"keys", "predictions", "labels", "ids"}
    content = (tmp_path / f"rows{suffix}").read_bytes()
    assert not [owner for owner in OWNERS if owner and owner.encode() in content]


def test_rows_come_in_any_blocks(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = carrying()
    monkeypatch.setattr(fields, "BLOCK_BYTES", 1 << 9)
    rm.export_memory(memory, tmp_path / f"rows{suffix}")
    rows, wanted = open_rows(tmp_path / f"rows{suffix}"), attributes(memory)
    for first in (0, 1, 16, rows.n_rows - 1, rows.n_rows):
        for size in (1, 7, 1000):
            blocks = list(rows.blocks(first=first, size=size))
            for name in ("owners", "tags", "snippets"):
                found = [value for block in blocks for value in getattr(block, name)]
                assert found == getattr(wanted, name)[first:], (first, size)
            moments = [block.expires for block in blocks if block.expires is not None]
            assert np.concatenate([np.zeros(0, np.int64), *moments]).tolist() == wanted.expires[first:].tolist()
    assert_carry_the_same(rm.import_memory(tmp_path / f"rows{suffix}"), memory)


def test_long_snippets_make_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "BLOCK_BYTES", 1 << 12)
    problem = classification(n=60)
    memory = memory_of(problem.rows([]))
    memory.append(problem.keys, problem.labels, problem.predictions, snippets=["x" * 1000] * 59 + ["y" * 9000])
    blocks = list(fields.Exported(memory).blocks())
    assert max(sum(map(len, block.snippets or ())) for block in blocks[:-1]) <= (1 << 12) + 1000, "and a row"
    assert sum(map(len, blocks)) == 60


# ---------------------------------------------------------------------- merging


def test_memories_with_and_without_are_merged(tmp_path: Path) -> None:
    plain = kept("dense", first=100)
    some = carrying(None, "owners", "tags")
    bare = memory_of(classification(n=5), ids=np.arange(500, 505), key_dtype="float32", prediction_dtype="float32")
    for parts in ([some, bare], [bare, some], [bare, carrying()]):
        merged = rm.merge_memories(parts, tmp_path / f"merged {len(list(tmp_path.iterdir()))}")
        wanted = [attributes(part) for part in parts]
        found = attributes(merged)
        for name in ("owners", "tags", "snippets"):
            assert getattr(found, name) == [value for part in wanted for value in getattr(part, name)]
        assert found.expires.tolist() == [value for part in wanted for value in part.expires.tolist()]
    assert attributes(rm.merge_memories([plain])).owners == [""] * len(plain)


# ---------------------------------------------------------------------- other tools


def test_columns_of_arrow_have_the_types_that_are_promised(tmp_path: Path) -> None:
    memory = carrying()
    rm.export_memory(memory, tmp_path / "rows.arrow")
    rm.export_memory(memory, tmp_path / "rows.parquet")
    schema = pa.ipc.open_file(tmp_path / "rows.arrow").schema
    assert schema.field("owner").type == schema.field("snippet").type == pa.string()
    assert schema.field("expires").type == pa.timestamp("s", "UTC")
    assert schema.field("tags").type == pa.list_(pa.field("item", pa.string(), nullable=False))
    wanted = attributes(memory)
    moments = [
        None if m == NEVER else datetime.datetime.fromtimestamp(m, datetime.UTC) for m in wanted.expires.tolist()
    ]
    for wide in (
        polars.read_ipc(tmp_path / "rows.arrow"),
        polars.read_parquet(tmp_path / "rows.parquet"),
    ):
        assert wide["owner"].to_list() == wanted.owners
        assert wide["expires"].to_list() == moments
        assert [tuple(tags) for tags in wide["tags"].to_list()] == wanted.tags
        assert wide["snippet"].to_list() == wanted.snippets


def test_numpy_and_safetensors_read_the_bytes_and_their_ends(tmp_path: Path) -> None:
    memory = carrying()
    rm.export_memory(memory, tmp_path / "rows.npz")
    rm.export_memory(memory, tmp_path / "rows.safetensors")
    wanted = attributes(memory)
    with np.load(tmp_path / "rows.npz", allow_pickle=False) as arrays:
        for found in (dict(arrays), load_file(tmp_path / "rows.safetensors")):
            assert found["expires"].tolist() == wanted.expires.tolist()
            for name, texts in (("owners", wanted.owners), ("snippets", wanted.snippets)):
                content, ends = found[name].tobytes(), found[f"{name}_ends"].tolist()
                assert [content[a:b].decode() for a, b in zip([0, *ends], ends, strict=False)] == texts


@pytest.mark.parametrize("tool", ["pandas", "polars"])
def test_what_another_tool_wrote_again_carries_the_same(tmp_path: Path, tool: str) -> None:
    memory = carrying()
    rm.export_memory(memory, tmp_path / "rows.parquet")
    if tool == "pandas":
        pandas.read_parquet(tmp_path / "rows.parquet").to_parquet(tmp_path / "again.parquet")
    else:
        polars.read_parquet(tmp_path / "rows.parquet").write_parquet(tmp_path / "again.parquet")
    found = rm.import_memory(tmp_path / "again.parquet")
    assert_carry_the_same(found, memory)
    assert all((values(found)[name] == column).all() for name, column in values(memory).items())


# ---------------------------------------------------------------------- files of others

Columns = dict[str, Any]


def theirs(n: int = 3, **more: Any) -> Columns:
    problem = classification(n=n)
    return {"keys": problem.keys, "labels": problem.labels, "predictions": problem.predictions, **more}


def test_text_of_numpy_is_taken(tmp_path: Path) -> None:
    columns = theirs(
        owners=np.array(["alice", "", "Zoë"]),
        snippets=np.array(["a", "bb", ""]),
        tags=np.array([["eu", "paid"], ["", ""], ["us", ""]]),
        expires=np.array([1.9e9, 0.0, 5.5]),
    )
    np.savez(tmp_path / "rows.npz", **columns)
    (tmp_path / "rows").mkdir()
    for name, column in columns.items():
        np.save(tmp_path / "rows" / f"{name}.npy", column)
    for place in ("rows.npz", "rows"):
        found = attributes(rm.import_memory(tmp_path / place))
        assert (found.owners, found.snippets) == (["alice", "", "Zoë"], ["a", "bb", ""])
        assert found.tags == [("eu", "paid"), (), ("us",)]
        assert found.expires.tolist() == [1_900_000_000, 0, 5]


def test_text_of_a_fixed_width_is_taken_from_safetensors(tmp_path: Path) -> None:
    save_file(theirs(owners=np.frombuffer(b"ann\0bob\0\0\0\0\0", np.uint8).reshape(3, 4)), tmp_path / "r.safetensors")
    assert attributes(rm.import_memory(tmp_path / "r.safetensors")).owners == ["ann", "bob", ""]


def as_arrow(place: Path, **columns: Any) -> Path:
    data = theirs()
    made = {"keys": data["keys"].tolist(), "label": data["labels"], "predictions": data["predictions"].tolist()}
    pq.write_table(pa.table({**made, **columns}), place)
    return place


def test_nothing_is_nothing_in_arrow(tmp_path: Path) -> None:
    file = as_arrow(
        tmp_path / "rows.parquet",
        owner=pa.array(["alice", None, "bob"]).dictionary_encode(),
        snippet=pa.nulls(3),
        tags=pa.array([["eu"], None, []]),
        expires=pa.array([datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC), None, None], pa.timestamp("ns", "UTC")),
    )
    found = attributes(rm.import_memory(file))
    assert (found.owners, found.snippets, found.tags) == (["alice", "", "bob"], [""] * 3, [("eu",), (), ()])
    assert found.expires.tolist() == [1_893_456_000, NEVER, NEVER]
    one = attributes(rm.import_memory(as_arrow(tmp_path / "one.parquet", tags=["eu", None, ""], expires=[5, None, 7])))
    assert (one.tags, one.expires.tolist()) == ([("eu",), (), ()], [5, NEVER, 7])


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ({"owner": [1, 2, 3]}, "column 'owner' .* is int64, expected text"),
        ({"snippet": [["a"], ["b"], ["c"]]}, "column 'snippet' .*expected text"),
        ({"tags": [1, 2, 3]}, "column 'tags' .* is int64, expected lists of text"),
        ({"tags": [["a"], [None], ["c"]]}, "column 'tags' of .* has missing values among its texts"),
        ({"tags": [["a"], ["b\nc"], ["c"]]}, "is no tag"),
        ({"expires": ["soon", "later", "never"]}, "column 'expires' .* is string, expected a timestamp with a time"),
        ({"expires": [datetime.datetime(2030, 1, 1)] * 3}, "expected a timestamp with a time zone, or seconds"),
        ({"expires": [5, -1, None]}, "column 'expires' .* holds -1, which is no moment"),
        ({"expires": [5.0, float("nan"), 1.0]}, "holds nan, which is no moment"),
        ({"expires": [datetime.datetime(1969, 1, 1, tzinfo=datetime.UTC)] * 3}, "which is no moment"),
    ],
)
def test_what_is_no_such_column_of_arrow_is_refused(tmp_path: Path, column: Columns, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        rm.import_memory(as_arrow(tmp_path / "rows.parquet", **column))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"owners": np.arange(3)}, r"npz:owners is int64 \(3,\), expected texts, or bytes"),
        ({"owners": np.array([["a"], ["b"], ["c"]])}, r"npz:owners is <U1 \(3, 1\), expected texts"),
        ({"owners": np.array(["a", "b"])}, "npz:owners has 2 rows, but there are 3 keys"),
        ({"owners_ends": np.arange(3)}, "holds 'owners_ends', but no 'owners'"),
        ({"owners": np.zeros(3, np.float32), "owners_ends": np.arange(1, 4)}, "owners is float32 .*expected the bytes"),
        ({"owners": np.zeros(3, np.uint8), "owners_ends": np.ones(3)}, "owners_ends is float64 .*expected where"),
        ({"owners": np.zeros(3, np.uint8), "owners_ends": np.arange(4)}, "owners_ends has 4 rows, but there are 3"),
        ({"expires": np.array(["2030-01-01"] * 3, "M8[s]")}, "npz:expires is datetime64.*expected seconds since 1970"),
        ({"expires": np.array([1, -2, 3])}, "npz:expires holds -2, which is no moment"),
        ({"expires": np.array([1, 1 << 63, 3], np.uint64)}, "which is no moment"),
        ({"expires": np.array([1, np.inf, 3])}, "npz:expires holds inf"),
    ],
)
def test_what_is_no_such_array_is_refused(tmp_path: Path, columns: Columns, said: str) -> None:
    np.savez(tmp_path / "rows.npz", **theirs(**columns))
    with pytest.raises(InvalidInput, match=said):
        rm.import_memory(tmp_path / "rows.npz", tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


def rewritten(file: Path, change: Callable[[Columns], Any]) -> None:
    """An exported file with other arrays beside the same description."""
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            data = dict(arrays)
        change(data)
        np.savez(file, **data)
        return
    from safetensors import safe_open

    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    data = load_file(file)
    change(data)
    save_file(data, file, metadata)


def shifted(name: str, place: int, value: int) -> Callable[[Columns], Any]:
    def change(data: Columns) -> None:
        data[name] = data[name].copy()
        data[name][place] = value

    return change


@pytest.mark.parametrize("file", [Path("rows.npz"), Path("rows.safetensors")], ids=str)
@pytest.mark.parametrize(
    "change",
    [
        shifted("owners_ends", -1, 1 << 40),
        shifted("owners_ends", -1, 0),
        shifted("owners_ends", 0, -5),
        shifted("owners_ends", 3, 1 << 62),
        shifted("tags_ends", 3, 0),
        lambda data: data.update(snippets=data["snippets"][:-1]),
        lambda data: data.update(snippets=np.append(data["snippets"], np.uint8(65))),
        shifted("snippets", 0, 0xFF),
    ],
)
def test_texts_that_do_not_end_where_rows_do_are_corrupt(
    tmp_path: Path, file: Path, change: Callable[[Columns], Any]
) -> None:
    rm.export_memory(carrying(), tmp_path / file)
    rewritten(tmp_path / file, change)
    with pytest.raises(CorruptFile):
        rm.import_memory(tmp_path / file, tmp_path / "memory")
    assert not (tmp_path / "memory").exists()
    with pytest.raises(CorruptFile):
        list(open_rows(tmp_path / file).blocks(size=1))


@pytest.mark.parametrize("file", [Path("rows.npz"), Path("rows.safetensors")], ids=str)
def test_a_column_that_is_missing_is_not_taken_for_rows_of_nobody(tmp_path: Path, file: Path) -> None:
    rm.export_memory(carrying(), tmp_path / file)
    rewritten(tmp_path / file, lambda data: (data.pop("owners"), data.pop("owners_ends")))
    with pytest.raises(CorruptFile, match="rows that carry 'owners', which are not there; export the memory again"):
        rm.import_memory(tmp_path / file)


@pytest.mark.parametrize("file", [Path("rows.parquet"), Path("rows.arrow")], ids=str)
def test_a_column_that_is_missing_in_arrow_likewise(tmp_path: Path, file: Path) -> None:
    rm.export_memory(carrying(), tmp_path / file)
    if file.suffix == ".parquet":
        pq.write_table(pq.read_table(tmp_path / file).drop_columns(["expires"]), tmp_path / file)
    else:
        table = pa.ipc.open_file(pa.py_buffer((tmp_path / file).read_bytes())).read_all().drop_columns(["expires"])
        with pa.ipc.new_file(tmp_path / file, table.schema) as out:
            out.write_table(table)
    with pytest.raises(CorruptFile, match="rows that carry 'expires'"):
        rm.import_memory(tmp_path / file)


def test_a_moment_that_parquet_cannot_say_is_refused_and_arrow_says_it(tmp_path: Path) -> None:
    problem = classification(n=2)
    memory = memory_of(problem.rows([]))
    memory.append(problem.keys, problem.labels, problem.predictions, expires=[NEVER - 1, NEVER])
    with pytest.raises(InvalidInput, match=r"s after 1970, which Parquet cannot say; write .arrow or .npz"):
        rm.export_memory(memory, tmp_path / "rows.parquet")
    assert not list(tmp_path.iterdir())
    for suffix in (".arrow", ".npz", ".safetensors"):
        rm.export_memory(memory, tmp_path / f"rows{suffix}")
        assert_carry_the_same(rm.import_memory(tmp_path / f"rows{suffix}"), memory)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_byte_is_changed_rows_do_not_change_their_owner(tmp_path: Path, seed: int) -> None:
    file = tmp_path / "rows.npz"
    memory = carrying(n=12)
    rm.export_memory(memory, file)
    content, random, refused = file.read_bytes(), np.random.default_rng(seed), 0
    for place in random.integers(0, len(content), 80).tolist():
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(random.integers(8))
        file.write_bytes(damaged)
        try:
            found = rm.import_memory(file)
        except ResidualMemoryError:
            refused += 1
            continue
        assert_carry_the_same(found, memory)
    assert refused > 20


def test_the_description_names_what_is_carried(tmp_path: Path) -> None:
    rm.export_memory(carrying(None, "owners", "expires"), tmp_path / "rows.npz")
    with np.load(tmp_path / "rows.npz") as arrays:
        assert json.loads(str(arrays["memory.json"][0]))["body"]["carried"] == ["expires", "owners"]


def test_blocks_can_be_cut_with_what_they_carry() -> None:
    block = next(fields.Exported(carrying()).blocks())
    rows = np.arange(len(block)) % 3 == 0
    some = block.taken(rows)
    assert isinstance(some, rows_module.Block)
    assert some.owners == [owner for owner, wanted in zip(block.owners or (), rows, strict=True) if wanted]
    assert (some.expires == block.expires[rows]).all() if block.expires is not None else False
    assert (some.keys == block.keys[rows]).all()
