"""The recipe of smaller memories: it leaves what it says, its quick slice runs, and its committed rows are its own."""

import json

import numpy as np
import pytest

from experiments import shrinking
from experiments.results_file import RESULTS, Row
from residual_memory.demo.cifar100 import find_cifar100
from tests.experiments.test_language import needs_text
from tests.problems import classification, memory_of

IMAGES = ("cifar100 plain", "cifar100 tuned 4x4")
TEXT = "enwiki tiny"


@pytest.mark.parametrize("drop", ["drawn", "random", "small"])
def test_every_way_to_leave_half_of_the_rows_leaves_half(drop: str) -> None:
    memory = memory_of(classification(n=200))
    half = shrinking.Way("half", 0.5, drop)(memory, 0)
    assert len(half) == 100
    assert set(half.ids) < set(memory.ids)
    assert len(memory) == 200
    assert (set(shrinking.Way("half", 0.5, drop)(memory, 1).ids) == set(half.ids)) == (drop == "small")


def test_the_whole_memory_is_the_memory_itself() -> None:
    memory = memory_of(classification())
    assert shrinking.Way(shrinking.WHOLE)(memory, 0) is memory
    figures = shrinking.bytes_of(shrinking.Way("top 2", options={"top_m": 2})(memory, 0), memory)
    assert figures["value_bytes"] == 2 + 2 * 2 + 2 + 1
    assert figures["share_of_bytes"] == (8 + 5 * 8 + 9) / (8 + 5 * 8 + 4 + 4 * 8)


@needs_text
@pytest.mark.skipif(find_cifar100() is None, reason="CIFAR-100 is not on this machine: run `make data`")
def test_the_quick_slice_runs_and_leaves_the_results_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = (RESULTS / "shrinking.json").read_bytes()
    shrinking.run(quick=True, fresh=False)
    out = capsys.readouterr().out
    assert "cifar100 plain, 50%, drawn" in out
    assert "c4 micro, top 2" in out
    assert (RESULTS / "shrinking.json").read_bytes() == before


def committed() -> list[Row]:
    rows: list[Row] = json.loads((RESULTS / "shrinking.json").read_text())["rows"]
    return rows


def test_the_committed_rows_are_those_of_the_recipe() -> None:
    for name in IMAGES:
        ways = (shrinking.Way(shrinking.WHOLE), *shrinking.IMAGE_WAYS)
        wanted = {(way.name, seed) for way in ways for seed in range(shrinking.DRAWS if shrinking.is_drawn(way) else 1)}
        held = [row for row in committed() if row["setting"].startswith(f"{name}, ")]
        assert {(row["setting"].partition(", ")[2], row["seed"]) for row in held} == wanted
    held = [row for row in committed() if row["setting"].startswith(f"{TEXT}, ")]
    wanted_names = {shrinking.WHOLE, *(way.name for way in shrinking.TEXT_WAYS)}
    assert {shrinking.WHOLE} < {row["setting"].partition(", ")[2] for row in held} <= wanted_names
    assert len({row["commit"] for row in committed()}) == 1


def test_the_page_shows_the_committed_figures() -> None:
    page = (RESULTS.parents[1] / "docs" / "shrinking.md").read_text(encoding="utf-8")
    assert shrinking.image_table(committed(), IMAGES) in page
    assert shrinking.text_table(committed(), TEXT) in page


def test_draws_are_averaged() -> None:
    rows: list[Row] = [
        {"setting": "a, 50%, drawn", "seed": seed, "gain": gain, "gain_old_setting": None, "chosen": {}}
        for seed, gain in enumerate((0.1, 0.2))
    ]
    found = shrinking.averaged([*rows, {**rows[0], "setting": "b, whole"}], "a")
    assert list(found) == ["50%, drawn"]
    assert found["50%, drawn"]["gain"] == pytest.approx(np.mean([0.1, 0.2]))
    assert found["50%, drawn"]["gain_old_setting"] is None
