"""A report: one HTML file with pictures inside, which asks for nothing from outside and runs nothing."""

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from residual_memory._version import __version__
from residual_memory.display import shown
from residual_memory.errors import MissingExtra, StorageFailure
from residual_memory.evaluation import METRIC_NAMES, Evaluation
from residual_memory.figures import as_svg
from residual_memory.metrics import Estimate

try:
    import jinja2
    from markupsafe import Markup
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtra("a report", "report") from error

LABEL_WIDTH = 48  # characters of a label
TEXT_WIDTH = 2000  # of any other text
CELLS = 6  # columns of a table row that are shown
INTERVALS = (
    "Intervals are of 95 %, and that of the gain is paired by row. Memory only is what the labels of the neighbours "
    "say without the base's own prediction: look at it before the residuals get the credit."
)
SHARING = "The file holds examples and labels of the data: share it as you would share them."


@dataclass(frozen=True)
class Comparison:
    """What methods reach by one metric.

    Attributes
    ----------
    name : of what is compared, such as a choice of keys; may be empty.
    metric : with its unit.
    lines : the methods with their figures, base first and corrected last.
    gain : of corrected over base.
    unit : of the gain.
    factor : by which all figures are multiplied to be shown.
    """

    name: str
    metric: str
    lines: tuple[tuple[str, Estimate], ...]
    gain: Estimate
    unit: str
    factor: float = 1.0

    @staticmethod
    def of(found: Evaluation, name: str = "") -> "Comparison":
        """What an evaluation found."""
        lines = (("base", found.base), ("memory only", found.memory_only), ("corrected", found.corrected))
        if found.metric == "accuracy":
            return Comparison(name, "accuracy, %", lines, found.gain, "points", 100.0)
        return Comparison(name, METRIC_NAMES[found.metric], lines, found.gain, UNITS[found.metric])


UNITS = {"accuracy": "points", "log_loss": "nats", "rmse": "RMSE"}


@dataclass(frozen=True)
class Example:
    """A row of the data or of the memory, as people see it.

    Attributes
    ----------
    name : its id, or its place.
    label : its class, or value.
    picture : a PNG.
    cells : columns and values.
    """

    name: str
    label: str
    picture: bytes | None = None
    cells: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Near:
    """A memory behind a correction, with its weight and whether it speaks for the truth."""

    example: Example
    weight: float
    agrees: bool


@dataclass(frozen=True)
class Case:
    """A row that the memory changed.

    Attributes
    ----------
    query : the row.
    before, after : what base and corrected say.
    scores : lines on how they came to.
    near : the memories that counted most.
    """

    query: Example
    before: str
    after: str
    scores: tuple[str, ...]
    near: tuple[Near, ...]


@dataclass(frozen=True)
class Gallery:
    """Cases under a title, and what they have in common."""

    title: str
    text: str
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Chart:
    """A figure under a title."""

    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Report:
    """What is in the file.

    Attributes
    ----------
    title, lead : what was measured.
    verdict, helps : whether the memory is worth it.
    comparisons, galleries, charts : in the order in which they are shown.
    facts : names and values: data, setting, command, …
    notes : what a reader must know to read the figures rightly.
    """

    title: str
    lead: str
    verdict: str
    helps: bool
    comparisons: tuple[Comparison, ...]
    galleries: tuple[Gallery, ...] = ()
    charts: tuple[Chart, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def html(self) -> str:
        """The page."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("residual_memory.reports", "."),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            finalize=lambda value: value if isinstance(value, Markup) else shown(value, TEXT_WIDTH),
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters.update(
            label=lambda text: shown(text, LABEL_WIDTH),
            data=_as_data,
            cells=_told,
            number=_number,
            signed=lambda value, factor: _number(value, factor, "+"),
            percent=lambda fraction: f"{100 * fraction:.1f} %",
        )
        return environment.get_template("report.html.j2").render(
            report=self,
            comparisons=[(each, _lines(each, self.comparisons)) for each in self.comparisons],
            charts=[(chart, Markup(as_svg(chart.figure))) for chart in self.charts],
            notes=(INTERVALS, *self.notes, *((SHARING,) if any(each.cases for each in self.galleries) else ())),
            version=__version__,
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all; one that is there already is replaced.

        Raises
        ------
        StorageFailure : if the disk refuses.
        """
        part = Path(path).with_name(f".{Path(path).name}.part")
        text = self.html()
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise StorageFailure(f"the report cannot be written to {path}: {error}; name another file") from error


def _lines(found: Comparison, among: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The methods with their figures as text, and where their intervals lie between 0 and 100 % of an axis.

    Comparisons of one metric share their axis.
    """
    alike = [part for each in among if each.metric == found.metric for _, part in each.lines]
    finite = [end for part in alike for end in (part.value, *_ends(part))]
    least, span = min(finite), (max(finite) - min(finite)) or 1.0

    def place(value: float) -> str:
        return f"{4 + 92 * (value - least) / span:.2f}"

    lines = []
    for name, part in found.lines:
        low, high = _ends(part)
        lines.append(
            {
                "name": name,
                "figure": _number(part.value, found.factor),
                "margin": _number(part.margin, found.factor),
                "low": place(low),
                "middle": place(part.value),
                "width": f"{92 * (high - low) / span:.2f}",
            }
        )
    return lines


def _ends(part: Estimate) -> tuple[float, float]:
    """The interval; the value itself where nothing is known of it."""
    return (part.low, part.high) if abs(part.low) < float("inf") > abs(part.high) else (part.value, part.value)


def _number(value: float, factor: float, sign: str = "") -> str:
    return f"{factor * value:{sign}.2f}" if factor == 100.0 else f"{factor * value:{sign}.4g}"


def _as_data(picture: bytes) -> Markup:
    return Markup(f"data:image/png;base64,{base64.b64encode(picture).decode()}")


def _told(cells: Mapping[str, Any]) -> str:
    told = [f"{shown(name, LABEL_WIDTH)} {shown(value, LABEL_WIDTH)}" for name, value in list(cells.items())[:CELLS]]
    return ", ".join(told) + (" …" if len(cells) > CELLS else "")
