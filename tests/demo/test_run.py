"""The demo as a user runs it: from the shipped keys, and (where the images are) from a slice of the images."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from residual_memory.demo import run
from residual_memory.demo.assets import N_TRAIN, SHIPPED_KEYS, ShippedKeys, shipped_keys, shipped_settings, write_keys
from residual_memory.demo.cifar100 import Cifar100, Split, find_cifar100, held_out_split, read_cifar100
from residual_memory.demo.run import DemoResult, run_demo
from tests.reports.pages import read

needs_images = pytest.mark.skipif(find_cifar100() is None, reason="CIFAR-100 is not on this machine: run `make data`")


@pytest.fixture(scope="module")
def from_keys(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run_demo(out=tmp_path_factory.mktemp("demo") / "report.html", quick=True, progress=False, say=lambda _: None)


def test_the_shipped_keys_give_the_papers_gain(from_keys: DemoResult) -> None:
    (row,) = from_keys.rows
    assert row.evaluation.base.value >= 0.5646
    assert row.evaluation.gain.value >= 0.032
    assert row.evaluation.memory_only.value < row.evaluation.corrected.value
    assert from_keys.helps


def test_the_shipped_keys_are_under_5_MB_and_hold_every_image() -> None:
    shipped = shipped_keys()
    assert shipped.keys.shape == (60_000, 64)
    assert np.bincount(shipped.labels[:N_TRAIN]).tolist() == [500] * 100
    assert SHIPPED_KEYS.stat().st_size < 5e6


def test_eight_bits_keep_a_key_within_one_step(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    keys = random.random((20, 64)).astype(np.float32) * np.arange(1, 65, dtype=np.float32)
    whole = ShippedKeys(keys, np.arange(20), np.zeros((100, 64), np.float32), np.zeros(100, np.float32), ("a",) * 100)
    write_keys(tmp_path / "keys.npz", whole)
    assert (np.abs(shipped_keys(tmp_path / "keys.npz").keys - keys) <= keys.max(0) / 255 / 2 * 1.001).all()


def test_the_text_fits_a_terminal_and_says_what_was_found(from_keys: DemoResult) -> None:
    lines = from_keys.text.splitlines()
    assert max(map(len, lines)) <= 80
    assert re.search(r"plain: gain \+4\.\d ± 0\.\d points on 10,000 held-out rows", from_keys.text)


def test_the_json_has_the_fields_of_a_result_file(from_keys: DemoResult) -> None:
    (row,) = from_keys.to_dict()["rows"]
    assert {"setting", "method", "metric", "base", "memory_only", "corrected", "gain", "gain_low", "n_test"} <= set(row)


def test_the_report_is_one_file_without_outside_requests(from_keys: DemoResult) -> None:
    assert from_keys.report is not None
    page = read(from_keys.report.read_text())
    assert "Gain by class" in page.text
    (row,) = from_keys.rows
    assert row.evaluation.verdict in page.text
    assert f"corrected {100 * row.evaluation.corrected.value:.2f} ±" in page.text


def test_the_held_out_images_are_a_fixed_tenth() -> None:
    fitted, held_out = held_out_split()
    assert (len(fitted), len(held_out)) == (45_000, 5_000)
    assert not set(fitted) & set(held_out)
    assert held_out[:3].tolist() == held_out_split()[1][:3].tolist()


def test_every_key_choice_has_a_shipped_setting() -> None:
    assert {run.PLAIN.name, run.FINE.name} <= set(shipped_settings())


@needs_images
def test_the_demo_runs_on_images_and_shows_roses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = find_cifar100()
    assert folder is not None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(run, "find_cifar100", lambda: folder)
    monkeypatch.setattr(run, "read_cifar100", first_images(15_000, 1_000))
    result = run_demo(out=tmp_path / "report.html", progress=False, say=lambda _: None)
    assert [row.name for row in result.rows] == ["plain", "tuned 4x4"]
    assert result.roses
    test = read_cifar100(folder, "test")
    superclasses = dict(zip(test.labels.tolist(), test.superclasses.tolist(), strict=True))
    assert result.lost
    assert all(superclasses[rose.label] == superclasses[rose.said] for rose in (*result.roses, *result.lost))
    said = result.rows[-1].said
    for rose in result.roses:
        assert (said.base[rose.row].argmax(), said.corrected[rose.row].argmax()) == (rose.said, rose.label)
    for rose in result.lost:
        assert (said.base[rose.row].argmax(), said.corrected[rose.row].argmax()) == (rose.label, rose.said)
    page = read((tmp_path / "report.html").read_text())
    assert len(page.pictures) == sum(1 + len(rose.ids) for rose in (*result.roses, *result.lost))
    assert all(row.memory is not None and (row.memory / "manifest.json").exists() for row in result.rows)


def first_images(n_train: int, n_test: int) -> Callable[[Path, Split], Cifar100]:
    sizes = {"train": n_train, "test": n_test}
    return lambda folder, split: read_cifar100(folder, split).first(sizes[split])
