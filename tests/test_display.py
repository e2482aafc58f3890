"""What notebooks show: small tables, escaped, without scripts, and without reading rows."""

from html.parser import HTMLParser

import numpy as np
import pytest

import residual_memory as rm
from residual_memory.display import html_table
from residual_memory.language import LanguageTuning, TokenScores
from residual_memory.memory.snapshot import Column, Snapshot
from residual_memory.metrics import Estimate
from residual_memory.models.base import KeyChoice
from tests.problems import in_plain_python

HOSTILE = ("<script>alert(1)</script>", "red \x1b[31m", "\u202egnp.exe", "a" * 4096, '"><img src=x onerror=alert(1)>')
RANDOM = np.random.default_rng(0)
KEYS = RANDOM.normal(size=(60, 4))
LABELS = RANDOM.integers(0, len(HOSTILE), 60)
SAID = RANDOM.dirichlet(np.ones(len(HOSTILE)), 60)


class Cells(HTMLParser):
    """The tags of a page, and the text of its cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


def seen(value: object) -> Cells:
    """What a notebook shows of a value, which is a table and nothing that runs."""
    page = value._repr_html_()  # type: ignore[attr-defined]
    cells = Cells(page)
    assert set(cells.tags) <= {"div", "table", "thead", "tbody", "tr", "th", "td"}
    assert not any(character in page for character in "\x1b\u202e")
    assert len(page) < 20_000
    return cells


@pytest.fixture
def memory() -> rm.Memory:
    memory = rm.Memory.create(dim=4, n_outputs=len(HOSTILE), class_names=HOSTILE)
    memory.append(KEYS, LABELS, SAID)
    return memory


def test_what_is_in_a_cell_is_text() -> None:
    page = html_table(HOSTILE[0], [(name, name) for name in HOSTILE], HOSTILE[:2])
    assert "<script" not in page
    assert "<img" not in page
    cells = Cells(page).cells
    assert cells[2] == HOSTILE[0]
    assert cells[4] == "red \\x1b[31m"
    assert len(cells[8]) == 80


def test_a_memory_is_told_from_its_manifest_alone(memory: rm.Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.forget([3])

    def unread(*_: object) -> None:
        raise AssertionError("a row was read")

    for kind in (Column, Snapshot):
        for name in ("take", "whole", "blocks", "gathered", "ids", "all_ids", "alive", "predictions", "targets"):
            monkeypatch.setattr(kind, name, property(unread), raising=False)
    cells = seen(memory).cells
    assert cells[cells.index("rows") + 1] == "59, 1 forgotten ones not yet erased"
    assert cells[cells.index("setting") + 1] == "none saved: tune chooses one"
    assert cells[cells.index("classes") + 1].startswith("<script>alert(1)</script>, red \\x1b[31m")


def test_an_evaluation_and_a_tuning_show_the_figures_and_the_verdict(memory: rm.Memory) -> None:
    setting = rm.Setting(n_neighbors=5, bandwidth=1.0)
    for found in (
        rm.evaluate(memory, KEYS, LABELS, SAID, setting),
        rm.tune(memory, KEYS, LABELS, SAID, n_neighbors=(5,), metric="log_loss"),
    ):
        assert found.verdict in found._repr_html_().replace("&#x27;", "'")
        assert seen(found).cells == [cell for row in found.table for cell in row]
    cells = seen(setting).cells
    assert (cells[cells.index("n_neighbors") + 1], cells[cells.index("gate") + 1]) == ("5", "none")


def test_an_explanation_shows_the_nearest_of_the_first_queries_and_shares_of_one_whole(memory: rm.Memory) -> None:
    knn = rm.ResidualKNN(memory, n_neighbors=12, bandwidth=1.0)
    found = rm.explain(knn, KEYS, SAID)
    np.testing.assert_allclose(found.shares.sum(axis=1), 1)
    cells = seen(found)
    assert cells.tags.count("table") == 3
    assert cells.cells[4] == str(found.ids[0, 0])
    assert cells.cells.count("id") == 3
    assert len(cells.cells) == 3 * 4 * (1 + 10)
    assert seen(rm.explain(knn, KEYS[:0], SAID[:0])).tags.count("table") == 1


def test_the_figures_of_language_models_are_shown() -> None:
    loss, better = Estimate(5.0, 4.9, 5.1), Estimate(4.5, 4.4, 4.6)
    setting = rm.LanguageSetting()
    tuned = LanguageTuning(setting, loss, better, Estimate(0.5, 0.4, 0.6), setting, setting)
    assert seen(tuned).cells[3:6] == ["base", "148.4", "134.3 to 164"]
    assert "n_neighbors" in seen(setting).cells
    hit = np.array([True, False, True, True])
    scores = TokenScores(
        *(np.arange(4), np.array([0, 0, 1, 1]), np.arange(4)), *(np.full(4, 2.0), np.full(4, 1.5)), *(hit,) * 4
    )
    assert seen(scores).cells[4:8] == ["base", "75.0 %", *scores.table[1][2:]]


def test_audit_plan_survey_and_choice_of_keys_are_shown(memory: rm.Memory) -> None:
    setting = rm.Setting(n_neighbors=5, bandwidth=1.0)
    report = rm.audit_privacy(memory, KEYS + 1, LABELS, SAID, setting, max_weights=(1.0, 0.2))
    assert seen(report).cells[5:10] == list(report.table[1])
    plan = rm.estimate(1_000_000, 64, 10, probe=False)
    assert [cell.strip() for cell in seen(plan).cells] == [part.strip() for fact in plan.facts for part in fact]
    survey = rm.survey(rm.ResidualKNN(memory, n_neighbors=5, bandwidth=1.0), setting)
    assert seen(survey).cells[2:4] == ["put right", f"{survey.put_right.sum()}"]
    pytest.importorskip("torch")
    tuned = rm.tune(memory, KEYS, LABELS, SAID, n_neighbors=(5,))
    chosen = rm.ChosenKeys(KeyChoice(HOSTILE[0]), {HOSTILE[0]: tuned})
    assert seen(chosen).cells[5] == HOSTILE[0]


def test_tables_need_no_package_beyond_python() -> None:
    code = "import sys\nimport residual_memory.display\nprint(*{'numpy', 'jinja2', 'matplotlib'} & set(sys.modules))"
    assert in_plain_python(code) == "\n"
