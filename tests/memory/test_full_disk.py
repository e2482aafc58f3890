"""On a disk that is really full rows can be forgotten, and nothing is lost."""

import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from residual_memory.errors import CorruptFile
from residual_memory.memory import Memory
from residual_memory.memory.reading import forgotten_table
from tests.memory.test_format import body_of, gone_of, with_header, write_body
from tests.problems import classification, memory_of

PREAMBLE = """
import errno, os, sys
import numpy as np
from pathlib import Path
from residual_memory.errors import StorageFailure
from residual_memory.correction import ResidualKNN
from residual_memory.memory import Memory

disk = Path(sys.argv[1])
path = disk / "memory"

def rows(n, seed):
    random = np.random.default_rng(seed)
    return random.normal(size=(n, 4)), random.integers(0, 2, n), np.full((n, 2), 0.5)

def fill(memory, n):
    "Append until the disk refuses, and then take what is left to the last byte."
    for seed in range(10_000):
        try:
            memory.append(*rows(n, seed))
        except StorageFailure as error:
            assert error.errno == errno.ENOSPC, error
            assert "free some space" in str(error), error
            break
    else:
        raise AssertionError("the disk is never full")
    with open(disk / "other", "wb", buffering=0) as other:
        for size in (4096, 1):
            try:
                while True:
                    other.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC
    statistics = os.statvfs(disk)
    assert statistics.f_bavail == 0, statistics
    return memory.ids

def whole(ids):
    memory = Memory.open(path, verify=True)
    assert memory.ids.tolist() == list(ids)
    assert memory.verify().ok
    knn = ResidualKNN(memory, n_neighbors=1, bandwidth=1.0, index="exact:numpy")
    keys = memory.snapshot.keys.take(np.flatnonzero(memory.snapshot.alive)[:50])
    assert (knn.neighbors(keys).ids[:, 0] == np.array(ids)[:50]).all()

memory = Memory.create(path, dim=4, n_outputs=2)
"""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a disk of 1 MiB can be mounted, seen by the script alone."""
    folder = tmp_path_factory.mktemp("disk")
    if shutil.which("unshare") is None:
        pytest.skip("unshare is missing, by which a small disk is mounted")
    result = on_disk(folder, "pass")
    if result.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted in a user namespace here: {result.stderr.strip()}")
    return folder


def on_disk(folder: Path, script: str) -> "subprocess.CompletedProcess[str]":
    inside = 'mount -t tmpfs -o size=1m tmpfs "$1" && exec "$2" -W error -c "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", inside, "sh", str(folder), sys.executable, script]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def run(folder: Path, script: str) -> str:
    result = on_disk(folder, PREAMBLE + script)
    assert result.returncode == 0, result.stderr
    assert not list(folder.iterdir()), "the disk was the script's alone"
    return result.stdout


def test_appends_are_refused_on_a_full_disk_and_the_memory_is_as_it_was(disk: Path) -> None:
    said = run(
        disk,
        """
ids = fill(memory, 100)
assert len(ids) > 1000
version = memory.version
for change in (lambda: memory.append(*rows(100, 9)), lambda: memory.save_setting({"a": "b" * 9000})):
    try:
        change()
    except StorageFailure as error:
        assert "the memory is as it was" in str(error), error
    else:
        raise AssertionError("there was room")
assert (memory.version, len(memory)) == (version, len(ids))
whole(ids)
print(len(ids) % 100)
""",
    )
    assert said == "0\n"


@pytest.mark.parametrize("reopened", [False, True])
def test_half_of_the_rows_are_forgotten_on_a_full_disk(disk: Path, reopened: bool) -> None:
    run(
        disk,
        f"""
ids = fill(memory, 100)
if {reopened}:
    memory.close()
    memory = Memory.open(path, writable=True)
assert memory.forget(ids[::2]) == len(ids[::2])
assert memory.ids.tolist() == ids[1::2].tolist()
whole(ids[1::2])
memory.close()
whole(ids[1::2])
memory = Memory.open(path, writable=True)
assert memory.forget(where={{"label": 0}}) > 0
left = memory.ids
assert len(left) < len(ids[1::2])
whole(left)
""",
    )


def test_thousands_of_rows_are_forgotten_one_call_after_the_other_on_a_full_disk(disk: Path) -> None:
    """The room that is held is given back once and then serves every call: lists of forgotten rows replace another."""
    said = run(
        disk,
        """
