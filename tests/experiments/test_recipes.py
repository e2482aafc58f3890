"""Recipes: result files resume row by row, near-duplicates are found, and the quick slice runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.cifar100 import resnet8
from experiments.cifar100.duplicates import near_duplicates
from experiments.results_file import RESULTS, ResultFile, Row
from residual_memory.demo.cifar100 import Cifar100, find_cifar100

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
def test_the_quick_slice_runs_and_leaves_the_results_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = (RESULTS / "cifar100-resnet8.json").read_bytes()
    resnet8.run(quick=True, fresh=False)
    assert "resnet8 plain without near-duplicates" in capsys.readouterr().out
    assert (RESULTS / "cifar100-resnet8.json").read_bytes() == before


def test_the_committed_results_reach_the_papers_figures() -> None:
    rows = {
        (row["setting"], row["seed"]): row
        for row in json.loads((RESULTS / "cifar100-resnet8.json").read_text())["rows"]
    }
    assert rows["resnet8 plain", 0]["base"] >= 0.5646
    assert all(rows["resnet8 plain", seed]["gain"] >= 0.032 for seed in (0, 1, 2))
    assert all(rows["resnet8 tuned 4x4", seed]["gain"] >= 0.055 for seed in (0, 1, 2))
    assert all(row["memory_only"] < row["corrected"] for row in rows.values() if "memory_only" in row)


def split(images: np.ndarray) -> Cifar100:
    n = len(images)
    return Cifar100(images, np.zeros(n, np.int64), np.zeros(n, np.int64), ("a",), ("b",))
