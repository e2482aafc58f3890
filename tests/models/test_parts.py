"""A build in parts, by whoever: the parts make the memory that one build makes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residual_memory as rm
from residual_memory.errors import FingerprintMismatch, InvalidInput
from residual_memory.memory import Memory
from residual_memory.memory.storage import part_of
from residual_memory.models.parts import PART_NAME, make_part, place_of, planned, unfinished_in, whole_parts
from tests.models.nets import Examples, Mlp, mlp_data, rows_of

N = 50


def seeded(seed: int) -> Mlp:
    """A network whose keys are never all zero, which have no direction."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Mlp().eval()
        torch.nn.init.constant_(model.body[0].bias[:1], 9.0)  # type: ignore[index]
    return model


MODEL = seeded(0)
DATA = mlp_data(N)


def mirrored(x: Any) -> Any:
    return -x


def build(path: Path, rows: range | None = None, data: Examples = DATA, model: Mlp = MODEL, **options: Any) -> Memory:
    return rm.build_memory(model, data, path, layer="head", batch_size=8, part=rows, verbose=False, **options)


def made(folder: Path, *ranges: range, **options: Any) -> list[Path]:
    """Finished parts of these rows."""
    for rows in ranges:
        build(place_of(folder, rows), rows, **options).close()
    return [place_of(folder, rows) for rows in ranges]


def assert_same(found: Memory, wanted: Memory) -> None:
    """Every column of every row to the last bit, and the description."""
    one, other = found.snapshot, wanted.snapshot
    assert set(one.tables[0]) == set(other.tables[0])
    for name in one.tables[0]:
        np.testing.assert_array_equal(rows_of(found, name), rows_of(wanted, name))
    np.testing.assert_array_equal(found.ids, wanted.ids)
    for name in ("layout", "class_names", "source", "id_kind", "group_kind", "next_id"):
        assert getattr(one.manifest, name) == getattr(other.manifest, name), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"copies": [mirrored], "metric": "cosine", "key_dtype": "float16"},
        {"ids": [f"file {number}" for number in range(N)]},
        {"predictions": np.full((N, 3), 1 / 3)},
    ],
    ids=["plain", "copies", "names", "out of fold"],
)
def test_parts_in_any_order_make_the_memory_of_one_build(tmp_path: Path, options: dict[str, Any]) -> None:
    n = N * (1 + len(options.get("copies", ())))
    ranges = [range(16), range(16, 40), range(40, n)]
    parts = made(tmp_path, *ranges, **options)
    with rm.join_parts(parts[::-1], tmp_path / "whole") as whole, build(tmp_path / "single", **options) as single:
        assert_same(whole, single)
    shutil.rmtree(parts[0])
    with Memory.open(tmp_path / "whole", verify=True) as whole:
        assert_same(whole, single)


def test_a_whole_memory_is_one_that_build_memory_knows_as_finished(tmp_path: Path) -> None:
    rm.join_parts(made(tmp_path, range(N)), tmp_path / "whole").close()
    with build(tmp_path / "whole", data=mlp_data(N)) as whole:
        assert whole.version == 1


def test_an_interrupted_part_goes_on(tmp_path: Path) -> None:
    data = mlp_data(N)
    data.fails_at = 35
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "part", range(16, 40), data)
    with pytest.raises(InvalidInput, match=r"part at \S+part was not built to its end; build it again"):
        rm.join_parts([tmp_path / "part"], tmp_path / "whole")
    data.fails_at = None
    with build(tmp_path / "part", range(16, 40), data) as memory:
        assert memory.ids.tolist() == list(range(16, 40))


