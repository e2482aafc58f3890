"""One self-contained HTML file: the table, the roses, gain by class, reliability before and after."""

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from residual_memory.correction import to_probabilities
from residual_memory.demo.cifar100 import Cifar100
from residual_memory.errors import MissingExtra
from residual_memory.metrics import calibration_bins, calibration_error

try:
    import jinja2
    from PIL import Image
except ImportError as error:
    raise MissingExtra("the HTML report", "report") from error

from residual_memory import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from residual_memory.demo.run import DemoResult, Rose


def write_report(result: "DemoResult", images: tuple[Cifar100, Cifar100] | None, path: Path) -> None:
    """Write the report of a demo run.

    Parameters
    ----------
    result : of `run_demo`.
    images : training and test split, for the pictures; None leaves the roses out.
    path : the HTML file.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("residual_memory.demo", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    last = result.rows[-1]
    page = environment.get_template("report.html.j2").render(
        result=result,
        n_test=f"{len(result.labels):,}",
        table=[_table_row(row.name, row.evaluation) for row in result.rows],
        verdict=last.evaluation.verdict,
        roses=[] if images is None else [_rose(rose, result.class_names, *images) for rose in result.roses],
        gain_by_class=figures.as_svg(class_gains(result)),
        reliability=figures.as_svg(reliability(result)),
        paths=[row.memory for row in result.rows if row.memory],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def class_gains(result: "DemoResult") -> "Figure":
    """Gain by class of the last key choice."""
    last, labels = result.rows[-1], result.labels
    counts = np.bincount(labels)
    base, corrected = (
        np.bincount(labels, weights=probabilities.argmax(1) == labels) / counts
        for probabilities in (last.said.base, last.said.corrected)
    )
    return figures.gain_by_class(result.class_names, base.tolist(), corrected.tolist())


def reliability(result: "DemoResult") -> "Figure":
    """Reliability of base and corrected probabilities of the last key choice."""
    last = result.rows[-1]
    methods = {"base": last.said.base, "corrected": to_probabilities(last.said.corrected, last.said.support)}
    return figures.reliability(
        {name: calibration_bins(probabilities, result.labels) for name, probabilities in methods.items()},
        {name: calibration_error(probabilities, result.labels) for name, probabilities in methods.items()},
    )


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


def _table_row(name: str, evaluation: Any) -> dict[str, Any]:
    parts = (evaluation.base, evaluation.memory_only, evaluation.corrected)
    cells = [{"value": f"{100 * part.value:.2f}", "margin": f"{100 * part.margin:.2f}"} for part in parts]
    gain = evaluation.gain
    return {"name": name, "cells": cells, "gain": f"{100 * gain.value:+.2f}", "margin": f"{100 * gain.margin:.2f}"}


def _rose(rose: "Rose", class_names: tuple[str, ...], train: Cifar100, test: Cifar100) -> dict[str, Any]:
    names = [name.replace("_", " ") for name in class_names]
    return {
        "row": rose.row,
        "image": _embedded(test.images[rose.row]),
        "label": names[rose.label],
        "said": names[rose.said],
        "label_scores": f"{rose.base[0]:.2f} → {rose.corrected[0]:.2f}",
        "said_scores": f"{rose.base[1]:.2f} → {rose.corrected[1]:.2f}",
        "near": [
            {
                "id": id,
                "image": _embedded(train.images[id]),
                "label": names[label],
                "same": label == rose.label,
                "weight": f"{100 * weight:.0f}",
            }
            for id, label, weight in zip(rose.ids, rose.labels, rose.weights, strict=True)
        ],
    }


def _embedded(image: UInt8[ndarray, "3 h w"]) -> str:
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(np.moveaxis(image, 0, -1))).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
