"""`--out`: a report of the figures that are printed, and errors before the work."""

import os
from pathlib import Path

import pytest

from tests.cli.workshop import as_npz, done, regression, resmem
from tests.reports.pages import read


def test_the_report_has_the_figures_the_setting_and_the_command(memory: Path) -> None:
    done("tune", memory, "--data", "held.npz")
    ran = done("evaluate", memory, "--data", "held.npz", "--out", "a b.html", "--json")
    assert ran.json["report"] == "a b.html"
    page = read(Path("a b.html").read_text())
    found = ran.json
    assert f"base {100 * found['base']:.2f} ±" in page.text
    assert f"corrected {100 * found['corrected']:.2f} ±" in page.text
    assert f"gain {100 * found['gain']:+.2f} ±" in page.text
    assert found["verdict"] in page.text
    assert f"resmem evaluate {memory} --data held.npz --out 'a b.html' --json" in page.text
    assert f"k {found['setting']['n_neighbors']}, bandwidth" in page.text
    assert "report: again.html" in done("evaluate", memory, "--data", "held.npz", "--out", "again.html").out


def test_tune_writes_its_figures(memory: Path) -> None:
    Path("tuned.html").write_text("an older one")
    found = done("tune", memory, "--data", "held.npz", "--out", "tuned.html", "--json").json
    page = read(Path("tuned.html").read_text())
    assert found["verdict"] in page.text
    assert "The figures are cross-fitted" in page.text


def test_values_have_a_report(here: Path) -> None:
    as_npz(here / "a.npz", regression(200))
    as_npz(here / "b.npz", regression(100, 2))
    done("build", "mem", "--data", "a.npz", "--task", "regression")
    assert resmem("evaluate", "mem", "--data", "b.npz", "--out", "r.html").code in (0, 1)
    assert "RMSE" in read(Path("r.html").read_text()).text


def test_pictures_come_from_the_data_and_the_examples(net: Path) -> None:
    pytest.importorskip("torch")
    done("build", "mem", "--data", "net:train", "--model", "net:model")
    words = ("evaluate", "mem", "--data", "net:held_out", "--model", "net:model", "--n-neighbors", 5)
    resmem(*words, "--out", "r.html", "--examples", "net:train")
    page = read(Path("r.html").read_text())
    changed = page.text.count(" row ")
    assert changed
    assert len(page.pictures) > changed
    resmem(*words, "--out", "without.html")
    assert 0 < len(read(Path("without.html").read_text()).pictures) < len(page.pictures)


def test_rows_that_the_memory_holds_are_pointed_out_in_the_report(memory: Path) -> None:
    done("evaluate", memory, "--data", "train.npz", "--out", "r.html")
    assert "Warning: 100 % of train.npz are rows that the memory holds" in read(Path("r.html").read_text()).text


@pytest.mark.parametrize("command", ["demo", "tune", "evaluate"])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(memory: Path, command: str) -> None:
    words = () if command == "demo" else (memory, "--data", "no-such-data.npz")  # which would be found out first
    for out, said, code in (
        ("nowhere/r.html", "there is no folder nowhere", 2),
        (".", "which is a folder", 2),
        ("/proc/r.html", "/proc takes no file", 1),
    ):
        if out.startswith("/proc") and not Path("/proc/self").exists():
            continue
        ran = resmem(command, *words, "--out", out)
        assert ran.code == code
        assert said in ran.err
        assert "remedy: " in ran.err
    assert not any(name.endswith(".html") for name in os.listdir())


def test_examples_are_for_the_report_and_must_be_examples(memory: Path) -> None:
    ran = resmem("evaluate", memory, "--data", "held.npz", "--examples", "net:train")
    assert (ran.code, "add --out" in ran.err) == (2, True)
    ran = resmem("evaluate", memory, "--data", "held.npz", "--examples", "train.npz", "--out", "r.html")
    assert (ran.code, "holds keys and no examples" in ran.err) == (2, True)


def test_hostile_class_names_are_text_in_the_report(here: Path) -> None:
    names = ["<script>alert(1)</script>", "red \x1b[31m", "\u202egnp", "d"]
    Path("names.txt").write_text("\n".join(names))
    done("build", "mem", "--data", "train.npz", "--class-names", "names.txt")
    done("evaluate", "mem", "--data", "held.npz", "--n-neighbors", 5, "--out", "r.html")
    text = Path("r.html").read_text()
    assert "<script>alert(1)</script>" in read(text).text
    assert not any(character in text for character in "\x1b\u202e")
