"""The privacy recipe: its caps are the library's, its quick slice runs, and its committed rows are whole."""

import json

import numpy as np
import pytest
import torch

import residual_memory as rm
from experiments import privacy
from experiments.language.corpus import WINDOW
from experiments.language.model import T5DecoderLM, decoder_config
from experiments.results_file import RESULTS, Row
from residual_memory.demo.cifar100 import find_cifar100
from residual_memory.language import LanguageSetting
from residual_memory.metrics import auc
from residual_memory.privacy import MAX_WEIGHTS, Answers
from tests.experiments.test_language import needs_text

ROOT = RESULTS.parents[1]


def language() -> tuple[T5DecoderLM, rm.Memory, list[dict[str, np.ndarray]]]:
    torch.manual_seed(0)
    network = T5DecoderLM(decoder_config("micro", 40)).eval()
    tokens = np.random.default_rng(0).integers(0, 40, 600)
    memory = rm.build_memory(network, rm.Windows([tokens[:400], tokens[400:]], 32), None, verbose=False)
    return network, memory, list(rm.Windows([tokens[:100], np.flip(tokens[:64])], 32))


def test_a_cap_on_tokens_is_the_one_of_the_model() -> None:
    """Weights are capped after one search here; a model with `max_weight` searches for itself."""
    network, memory, items = language()
    setting = LanguageSetting(16, 2.0, shrinkage=0.6)
    found = privacy.ask(rm.ResMemForCausalLM(network, memory, setting=setting, index="exact"), items, 10_000)
    for place, cap in enumerate(privacy.TEXT_CAPS):
        lm = rm.ResMemForCausalLM(network, memory, setting=setting, index="exact", max_weight=cap)
        scores = lm.score(items)
        np.testing.assert_allclose(found.corrected[place], np.exp(-scores.corrected_loss), rtol=1e-5)
        np.testing.assert_array_equal(found.losses[place], 1.0 - scores.corrected_hit)
        np.testing.assert_allclose(found.base, np.exp(-scores.base_loss), rtol=1e-5)
    assert found.nearest[:99].max() < 0.01  # asked as they were stored, in half precision
    assert np.median(found.nearest[99:]) > 1


def answers(scores: np.ndarray, documents: np.ndarray) -> Answers:
    flat = np.zeros(len(scores))
    calibrated = np.stack([scores[None], scores[None]])
    return Answers(flat, flat[None], calibrated, flat, flat, flat[None], documents)


def test_a_window_is_told_by_the_mean_of_its_tokens() -> None:
    random = np.random.default_rng(0)
    members, others = random.normal(0.1, 1, (20, WINDOW)), random.normal(0, 1, (30, WINDOW))
    documents = np.repeat(np.arange(30), WINDOW)
    found = privacy.by_window(answers(members.ravel(), documents[: 20 * WINDOW]), answers(others.ravel(), documents), 0)
    assert found == auc(members.mean(1), others.mean(1), positive_groups=np.arange(20), negative_groups=np.arange(30))
    assert found.value > auc(members.ravel(), others.ravel()).value


@needs_text
@pytest.mark.skipif(find_cifar100() is None, reason="CIFAR-100 is not on this machine: run `make data`")
def test_the_quick_slice_runs_and_leaves_the_results_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = (RESULTS / "privacy.json").read_bytes()
    privacy.run(quick=True, fresh=False)
    out = capsys.readouterr().out
    assert "cifar100 plain, test images: base" in out
    assert "c4 micro, test text: base" in out
    assert (RESULTS / "privacy.json").read_bytes() == before


def committed() -> list[Row]:
    rows: list[Row] = json.loads((RESULTS / "privacy.json").read_text())["rows"]
    return rows


def test_the_committed_curves_are_whole() -> None:
    curves = privacy.curves(committed())
    assert len(curves) >= 3
    for curve in curves.values():
        wanted = privacy.TEXT_CAPS if "auc_window" in curve[0] else MAX_WEIGHTS
        assert [row["max_weight"] for row in curve] == list(wanted)


def test_the_committed_results_say_that_a_memory_tells_and_a_cap_hides_at_a_cost() -> None:
    for curve in privacy.curves(committed()).values():
        loose, tight = curve[0], curve[-1]
        assert loose["auc_calibrated"] > loose["auc_base"]
        assert abs(tight["auc_calibrated"] - 0.5) < abs(loose["auc_calibrated"] - 0.5)
        assert tight["gain"] <= loose["gain"]
        assert loose["auc_nearest"] > 0.99


def test_the_page_shows_the_committed_figures() -> None:
    page, rows = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8"), committed()
    names = [name for name in privacy.curves(rows) if not name.endswith(privacy.HELD_OUT)]
    assert privacy.page_table(rows, names) in page
    held = {name: curve for name, curve in privacy.curves(rows).items() if name.endswith(privacy.HELD_OUT)}
    choice = page.partition("## Which cap")[2].partition("## What it is not")[0]
    for curve in held.values():
        loose, chosen = curve[0], next(row for row in curve if row["max_weight"] == 0.1)
        tighter = next(row for row in curve if row["max_weight"] == 0.05)
        assert chosen["gain"] >= 0.75 * loose["gain"]
        assert f"{100 * chosen['gain']:+.2f} of {100 * loose['gain']:+.2f}" in " ".join(choice.split())
        assert all(f"{row['auc_calibrated']:.3f}" in choice for row in (loose, chosen))
        assert tighter["gain"] < chosen["gain"]
    assert any(curve[4]["gain"] < 0.75 * curve[0]["gain"] for curve in held.values())  # at 0.05


def test_the_figure_has_a_column_a_memory_and_shows_test_rows_alone() -> None:
    pytest.importorskip("matplotlib")
    rows = committed()
    drawn = privacy.figure(rows)
    shown = [name for name in privacy.curves(rows) if not name.endswith(privacy.HELD_OUT)]
    titles = [axes.get_title() for axes in drawn.axes if axes.get_title()]
    assert len(titles) == len(shown)
    assert all(title.startswith(name) for title, name in zip(titles, shown, strict=True))
    curve = privacy.curves(rows)[shown[0]]
    drawn_areas = np.asarray(drawn.axes[0].lines[0].get_ydata(), float)
    np.testing.assert_allclose(drawn_areas, [row["auc_calibrated"] for row in curve])
