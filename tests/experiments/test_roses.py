"""Where the gain comes from: the split adds up, thirds cover the classes, and the page says what the rows say."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.cifar100 import roses as recipe
from experiments.cifar100.roses import (
    AGAINST,
    INSIDE,
    LONG_NAMES,
    NAME,
    NAMES,
    PROPORTION_NAMES,
    SECOND,
    THIRDS,
    Answers,
    compared,
    in_proportion,
    long_tail_sentence,
    parts_named,
    split_of_gain,
    superclass_figure,
    superclasses_compared,
    tables,
    thirds,
    thirds_compared,
    where_figure,
)
from experiments.results_file import RESULTS, Row
from residual_memory.demo.cifar100 import find_cifar100

SUPERCLASS_OF = np.array([0, 0, 1, 1])
PICTURES = sorted(recipe.PICTURES.glob("roses-*.png"))


def answers(labels: list[int], base: list[int], corrected: list[int]) -> Answers:
    said = [np.array(some) for some in (labels, base, corrected)]
    return Answers(said[0], said[1], said[2], said[2], said[1], SUPERCLASS_OF)


def random_answers(n: int = 400, n_classes: int = 20) -> Answers:
    random = np.random.default_rng(0)
    labels = random.integers(0, n_classes, n)
    base, corrected, runner_up = (
        np.where(random.random(n) < part, labels, random.integers(0, n_classes, n)) for part in (0.5, 0.65, 0.3)
    )
    return Answers(labels, base, corrected, corrected, runner_up, np.arange(n_classes) // 5)


def committed() -> list[Row]:
    return json.loads((RESULTS / f"{NAME}.json").read_text())["rows"]


def test_the_parts_inside_and_across_add_up_to_the_gain() -> None:
    known = random_answers()
    row, whole = split_of_gain(known), compared(known, np.ones(400, bool), {})
    assert row["gain_inside"] + row["gain_across"] == pytest.approx(whole["gain"])
    for name in ("inside", "across"):
        assert 400 * row[f"gain_{name}"] == pytest.approx(row[f"put_right_{name}"] - row[f"made_wrong_{name}"])
    assert row["errors_inside"] + row["errors_across"] == np.sum(known.base != known.labels)
    assert row["share_inside"] == pytest.approx(row["gain_inside"] / whole["gain"])
    assert row["share_inside_low"] <= row["share_inside"] <= row["share_inside_high"]


def test_a_memory_that_only_mends_errors_inside_superclasses_has_a_share_of_one() -> None:
    row = split_of_gain(answers([0, 1, 2, 3] * 20, [1, 0, 0, 1] * 20, [0, 1, 0, 1] * 20))
    assert (row["share_inside"], row["gain_across"], row["share_of_errors_inside"]) == (1, 0, 0.5)
    assert (row["errors_put_right_inside"], row["errors_put_right_across"]) == (1, 0)


def test_an_image_made_wrong_counts_where_its_new_answer_lies() -> None:
    row = split_of_gain(answers([0, 0, 0], [1, 0, 0], [0, 1, 2]))
    assert [row[f"{name}_inside"] for name in ("errors", "put_right", "made_wrong")] == [1, 1, 1]
    assert [row[f"{name}_across"] for name in ("errors", "put_right", "made_wrong")] == [0, 0, 1]


def test_by_the_base_answer_alone_every_image_made_wrong_counts_inside() -> None:
    row = split_of_gain(answers([0] * 60, [1, 1, 2, 2, 0, 0] * 10, [0, 0, 0, 0, 0, 2] * 10))
    assert row["share_inside"] == pytest.approx(2 / 3)
    assert row["share_inside_by_base_answer"] == pytest.approx(1 / 3)


def test_a_change_inside_a_superclass_leaves_the_superclass_accuracy_alone() -> None:
    row = superclasses_compared(answers([0, 1, 2, 3], [1, 1, 2, 0], [0, 1, 2, 0]))
    assert (row["base"], row["corrected"], row["gain"]) == (0.75, 0.75, 0)


@pytest.mark.parametrize("n_classes", [3, 7, 100])
def test_thirds_are_disjoint_and_cover_all_classes(n_classes: int) -> None:
    counts = np.random.default_rng(0).integers(1, 500, n_classes)
    parts = thirds(counts)
    assert sorted(np.concatenate(parts)) == list(range(n_classes))
    assert [len(part) for part in parts] == [n_classes // 3, n_classes // 3, n_classes - 2 * (n_classes // 3)]
    assert counts[parts[0]].max() <= counts[parts[1]].min()
    assert counts[parts[1]].max() <= counts[parts[2]].min()


def test_rows_in_proportion_follow_the_counts_and_keep_every_class() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], 40))
    kept = in_proportion(labels, np.array([400, 40, 4]))
    assert np.bincount(labels[kept]).tolist() == [40, 4, 1]


def test_the_ratio_of_two_thirds_is_that_of_their_gains() -> None:
    labels = np.repeat([0, 1, 2], 100)
    base = np.full(300, 3)
    corrected = base.copy()
    corrected[:40], corrected[200:220] = 0, 2  # the first class gains 40 points, the last one 20
    known = Answers(labels, base, corrected, corrected, base, SUPERCLASS_OF)
    row = thirds_compared(known, [np.array([label]) for label in range(3)])
    assert (row["ratio"], row["difference"]) == (pytest.approx(2), pytest.approx(0.2))
    assert row["ratio_low"] < 2 < row["ratio_high"]
    whole = {name: compared(known, labels == label, {}) for name, label in zip(THIRDS, range(3), strict=True)}
    assert "at least twice as much" in long_tail_sentence({**whole, AGAINST: row})


def test_where_nothing_changes_there_is_no_ratio_and_the_sentence_says_so() -> None:
    known = answers([0, 1, 2, 3], [0, 0, 2, 3], [0, 0, 2, 3])
    row = thirds_compared(known, [np.array([0]), np.array([1]), np.array([2, 3])])
    assert "ratio" not in row
    assert "share_inside" not in split_of_gain(known)
    whole = {name: compared(known, np.ones(4, bool), {}) for name in THIRDS}
    assert "not used" in long_tail_sentence({**whole, AGAINST: row})


@pytest.mark.skipif(find_cifar100() is None, reason="CIFAR-100 is not on this machine: run `make data`")
def test_the_quick_slice_runs_and_leaves_the_results_alone(capsys: pytest.CaptureFixture[str]) -> None:
    files = [RESULTS / f"{NAME}.json", *PICTURES]
    before = [file.read_bytes() for file in files]
    recipe.run(quick=True, fresh=False)
    printed = capsys.readouterr().out
    assert "Long tail: the rarest third gains" in printed
    assert [file.read_bytes() for file in files] == before
    index = Path(printed.splitlines()[-1].removeprefix("gallery: "))
    pages = sorted(index.parent.glob("*.html"))
    assert len(pages) == 21
    assert all(page.name in index.read_text() for page in pages if page != index)
    pictures = "".join(page.read_text() for page in pages)
    assert pictures.count("made wrong, ") == 20
    assert pictures.count("test image ") > 10
    assert pictures.count('src="data:image/png;base64,') == pictures.count("<img")


def test_the_tables_fit_a_terminal_of_100_columns() -> None:
    lines = tables(committed()).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("Long tail: ") for line in lines) == 4


def test_the_pictures_show_the_rows_and_are_small() -> None:
    rows = committed()
    assert len(superclass_figure(rows).axes[0].get_yticks()) == 20
    assert [len(axes.get_xticks()) for axes in where_figure(rows).axes] == [5, 10, 10]
    assert len(PICTURES) == 3
    assert all(file.stat().st_size < 200_000 for file in PICTURES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("start", "count"),
    [("class ", 100), ("superclass ", 20), ("base confidence ", 5), ("distance ", 10), ("k-th distance ", 10)],
)
def test_the_committed_parts_make_up_the_committed_whole(name: str, start: str, count: int) -> None:
    found = parts_named(committed(), name)
    parts = [row for part, row in found.items() if part.startswith(start) and row["metric"] == "accuracy"]
    assert len(parts) == count
    assert sum(row["n_test"] for row in parts) == found[""]["n_test"] == 10_000
    for figure in ("base", "corrected", "gain"):
        mean = sum(row["n_test"] * row[figure] for row in parts) / 10_000
        assert mean == pytest.approx(found[""][figure], abs=2e-4)  # the whole tempers the base: ties may fall otherwise


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_split_adds_up_and_every_figure_has_its_interval(name: str) -> None:
    parts = parts_named(committed(), name)
    split = parts[INSIDE]
    assert split["gain_inside"] + split["gain_across"] == pytest.approx(parts[""]["gain"], abs=2e-4)
    assert parts[SECOND]["n_test"] < split["errors_inside"] + split["errors_across"]
    for row in parts.values():
        assert all(row[f"{figure[:-4]}_high"] >= row[figure] for figure in row if figure.endswith("_low"))


def test_the_committed_long_tail_says_whether_the_rarest_third_gains_twice() -> None:
    for name in (*LONG_NAMES, *PROPORTION_NAMES):
        parts = parts_named(committed(), name)
        rare, common, against = (parts[part] for part in (THIRDS[0], THIRDS[2], AGAINST))
        assert against["difference"] == pytest.approx(rare["gain"] - common["gain"])
        if "ratio" in against:
            assert against["ratio"] == pytest.approx(rare["gain"] / common["gain"])
            twice = "at least twice" if against["ratio"] >= 2 else "not twice"
            assert twice in long_tail_sentence(parts)
        assert sum(parts[part]["n_test"] for part in THIRDS) == 10_000
        assert [parts[part]["n_classes"] for part in THIRDS] == [33, 33, 34]
