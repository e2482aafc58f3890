"""Recipes: result files resume row by row, near-duplicates are found, and the quick slice runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.cifar100 import sample_size, table
from experiments.cifar100.duplicates import near_duplicates
from experiments.cifar100.measuring import cost, keys_for
from experiments.results_file import RESULTS, ResultFile, Row
from residual_memory.demo.cifar100 import Cifar100, find_cifar100
from residual_memory.demo.networks import network_named
from residual_memory.demo.run import BEST, PLAIN

ROW: Row = {"method": "resmem", "base": 0.5, "corrected": 0.6, "gain": 0.1, "gain_low": 0.05, "gain_high": 0.15}


def test_a_row_that_the_file_holds_is_not_measured_again(tmp_path: Path) -> None:
    ResultFile("r", "command", "data", folder=tmp_path).row("a", 0, lambda: ROW)
    again = ResultFile("r", "command", "data", folder=tmp_path)

    def fail() -> Row:
        raise AssertionError("measured again")

    assert again.row("a", 0, fail)["gain"] == 0.1
    assert again.holds("a", 0)
    assert not again.holds("a", 1)
    assert set(json.loads((tmp_path / "r.json").read_text())) >= {
        "name",
        "command",
        "commit",
        "machine",
        "data",
        "created",
    }


def test_a_fresh_run_forgets_the_old_rows(tmp_path: Path) -> None:
    ResultFile("r", "command", "data", folder=tmp_path).row("a", 0, lambda: ROW)
    assert not ResultFile("r", "command", "data", folder=tmp_path, fresh=True).holds("a", 0)


def test_a_shifted_mirrored_and_brightened_copy_is_found_and_noise_is_not() -> None:
    random = np.random.default_rng(0)
    train = split(np.kron(random.integers(0, 200, (50, 3, 8, 8)), np.ones((1, 1, 4, 4))).astype(np.uint8))
    copy = np.roll(train.images[7], 1, axis=2)[..., ::-1].astype(int) + 20
    other = np.kron(random.integers(0, 200, (3, 8, 8)), np.ones((1, 4, 4)))
    found = near_duplicates(train, split(np.stack([copy, other]).astype(np.uint8)), threshold=0.6)
    assert (found.rows.tolist(), found.partners.tolist()) == ([0], [7])


@pytest.mark.skipif(find_cifar100() is None, reason="CIFAR-100 is not on this machine: run `make data`")
@pytest.mark.parametrize(
    ("recipe", "setting"),
    [(table, "resnet8 plain without near-duplicates"), (sample_size, "resnet8 100%, plain")],
)
def test_the_quick_slice_runs_and_leaves_the_results_alone(
    recipe: Any, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (RESULTS / f"{recipe.NAME}.json").read_bytes()
    recipe.run(quick=True, fresh=False)
    assert setting in capsys.readouterr().out
    assert (RESULTS / f"{recipe.NAME}.json").read_bytes() == before


def test_the_slope_of_gains_on_a_line_is_the_lines() -> None:
    rows = [
        {"n": n, "gain": 0.01 * np.log2(n), "gain_low": 0.01 * np.log2(n) - m, "gain_high": 0.01 * np.log2(n) + m}
        for n, m in ((1_000, 0.01), (2_000, 0.02), (8_000, 0.01))
    ]
    found = sample_size.slope(rows)
    assert found["gain"] == pytest.approx(0.01)
    assert found["gain_low"] < 0.01 < found["gain_high"]


def test_a_sample_that_the_memory_does_not_change_counts_in_the_slope() -> None:
    rows = [{"n": n, "gain": g, "gain_low": g - m, "gain_high": g + m} for n, g, m in ((1, 0.0, 0.0), (2, 0.1, 0.1))]
    assert sample_size.slope(rows)["gain"] == pytest.approx(0.1)


def test_the_cost_of_resnet8_is_that_of_its_layers() -> None:
    network = network_named("resnet8")
    assert cost(network)["parameters"] == sum(value.numel() for value in network.parameters())
    # By hand: 3 x 3 convolutions 442,368 + 2 * 2,359,296 + 1,179,648 + 2,359,296 + 1,179,648 + 2,359,296,
    # shortcuts 2 * 131,072, head 6,400.
    assert cost(network)["multiply_adds"] == 12_507_392


def test_the_last_block_of_a_deeper_network_gives_the_keys() -> None:
    assert keys_for(network_named("resnet20")).layer == "stage3.2.conv2@input+stage3@output"
    assert keys_for(network_named("mobilenetv2"), PLAIN) == PLAIN


def test_the_committed_results_reach_the_papers_figures_and_pass_them() -> None:
    rows = rows_of("cifar100")
    plain = rows["resnet8 plain", 0]
    assert plain["base"] >= 0.5646
    assert plain["gain"] >= 0.032
    tuned = rows[f"resnet8 {BEST.name}", 0]
    assert tuned["corrected"] >= 0.665
    assert tuned["log_loss_corrected"] < tuned["log_loss_temperature_scaled"]
    assert all(row["memory_only"] < row["corrected"] for row in rows.values() if "memory_only" in row)


def test_no_committed_network_loses_by_its_memory() -> None:
    assert all(row["gain_low"] > 0 or not row["chosen"]["shrinkage"] for row in resmem_rows("cifar100", "sample-size"))


def resmem_rows(*names: str) -> list[Row]:
    rows = [row for name in names for row in rows_of(name).values()]
    return [row for row in rows if row["method"] == "resmem" and "chosen" in row]


def rows_of(name: str) -> dict[tuple[str, int], Row]:
    content = json.loads((RESULTS / f"{name}.json").read_text())
    return {(row["setting"], row["seed"]): row for row in content["rows"]}


def split(images: np.ndarray) -> Cifar100:
    n = len(images)
    return Cifar100(images, np.zeros(n, np.int64), np.zeros(n, np.int64), ("a",), ("b",))


def test_what_is_not_known_is_null_in_a_result_file(tmp_path: Path) -> None:
    """The interval of one document is everything; JSON has no number for that."""
    row = {"base": 0.5, "gain": 0.1, "gain_low": float("-inf"), "gain_high": float("inf")}
    ResultFile("some", "", "", folder=tmp_path).row("one", 0, lambda: row)
    assert "Infinity" not in (tmp_path / "some.json").read_text()
    again = ResultFile("some", "", "", folder=tmp_path)
    assert again.rows[0]["gain_low"] is None
    assert "+10.00 [–, –]" in again.table()