@pytest.mark.parametrize("rows", [range(51), range(10, 10), range(0, 10, 2), range(-1, 5)])
def test_what_is_no_range_of_the_rows_is_refused(tmp_path: Path, rows: range) -> None:
    with pytest.raises(InvalidInput, match=r"expected range\(first, end\) within the 50 rows"):
        build(tmp_path / "part", rows)
    assert not (tmp_path / "part").exists()


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ([range(10), range(20, N)], "rows 10 to 20 are in no part of the 50 rows"),
        ([range(10, N)], "rows 0 to 10 are in no part"),
        ([range(10)], "rows 10 to 50 are in no part"),
        ([range(20), range(10, N)], "row 10 is in two parts"),
    ],
)
def test_rows_that_are_missing_or_there_twice_are_named(tmp_path: Path, ranges: list[range], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        rm.join_parts(made(tmp_path, *ranges), tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_parts_of_another_model_or_of_no_build_are_refused(tmp_path: Path) -> None:
    first = made(tmp_path, range(20))
    second = made(tmp_path, range(20, N), model=seeded(1))
    with pytest.raises(FingerprintMismatch, match="has another source than the one at"):
        rm.join_parts([*first, *second], tmp_path / "whole")
    build(tmp_path / "single").close()
    with pytest.raises(InvalidInput, match="holds no part"):
        rm.join_parts([tmp_path / "single"], tmp_path / "whole")
    with pytest.raises(InvalidInput, match="no parts"):
        rm.join_parts([], tmp_path / "whole")


@pytest.mark.parametrize(("n_rows", "n_parts", "step"), [(100, 4, 8), (100, 7, 1), (5, 4, 8), (64, 1, 8), (1, 9, 256)])
def test_a_plan_covers_each_row_once_in_whole_batches(tmp_path: Path, n_rows: int, n_parts: int, step: int) -> None:
    ranges = planned(tmp_path, n_rows, n_parts, step)
    assert [row for rows in ranges for row in rows] == list(range(n_rows))
    assert len(ranges) <= n_parts
    assert all(rows.start % step == 0 for rows in ranges)


def test_a_plan_keeps_the_parts_that_are_there(tmp_path: Path) -> None:
    there = [range(8, 24), range(24, 40)]
    for rows in there:
        place_of(tmp_path, rows).mkdir()
    (tmp_path / ".rows-000000000000-000000000008-0123abcd.part").mkdir()
    ranges = planned(tmp_path, N, 2, 8)
    assert whole_parts(tmp_path) == there
    assert [row for rows in ranges for row in rows] == list(range(N))
    assert all(rows in ranges for rows in there)


def builder(rows: range, calls: list[Path]) -> Callable[[Path], Memory]:
    def make(place: Path) -> Memory:
        calls.append(place)
        return build(place, rows)

    return make


def test_a_part_is_there_when_it_is_whole_and_not_before(tmp_path: Path) -> None:
    rows, calls = range(16), list[Path]()
    home = place_of(tmp_path, rows)

    def failing(place: Path) -> Memory:
        build(place, rows).close()
        assert not home.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_part(tmp_path, rows, failing)
    assert list(tmp_path.iterdir()) == []
    make_part(tmp_path, rows, builder(rows, calls))
    assert whole_parts(tmp_path) == [rows]
    assert calls[0] != home
    make_part(tmp_path, rows, builder(rows, calls))
    assert calls[1:] == [home], "what is whole is only looked at"


def test_a_part_that_another_worker_finished_first_is_kept(tmp_path: Path) -> None:
    rows = range(16)
    home = place_of(tmp_path, rows)

    def slow(place: Path) -> Memory:
        memory = build(place, rows)
        build(home, rows).close()
        return memory

    make_part(tmp_path, rows, slow)
    assert list(tmp_path.iterdir()) == [home]
    assert Memory.open(home, verify=True).ids.tolist() == list(rows)


def test_a_part_of_another_model_is_refused_and_kept(tmp_path: Path) -> None:
    rows = range(16)
    made(tmp_path, rows, model=seeded(1))
    with pytest.raises(FingerprintMismatch):
        make_part(tmp_path, rows, builder(rows, []))
    assert whole_parts(tmp_path) == [rows]


def test_what_was_never_finished_is_found_by_its_name(tmp_path: Path) -> None:
    begun = {name: part_of(tmp_path / name) for name in ("whole", "whole-2", place_of(tmp_path, range(8)).name)}
    for path in begun.values():
        path.mkdir()
    for name in ("whole", ".whole", "whole.part"):
        (tmp_path / name).mkdir()
    assert unfinished_in(tmp_path, "whole") == [begun["whole"]], "and not that of another memory"
    assert unfinished_in(tmp_path, PART_NAME) == [begun["rows-000000000000-000000000008"]]