ids = fill(memory, 500)
for name in ids[:3000].tolist():
    assert memory.forget([name]) == 1
assert len(ids) > 3000
assert memory.ids.tolist() == ids[3000:].tolist()
memory.close()
whole(ids[3000:])
print(memory.version > 3000)
""",
    )
    assert said == "True\n"


def test_once_space_is_free_the_memory_is_compacted_and_grows_again(disk: Path) -> None:
    run(
        disk,
        """
memory.append(*rows(4000, 1))
keep = memory.ids[:500]
ids = fill(memory, 100)
memory.forget(ids[500:])
whole(keep)
(disk / "other").unlink()
certificate = memory.compact(search_files=True)
assert certificate.erased == len(ids) - 500
assert certificate.search.found == 0
whole(keep)
memory.append(*rows(1000, 2))
whole(memory.ids)
assert (path / "reserve").stat().st_size > 64 << 10, "room is held again"
""",
    )


def test_a_full_disk_without_room_held_refuses_to_forget_and_says_so(disk: Path) -> None:
    run(
        disk,
        """
import residual_memory.memory.memory as store
store.RESERVE_BYTES = -(1 << 30)
ids = fill(memory, 100)
try:
    memory.forget(ids[:2])
except StorageFailure as error:
    assert error.errno == errno.ENOSPC and "free some space" in str(error), error
else:
    raise AssertionError("there was room")
whole(ids)
(disk / "other").unlink()
assert memory.forget(ids[:2]) == 2
whole(ids[2:])
""",
    )


# ---------------------------------------------------------------------- forgotten rows as they are stored


@given(data=st.data())
def test_forgotten_rows_are_the_same_by_number_and_by_bits(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    n = data.draw(st.integers(1, 300))
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=20))), np.int64)
    table = forgotten_table(rows, n)
    assert set(table) == ({"rows"} if 64 * len(rows) <= n else {"bits"})
    size = sum(column.nbytes for column in table.values())
    assert size <= min(8 * len(rows), -(-n // 8)), "the shorter of both"
    problem = classification(n=n, d=1, c=2)
    path = tmp_path_factory.mktemp("gone") / "memory"
    with memory_of(problem, path, key_dtype="float32") as memory:
        memory.forget(rows)
    found = Memory.open(path, verify=True)
    assert found.snapshot.forgotten.tolist() == rows.tolist()
    assert found.ids.tolist() == np.setdiff1d(np.arange(n), rows).tolist()


RIGHT = [0b11000000, 0]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("bits", RIGHT),
        ("bits", [0b11000000, 0b00100000]),
        ("bits", [0b10000000, 0b00100000]),
        ("bits", [0b10000000, 0]),
        ("bits", [0b11100000, 0]),
        ("bits", []),
        ("rows", [0, 10]),
        ("rows", [-1, 0]),
        ("rows", [1, 0]),
        ("rows", [1, 1]),
        ("rows", [1]),
    ],
    ids=str,
)
def test_a_list_that_names_other_rows_than_there_are_is_damage(tmp_path: Path, column: str, values: list[int]) -> None:
    """Under right checksums; two of ten rows are forgotten."""
    path = tmp_path / "memory"
    with memory_of(classification(n=10), path) as memory:
        memory.forget([0, 1])
    kind, dtype = ("U8", np.uint8) if column == "bits" else ("I64", np.int64)
    data = np.array(values, dtype).tobytes()
    entry = f'{{"{column}":{{"dtype":"{kind}","shape":[{len(values)}],"data_offsets":[0,{len(data)}]}}}}'
    content = with_header(entry.encode(), data)
    gone_of(path).write_bytes(content)
    body = body_of(path)
    body["forgotten"]["file"].update(length=len(content), crc32=[zlib.crc32(content)])
    write_body(path, body)
    if values == RIGHT:
        assert Memory.open(path, verify=True).ids.tolist() == list(range(2, 10))
    else:
        with pytest.raises(CorruptFile):
            Memory.open(path, verify=True)
