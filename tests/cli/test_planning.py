"""`resmem estimate`: sizes as they then are on disk, and a refusal of what does not fit."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import residual_memory as rm
from residual_memory.cli.planning import size_of
from residual_memory.display import size_text
from residual_memory.errors import InvalidInput
from residual_memory.types import Task
from tests.cli.workshop import done, resmem
from tests.problems import classification

ROOM = ("--disk", "100TB", "--ram", "10TB", "--no-probe")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_an_estimate_is_near_the_files(tmp_path: Path, dtype: str, task: Task) -> None:
    n, d, c = 3000, 24, 6
    problem = classification(n, 1, d, c)
    labels = problem.labels if task == "classification" else problem.predictions
    memory = rm.Memory.create(
        tmp_path / "mem",
        dim=d,
        n_outputs=c,
        task=task,
        key_dtype=dtype,
        prediction_dtype=dtype,
    )
    memory.append(problem.keys, labels, problem.predictions)
    types = ("--key-dtype", dtype, "--prediction-dtype", dtype, "--task", task, "--no-probe")
    found = done("estimate", "--rows", n, "--dim", d, "--outputs", c, *types, "--json").json
    assert found["disk_bytes"] == pytest.approx(
        sum(file.stat().st_size for file in (tmp_path / "mem").iterdir()), rel=0.1
    )


@pytest.mark.parametrize("dtype", ["float16", "log8", "log16"])
@pytest.mark.parametrize("c", [500, 70_000])
def test_an_estimate_of_top_m_rows_is_near_the_files(tmp_path: Path, dtype: str, c: int) -> None:
    n, d, m = 3000, 16, 4
    problem = classification(n, 1, d, 6)
    options: dict[str, Any] = {"key_dtype": "float16", "prediction_dtype": dtype, "residuals": "top-m"}
    memory = rm.Memory.create(tmp_path / "mem", dim=d, n_outputs=c, **options)
    memory.append(problem.keys, problem.labels, rm.top_m(problem.predictions, m))
    words = (
        "--rows",
        n,
        "--dim",
        d,
        "--outputs",
        c,
        "--key-dtype",
        "float16",
        "--prediction-dtype",
        dtype,
        "--no-probe",
    )
    found = done("estimate", *words, "--top-m", m, "--json").json
    assert found["disk_bytes"] == pytest.approx(
        sum(file.stat().st_size for file in (tmp_path / "mem").iterdir()), rel=0.05
    )
    assert (found["top_m"], found["layout"]["residuals"]) == (m, "top-m")


def test_a_token_of_a_large_vocabulary_takes_a_few_bytes_beside_its_key() -> None:
    words = ("--rows", 10**8, "--dim", 64, "--outputs", 32_000, "--key-dtype", "float16", *ROOM)
    for m, name, n_bytes in ((4, "log8", 13), (8, "log8", 25), (16, "log8", 49), (8, "log16", 34)):
        found = done("estimate", *words, "--top-m", m, "--prediction-dtype", name, "--json").json
        assert found["bytes_per_row"] == 8 + 2 * 64 + 2 + n_bytes


def test_an_estimate_knows_scann_and_refuses_its_mistyped_options() -> None:
    pytest.importorskip("scann", reason="needs scann")
    words = ("estimate", "--rows", 10_000, "--dim", 64, "--outputs", 10, "--no-probe", "--index")
    assert done(*words, "scann:num_leaves=100", "--json").json["index_bytes"] == 10_000 * 36 + 4 * 100 * 64
    assert resmem(*words, "scann?num_leaves=100").code == 2
    assert resmem(*words, "scann:leaves=100").code == 2


def test_an_estimate_knows_what_auto_comes_to() -> None:
    small = done("estimate", "--rows", 10_000, "--dim", 64, "--outputs", 10, *ROOM, "--json").json
    assert (small["index"], small["index_bytes"], small["residual_table_bytes"]) == ("exact", 2_560_000, 400_000)
    large = done("estimate", "--rows", 50_000_000, "--dim", 64, "--outputs", 1000, *ROOM, "--json").json
    assert large["index"].startswith("faiss:PCAR64,IVF")
    assert large["residual_table_bytes"] == 0
    assert "213.4 GB" in done("estimate", "--rows", 50_000_000, "--dim", 64, "--outputs", 1000, *ROOM).out
    words = ("--rows", 100, "--dim", 8, "--outputs", 2, "--index", "faiss:IVF64,Flat", *ROOM)
    assert done("estimate", *words, "--json").json["index"].startswith("exact")


def test_the_time_of_each_part_is_told_and_the_models_only_if_it_is_given(here: Path) -> None:
    before = {path.name for path in here.iterdir()}
    words = ("estimate", "--rows", 30_000, "--dim", 16, "--outputs", 3, "--index", "faiss:IVF64,PQ8x4fs")
    told = done(*words)
    assert "besides running the model" in told.out
    for part in ("to write", "to train", "to fill", "to measure its recall"):
        assert part in told.out
    with_model = done(*words, "--seconds-per-row", "0.02")
    assert "  model      10 min" in with_model.out
    assert "besides running the model" not in with_model.out
    found = done(*words, "--json").json["seconds"]
    assert found["total"] == pytest.approx(sum(value for name, value in found.items() if name != "total"))
    assert done(*words, "--no-probe", "--json").json["seconds"] is None
    assert {path.name for path in here.iterdir()} == before


WIDE = ("--rows", 1_600_000_000, "--dim", 512, "--outputs", 32_000, "--key-dtype", "float16", "--top-m", 8)


def test_a_plan_that_does_not_fit_ends_with_1_and_a_line_that_ends_with_0() -> None:
    words = ("estimate", *WIDE, "--prediction-dtype", "log8", "--disk", "2.5TB", "--ram", "256GB")
    refused = resmem(*words)
    assert refused.code == 1
    assert "does not fit: " in refused.out
    assert "of RAM to build missing" in refused.out
    line = next(line for line in refused.out.splitlines() if line.startswith("resmem estimate "))
    assert done(*shlex.split(line)[1:], "--json").json["fits"]
    nearest = resmem(*words, "--json").json["nearest"]
    assert nearest["command"] == line
    assert nearest["shortages"] == []
    assert nearest["layout"] == resmem(*words, "--json").json["layout"]  # disk is not short, so rows stay as they are


def test_where_nothing_fits_it_says_what_would_be_needed_and_how_many_rows_would_fit() -> None:
    refused = resmem("estimate", *WIDE, "--prediction-dtype", "log8", "--disk", "1TB", "--ram", "1TB")
    assert refused.code == 1
    assert "no plan of 1,600,000,000 rows fits here; the smallest needs 1.7 TB of disk" in " ".join(refused.out.split())
    assert "rows would fit" in refused.out
    assert resmem("estimate", *WIDE, "--disk", "1TB", "--ram", "1TB", "--json").json["nearest"] is None


def test_the_disk_is_that_of_the_path(here: Path) -> None:
    found = done("estimate", "--rows", 10, "--dim", 2, "--outputs", 2, "--path", here / "a" / "mem", "--json").json
    assert found["free_disk_bytes"] > 0
    assert not (here / "a").exists()


def test_a_build_that_the_disk_cannot_hold_is_refused_before_it_writes(here: Path) -> None:
    """The arrays are sparse files: they say that they are larger than any disk, and take no room."""
    (here / "data").mkdir()
    n = 20 * 10**9
    for name, kind, width in (("keys", "<f2", 64), ("labels", "|u1", 0), ("predictions", "<f2", 2)):
        with (here / "data" / f"{name}.npy").open("wb") as file:
            shape = (n, width) if width else (n,)
            np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
            length = file.tell() + n * max(width, 1) * np.dtype(kind).itemsize
            if name == "predictions":
                np.full((1000, 2), 0.5, kind).tofile(file)
            file.truncate(length)
    refused = resmem("build", "mem", "--data", "data")
    assert (refused.code, refused.out) == (1, "")
    assert "the rows need 5,520,000,000,000 bytes" in refused.err
    assert "remedy: make room, name another disk, or see what resmem estimate says" in refused.err
    assert not (here / "mem").exists()


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("123", 123), ("64GB", 64 * 10**9), ("1.5 TB", 15 * 10**11), ("2GiB", 2 << 30), ("3k", 3000), ("4 Mi", 4 << 20)],
)
def test_sizes_are_read_in_decimal_and_binary_units(text: str, n_bytes: int) -> None:
    assert size_of("--ram", text) == n_bytes


@pytest.mark.parametrize("text", ["", "GB", "12XB", "-3GB", "1e9", "0", "0.2", "3 iB", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="--disk"):
        size_of("--disk", text)


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (1.25e9, "1.2 GB"), (3e15, "3000.0 TB")]
)
def test_sizes_are_in_decimal_units(n_bytes: float, text: str) -> None:
    assert size_text(n_bytes) == text
