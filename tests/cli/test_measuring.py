"""Tuning, evaluation and speed: honest figures."""

from pathlib import Path

import numpy as np
import pytest

import residual_memory as rm
from tests.cli.workshop import as_npz, columns, done, noise, regression, resmem


def test_the_figures_are_the_librarys(memory: Path) -> None:
    held = columns(200, 4)
    wanted = rm.tune(rm.Memory.open(memory), held["keys"], held["labels"], held["predictions"])
    found = done("tune", memory, "--data", "held.npz", "--json").json
    assert {name: found[name] for name in wanted.to_dict()} == wanted.to_dict()
    assert found["verdict"] == wanted.verdict
    assert found["base_low"] == wanted.base.low
    assert found["setting"] == wanted.best.to_dict()


def test_people_see_three_lines_with_intervals_and_the_verdict(memory: Path) -> None:
    lines = done("tune", memory, "--data", "held.npz").out.splitlines()
    for name in ("base ", "memory only ", "corrected "):
        line = next(line for line in lines if line.startswith(name))
        assert line.count("%") == 1
        assert " to " in line
    assert any(line.startswith("gain +") and "on 200 held-out rows" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_no_gain_exits_with_1_and_leaves_the_base_alone(here: Path) -> None:
    as_npz(here / "train.npz", noise(400, 3))
    as_npz(here / "held.npz", noise(200, 4))
    done("build", "mem", "--data", "train.npz")
    ran = resmem("tune", "mem", "--data", "held.npz", "--json")
    assert ran.code == 1
    assert not ran.json["helps"]
    assert "do not deploy" in ran.json["verdict"]
    assert ran.json["setting"]["shrinkage"] == 0
    assert resmem("evaluate", "mem", "--data", "held.npz").code == 1
    assert resmem("evaluate", "mem", "--data", "held.npz", "--shrinkage", 1, "--n-neighbors", 5).code == 1
    assert done("predict", "mem", "--data", "held.npz", "--json").json["changed"] == 0
    assert "change nothing" in done("explain", "mem", "--data", "held.npz", "--row", 0).out


def test_overrides_replace_parts_of_the_saved_setting(memory: Path) -> None:
    done("tune", memory, "--data", "held.npz")
    saved = done("info", memory, "--json").json["setting"]
    words = ("--n-neighbors", 7, "--bandwidth", "auto", "--temperature", 1.5, "--shrinkage", 0.5)
    found = done("evaluate", memory, "--data", "held.npz", "--json", *words).json["setting"]
    assert found == saved | {"n_neighbors": 7, "bandwidth": "auto", "temperature": 1.5, "shrinkage": 0.5}
    assert resmem("evaluate", memory, "--data", "held.npz", "--shrinkage", 0).code == 1  # the base, exactly


@pytest.mark.parametrize(
    ("metric", "index"), [("log_loss", "auto"), ("accuracy", "exact:numpy"), ("accuracy", "faiss:IVF4,Flat?nprobe=4")]
)
def test_metrics_and_indexes_can_be_chosen(memory: Path, metric: str, index: str) -> None:
    found = done("tune", memory, "--data", "held.npz", "--metric", metric, "--index", index, "--json").json
    assert found["metric"] == metric


def test_rows_that_the_memory_holds_are_pointed_out(memory: Path) -> None:
    assert "100 % of train.npz are rows that the memory holds" in done("tune", memory, "--data", "train.npz").err
    assert "memory holds" not in done("tune", memory, "--data", "held.npz").err


def test_documents_widen_the_interval(here: Path) -> None:
    train, held = columns(400), columns(200, 4)
    train["groups"], held["groups"] = np.arange(400) // 8, np.arange(200) // 40
    as_npz(here / "a.npz", train)
    as_npz(here / "b.npz", held)
    done("build", "mem", "--data", "a.npz")
    grouped = done("tune", "mem", "--data", "b.npz", "--json").json
    held.pop("groups")
    as_npz(here / "b.npz", held)
    alone = done("tune", "mem", "--data", "b.npz", "--json").json
    assert grouped["base"] == alone["base"]
    assert grouped["base_high"] != alone["base_high"]


# ---------------------------------------------------------------------- bench


def test_bench_gives_rates_and_latencies(memory: Path) -> None:
    done("tune", memory, "--data", "held.npz")
    found = done("bench", memory, "--queries", 20, "--batch", 8, "--json").json
    assert [(row["work"], row["batch"]) for row in found["speed"]] == [
        ("search", 1), ("search", 8), ("predict", 1), ("predict", 8)
    ]  # fmt: skip
    assert all(0 < row["p50_ms"] <= row["p99_ms"] and row["queries_per_second"] > 0 for row in found["speed"])
    assert "queries/s" in done("bench", memory, "--queries", 5, "--batch", 2).out


@pytest.mark.parametrize("groups", [None, np.arange(400) // 4, np.array([f"doc {n // 4}" for n in range(400)])])
def test_a_timed_query_does_not_find_itself(here: Path, groups: np.ndarray | None) -> None:
    from residual_memory.cli.measuring import _drawn

    data = columns(400)
    if groups is not None:
        data["groups"] = groups
    as_npz(here / "a.npz", data)
    done("build", "mem", "--data", "a.npz")
    memory = rm.Memory.open("mem")
    keys, own = _drawn(memory, 500)
    assert len(keys) == 500
    assert (rm.ResidualKNN(memory, n_neighbors=1).neighbors(keys, own).distances > 0).all()


def test_bench_needs_two_rows(here: Path) -> None:
    as_npz(here / "one.npz", regression(1))
    done("build", "mem", "--data", "one.npz")
    assert resmem("bench", "mem").code == 2
