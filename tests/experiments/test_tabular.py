"""The recipe of tables: the tables are what they say, peers stand beside ours, and the quick slice runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import tabular
from experiments.results_file import RESULTS
from experiments.tabular import TABLES, Trial, bases, where_tables_lie
from residual_memory.errors import DataNotFound

pytestmark = pytest.mark.usefixtures("unchecked")
needs_tables = pytest.mark.skipif(
    not (where_tables_lie() / "diamonds.csv").exists(), reason="the tables are not on this machine: run `make data`"
)


def test_the_quick_slice_runs_and_leaves_the_results_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in RESULTS.glob("tabular*")}
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    tabular.run(quick=True, fresh=True)
    assert {path: path.read_bytes() for path in RESULTS.glob("tabular*")} == before
    rows = json.loads((tmp_path / "tabular.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"resmem", "resmem-paper", "cubist"}
    for row in rows:
        assert row["gain_low"] <= row["gain"] <= row["gain_high"]
        assert row["n_test"] == 100


def test_every_row_is_tested_once_by_a_model_that_did_not_see_it() -> None:
    table = TABLES["diabetes"]().some(60)
    splits = list(tabular._splits(table))
    np.testing.assert_array_equal(np.sort(np.concatenate([test for _, test in splits])), np.arange(60))
    assert all(not np.intersect1d(train, test).size for train, test in splits)
    row = Trial(table, splits).peer("mean", lambda table, train, test: (table.y[train].mean(), table.y[test]))
    assert row["corrected"] == 0
    assert row["gain"] == pytest.approx(row["base"])


def test_a_table_that_is_not_there_is_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESMEM_DATA", str(tmp_path))
    with pytest.raises(DataNotFound, match=r"diamonds\.csv is not there; run `make data`"):
        TABLES["diamonds"]()


@needs_tables
@pytest.mark.parametrize(
    ("name", "shape", "mean"),
    [("california", (20_640, 9), 2.0686), ("bike", (17_379, 12), 189.46), ("diamonds", (20_000, 9), 7.78)],
)
def test_the_tables_have_the_rows_and_targets_that_are_known_of_them(
    name: str, shape: tuple[int, int], mean: float
) -> None:
    table = TABLES[name]()
    assert table.X.shape == shape
    assert table.y.mean() == pytest.approx(mean, rel=2e-3)
    assert set(bases(table)) == {"linear", "mlp", "forest", "boosting"}
