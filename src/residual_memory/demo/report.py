"""The report of a demo run: the table, the roses, where the gain comes from, reliability before and after."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from residual_memory import figures
from residual_memory.demo.cifar100 import Cifar100
from residual_memory.examples import as_png
from residual_memory.reports.measured import charts_of
from residual_memory.reports.page import Case, Comparison, Example, Gallery, Near, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from residual_memory.demo.run import DemoResult, Rose

PUT_RIGHT = (
    "Test images that the network had wrong, and the training images that corrected it, with their weights among all "
    "neighbours. Both classes are of one superclass: the network knew the flowers, the memory knows the rose. "
    "Corrections that a few near-duplicates make are left out here."
)
PUT_WRONG = "Test images that the network had right until the memory spoke. They count in the gain."


def write_report(
    result: "DemoResult",
    images: tuple[Cifar100, Cifar100] | None,
    path: Path,
    facts: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the report of a demo run.

    Parameters
    ----------
    result : of `run_demo`.
    images : training and test split, for the pictures; None leaves the roses out.
    path : the HTML file.
    facts : names and values that are told beside the settings.

    Raises
    ------
    StorageFailure : if the disk refuses.
    """
    last = result.rows[-1]
    kinds = (
        ("Roses: what the memory put right", PUT_RIGHT, result.roses, False),
        ("What it put wrong", PUT_WRONG, result.lost, True),
    )
    Report(
        title="What a memory adds to a ResNet-8",
        lead=(
            f"CIFAR-100, {last.evaluation.n_rows:,} test images; {result.data}. Nothing was trained again: the network "
            "stays as it is, and a memory of its 50,000 training images corrects what it says."
        ),
        verdict=last.evaluation.verdict,
        helps=last.evaluation.helps,
        comparisons=tuple(Comparison.of(row.evaluation, f"{row.name} keys") for row in result.rows),
        galleries=tuple(
            Gallery(title, text, tuple(_case(rose, *images, lost=lost) for rose in roses))
            for title, text, roses, lost in kinds
            if images is not None and roses
        ),
        charts=charts_of(result.seen, last.said, result.class_names),
        facts=(
            *facts,
            *((f"setting, {row.name} keys", row.setting.text) for row in result.rows),
            *(("go on with", f"resmem info {row.memory}") for row in result.rows if row.memory),
        ),
        notes=(f"Examples and charts are of the {last.name} keys.",),
    ).write(path)


def roses_figure(roses: "tuple[Rose, ...]", train: Cifar100, test: Cifar100, shown: int = 3) -> "Figure":
    """The first roses as one picture, for a page or a slide."""
    names = [name.replace("_", " ") for name in train.class_names]
    rows = []
    for rose in roses[:shown]:
        query = f"{names[rose.label]}, not {names[rose.said]}"
        near = zip(rose.ids, rose.labels, rose.weights, strict=True)
        rows.append(
            [(test.images[rose.row], query)]
            + [(train.images[id], f"{names[label]}  {100 * weight:.0f} %") for id, label, weight in near]
        )
    return figures.gallery(rows)


def _case(rose: "Rose", train: Cifar100, test: Cifar100, *, lost: bool) -> Case:
    names = [name.replace("_", " ") for name in train.class_names]
    label, said = names[rose.label], names[rose.said]
    scores = [
        f"{name} {before:.2f} → {after:.2f}"
        for name, before, after in zip((label, said), rose.base, rose.corrected, strict=True)
    ]
    near = zip(rose.ids, rose.labels, rose.weights, strict=True)
    return Case(
        query=_example(test, rose.row, label),
        before=label if lost else said,
        after=said if lost else label,
        scores=tuple(scores),
        near=tuple(Near(_example(train, id, names[of]), weight, of == rose.label) for id, of, weight in near),
    )


def _example(images: Cifar100, row: int, label: str) -> Example:
    return Example(str(row), label, as_png(np.ascontiguousarray(np.moveaxis(images.images[row], 0, -1))))
