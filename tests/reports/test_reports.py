"""Reports say what was measured, hold all that they show, and do nothing."""

import base64
import errno
import io
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import residual_memory as rm
from residual_memory.errors import StorageFailure
from residual_memory.language import LanguageTuning, TokenScores
from residual_memory.metrics import Estimate
from residual_memory.reports.language import language_tuning_report, token_report
from residual_memory.reports.measured import tuning_report
from residual_memory.reports.page import Comparison, Report
from tests.reports.pages import Page, read

HOSTILE = (
    "<script>alert(1)</script>",
    "red \x1b[31m $\\frac{1}{",
    "\u202egnp.exe שלום",
    "a" * 4096,
    '"><img src=x onerror=alert(1)>',
    ' id="axes_1" #000000 </svg><b>',
)
RANDOM = np.random.default_rng(0)
SETTING = rm.Setting(n_neighbors=8, bandwidth=0.5)


def problem(n: int, names: tuple[str, ...], seed: int) -> dict[str, Any]:
    """Keys that tell the class, and a base that does not know it well."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, len(names), n)
    keys = np.eye(len(names))[labels] + 0.3 * random.normal(size=(n, len(names)))
    said = random.dirichlet(np.ones(len(names)), n)
    return {"keys": keys, "labels": labels, "predictions": said}


def memory_of(names: tuple[str, ...] = HOSTILE) -> rm.Memory:
    memory = rm.Memory.create(dim=len(names), n_outputs=len(names), class_names=names)
    memory.append(**problem(300, names, 1))
    return memory


def without_charts(report: Report) -> Page:
    """The page of a report, which takes seconds with its charts."""
    return read(replace(report, charts=()).html())


class Images:
    """A data set of (image, label) whose images tell their place."""

    def __len__(self) -> int:
        return 300

    def __getitem__(self, place: int) -> tuple[np.ndarray, int]:
        return np.full((3, 64, 64), place / 300, np.float32), 0


@pytest.fixture(scope="module")
def held_out() -> dict[str, Any]:
    return problem(200, HOSTILE, 2)


@pytest.fixture(scope="module")
def report(held_out: dict[str, Any]) -> Report:
    return rm.make_report(
        memory_of(), **held_out, setting=SETTING, facts=[(name, name) for name in HOSTILE], title=HOSTILE[0]
    )


@pytest.fixture(scope="module")
def page(report: Report) -> Page:
    return read(report.html())


def test_the_figures_are_those_of_the_evaluation(report: Report, page: Page, held_out: dict[str, Any]) -> None:
    found = rm.evaluate(memory_of(), **held_out, setting=SETTING)
    assert report.comparisons == (Comparison.of(found),)
    assert found.verdict in page.text
    for name, part in (("base", found.base), ("memory only", found.memory_only), ("corrected", found.corrected)):
        assert f"{name} {100 * part.value:.2f} ± {100 * part.margin:.2f}" in page.text
    assert f"gain {100 * found.gain.value:+.2f} ± {100 * found.gain.margin:.2f} points" in page.text


def test_rows_put_right_and_wrong_are_counted_and_are_what_they_are_said_to_be(
    report: Report, page: Page, held_out: dict[str, Any]
) -> None:
    memory, labels, base = memory_of(), held_out["labels"], held_out["predictions"].argmax(1)
    knn = SETTING.knn(memory)
    after = (held_out["predictions"] + knn(held_out["keys"])).argmax(1)
    right, wrong = (base != labels) & (after == labels), (base == labels) & (after != labels)
    galleries = {gallery.title: gallery for gallery in report.galleries}
    assert f"{right.sum()} of 200 rows" in page.text
    assert f"{wrong.sum()} of 200 rows" in page.text
    assert len(galleries["Put right"].cases) == 12
    for title, rows in (("Put right", right), ("Put wrong", wrong)):
        for case in galleries[title].cases:
            row = int(case.query.name)
            assert rows[row]
            assert case.after == HOSTILE[after[row]].replace("_", " ")
            found = knn.neighbors(held_out["keys"][row : row + 1])
            heaviest = np.argsort(-found.weights[0], kind="stable")[:5]
            assert [near.example.name for near in case.near] == [str(name) for name in found.ids[0, heaviest]]
            assert [near.weight for near in case.near] == pytest.approx(found.weights[0, heaviest].tolist())


def test_what_data_are_named_is_text(report: Report, page: Page) -> None:
    html = report.html()
    assert not any(character in html for character in "\x1b\u202e")
    assert "<script>alert(1)</script>" in page.text
    assert "red \\x1b[31m $\\frac{1}{" in page.text
    assert "שלום" in page.text
    assert '"><img src=x onerror=alert(1)>' in page.text
    assert "a" * 2000 not in html
    assert len(re.findall("a{49,}", html)) == 1, "but for the value of a fact, what is long is cut"
    assert page.tags.count("b") == sum(len(gallery.cases) for gallery in report.galleries) + 3  # and three markers
    assert "img" not in page.tags
    assert page.tags.count("svg") == 5
    assert any('id="axes 1" #000000 </svg><b>' in line for line in page.lines), "a name in a figure stays as it is"


def test_pictures_are_in_the_file(held_out: dict[str, Any]) -> None:
    from PIL import Image

    report = rm.make_report(memory_of(), **held_out, setting=SETTING, examples=Images(), held_out=Images())
    page = without_charts(report)
    cases = [case for gallery in report.galleries for case in gallery.cases]
    assert len(page.pictures) == sum(1 + len(case.near) for case in cases)
    first = Image.open(io.BytesIO(base64.b64decode(page.pictures[0].partition(",")[2])))
    assert first.getpixel((0, 0)) == (round(255 * int(cases[0].query.name) / 300),) * 3


def test_rows_of_a_table_are_shown_with_their_columns(held_out: dict[str, Any]) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({f"<b>{n}": np.arange(300) for n in range(8)})
    page = without_charts(rm.make_report(memory_of(), **held_out, setting=SETTING, held_out=frame))
    assert any(line.startswith("<b>0 ") and line.endswith("…") and "<b>5 " in line for line in page.lines)


def test_a_regression_shows_values_that_came_nearer() -> None:
    keys = RANDOM.normal(size=(200, 2))
    values = keys.sum(axis=1)
    memory = rm.Memory.create(dim=2, n_outputs=1, task="regression")
    memory.append(keys, values, np.zeros(200))
    asked = keys + 0.01
    report = rm.make_report(memory, asked, values, np.zeros(200), rm.Setting(n_neighbors=3, bandwidth=0.1))
    page = read(report.html())
    assert [chart.title for chart in report.charts] == ["Gain by distance"]
    assert report.galleries[0].title == "Brought nearer"
    case = report.galleries[0].cases[0]
    truth = float(case.query.label)
    assert abs(float(case.after) - truth) < abs(float(case.before) - truth)
    assert "RMSE" in page.text


def test_where_the_memory_is_not_used_no_row_is_shown_as_changed(held_out: dict[str, Any]) -> None:
    report = rm.make_report(memory_of(), **held_out, setting=rm.Setting(shrinkage=0.0))
    assert report.galleries == ()
    assert not report.helps
    assert "share it as you would" not in without_charts(report).text


def test_tunings_and_texts_have_reports_too(held_out: dict[str, Any]) -> None:
    memory = memory_of()
    tuned = rm.tune(memory, **held_out, n_neighbors=(8,))
    page = read(tuning_report(memory, tuned, tuned.best, facts=(("data", "here"),), notes=("cross-fitted",)).html())
    assert tuned.verdict in page.text
    assert tuned.best.text in page.text
    hit = RANDOM.random(40) < 0.5
    scores = TokenScores(
        *(RANDOM.integers(0, 4, 40), np.arange(40) // 10, np.arange(40)),
        *(RANDOM.random(40) + 1, RANDOM.random(40) + 0.5, ~hit, hit, hit, hit),
    )
    page = read(token_report(scores).html())
    assert scores.verdict in page.text
    assert f"tokens put right {(scores.corrected_hit & ~scores.base_hit).sum()}" in page.text
    loss, setting = Estimate(5.0, 4.9, 5.1), rm.LanguageSetting()
    found = LanguageTuning(setting, loss, Estimate(4.5, 4.4, 4.6), Estimate(0.5, 0.4, 0.6), setting, setting)
    assert "gain +0.5 ± 0.1 nats" in read(language_tuning_report(found, (), ()).html()).text


def test_of_one_document_nothing_is_known_and_the_page_stands(held_out: dict[str, Any]) -> None:
    report = rm.make_report(memory_of(), **held_out, setting=SETTING, groups=np.zeros(200, int))
    text = read(report.html()).text  # with its charts, whose intervals are infinite
    assert "± inf" in text
    assert "Rows of one group count as one draw" in text


def test_a_report_is_written_whole_or_not_at_all(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, report = tmp_path / "report.html", replace(report, charts=())
    path.write_text("before")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(StorageFailure, match="No space left"):
            report.write(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "before"
    report.write(path)
    assert path.read_text() == report.html()
    with pytest.raises(StorageFailure, match="nowhere"):
        report.write(tmp_path / "nowhere" / "report.html")
