"""Where the gain comes from: by class and superclass, base confidence, distance to the memories, and class frequency.

The paper says that the base learns the flowers and the memory the rose. An image that the memory put right, or made
wrong, moved between its class and another one; where both are of one superclass, the change is inside the superclass.

The long-tailed network saw 9,346 images, between 4 and 429 of a class, and its memory holds the same ones. Its settings
are chosen on the 5,000 held-out images, which it never saw and in which all classes are about as frequent; the rows
"tuned in proportion" choose them on some of the 5,000, in which classes are as frequent as in the long tail.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from numpy import ndarray
from PIL import Image

from experiments.cifar100.measuring import opened
from experiments.cifar100.networks import trained
from experiments.cifar100.samples import SAMPLES
from experiments.results_file import ResultFile, Row
from residual_memory.correction import ResidualKNN
from residual_memory.demo.assets import shipped_network
from residual_memory.demo.cifar100 import Cifar100, held_out_split, user_cache
from residual_memory.demo.images import Images
from residual_memory.demo.networks import CifarNetwork
from residual_memory.demo.report import roses_figure
from residual_memory.demo.run import (
    BEST,
    KRIGING_NEIGHBORS,
    N_NEIGHBORS,
    PLAIN,
    ROSE_NEIGHBORS,
    Measured,
    Rose,
    measure,
    tuned_setting,
)
from residual_memory.figures import CORRECTED, LOSS
from residual_memory.memory import Memory
from residual_memory.metrics import Estimate, bootstrap_interval, mean_interval
from residual_memory.models.base import KeyChoice
from residual_memory.models.torch import build_memory, observe
from residual_memory.tuning import TuningResult, tune
from residual_memory.types import Observations

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "roses"
DATA = (
    "CIFAR-100, official test split (10,000); settings from 5,000 held-out training images; long-tailed: network and "
    "memory of 9,346 training images, 4 to 429 of a class, settings from the same 5,000 images, "
    "which it never saw (all classes about as frequent), or, tuned in proportion, from those that keep the long tail"
)
CONFIDENCES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
N_PARTS = 10
THIRDS = ("rarest third", "middle third", "commonest third")
LONG_TAIL = ("resnet8", "long-tailed", 7_800)
PUT_RIGHT, MADE_WRONG = 12, 6  # shown on a page at most
PICTURES = Path(__file__).parents[2] / "docs" / "images"
NAMES = tuple(f"resnet8 {choice.name}" for choice in (PLAIN, BEST))
TAIL, IN_PROPORTION = "resnet8 long-tailed", "resnet8 long-tailed, tuned in proportion,"
LONG_NAMES = tuple(f"{TAIL} {choice.name}" for choice in (PLAIN, BEST))
PROPORTION_NAMES = tuple(f"{IN_PROPORTION} {choice.name}" for choice in (PLAIN, BEST))
COLOURS = LOSS, CORRECTED
SPLITS = INSIDE, SECOND = "inside the superclass", "inside the superclass, true class second"
AGAINST = f"{THIRDS[0]} against {THIRDS[2]}"
METHODS = {"base": 8, "memory_only": 8, "corrected": 11}  # and their columns
SURE = (1, "gain_low"), (-1, "gain_high")
SHARES = "share_inside", "share_of_errors_inside", "excess"
COUNTS = "errors", "put_right", "made_wrong"
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{{ title }}</title>
<style>
  body { margin: 1.5rem auto; max-width: 62rem; padding: 0 1rem; font: 15px/1.45 system-ui, sans-serif; }
  .rose { display: inline-flex; gap: .5rem; width: 29rem; margin: .4rem 0; vertical-align: top; font-size: .7rem; }
  .rose > div { width: 60px; text-align: center; } .rose > div:first-child { width: 120px; }
  img { width: 56px; } div:first-child > img { width: 96px; } .same { color: #c2185b; font-weight: 600; }
</style>
<h1>{{ title }}</h1>
{% if index %}<p>Test images of each superclass that the memory put right, and that it made wrong.</p><ul>
{% for row in index %}<li><a href="{{ row.link }}">{{ row.name }}</a>: {{ row.right }} right, {{ row.wrong }} wrong</li>
{% endfor %}</ul>{% else %}<p><a href="index.html">All superclasses</a>. Drawn at random. Large: the test image, its
true class and the wrong answer, with the scores before → after. Beside it: the training images that moved it most, and
their part in the change; others may pull back.</p>{% endif %}
{% for part in parts %}<h2>{{ part.n }} {{ part.title }}, {{ part.roses|length }} shown</h2>
{% for rose in part.roses %}<div class="rose"><div><img src="{{ rose.image }}" alt="test image {{ rose.row }}"><br>
<b>{{ rose.label }}</b> {{ rose.label_scores }}<br>{{ rose.said }} {{ rose.said_scores }}</div>
{% for near in rose.near %}<div><img src="{{ near.image }}" alt="training image {{ near.id }}"><br>
<span{% if near.same %} class="same"{% endif %}>{{ near.label }}</span><br>{{ near.weight }} %</div>{% endfor %}</div>
{% endfor %}{% endfor %}</html>
"""


@dataclass(frozen=True)
class Answers:
    """The classes that three methods give the same test images.

    Attributes
    ----------
    labels : true classes.
    base, memory_only, corrected : what each method says.
    runner_up : the base's second choice.
    superclass_of : each class's superclass.
    """

    labels: Int64[ndarray, " q"]
    base: Int64[ndarray, " q"]
    memory_only: Int64[ndarray, " q"]
    corrected: Int64[ndarray, " q"]
    runner_up: Int64[ndarray, " q"]
    superclass_of: Int64[ndarray, " c"]

    @property
    def change(self) -> Float[ndarray, " q"]:
        """1 where the memory put an image right, −1 where it made one wrong, else 0; its mean is the gain."""
        return (self.corrected == self.labels).astype(float) - (self.base == self.labels)

    @property
    def inside(self) -> Bool[ndarray, " q"]:
        """Whether the wrong one of the two answers (the base's where both are wrong) is of the true superclass."""
        wrong = np.where(self.base == self.labels, self.corrected, self.base)
        return self.superclass_of[wrong] == self.superclass_of[self.labels]


@dataclass(frozen=True)
class Seen:
    """One memory and the test images.

    Attributes
    ----------
    knn, rows, measured, answers : the memory in use, the test images as it sees them, and what came out.
    nearest, farthest : distance of each test image to the first and to the k-th memory.
    """

    knn: ResidualKNN
    rows: Observations
    measured: Measured
    answers: Answers
    nearest: Float[ndarray, " q"]
    farthest: Float[ndarray, " q"]

    @staticmethod
    def by(memory: Memory, network: CifarNetwork, chosen: TuningResult, name: str, test: Cifar100) -> "Seen":
        rows = observe(network, Images(test), memory)
        measured = measure(memory, rows, chosen.best, name, chosen.best_memory_only)
        ranked = np.asarray(rows.predictions).argsort(axis=1)
        superclass_of = np.zeros(len(test.class_names), np.int64)
        superclass_of[test.labels] = test.superclasses
        answers = Answers(
            test.labels,
            np.asarray(rows.predictions).argmax(1),
            measured.said.memory_only.argmax(1),
            measured.said.corrected.argmax(1),
            ranked[:, -2],
            superclass_of,
        )
        knn = chosen.best.knn(memory, index="auto")
        found = knn.search(rows.keys, chosen.best.n_neighbors)[1].distances
        return Seen(knn, rows, measured, answers, found[:, 0], found[:, -1])


def run(*, quick: bool, fresh: bool) -> None:
    """Measure every row that the result file does not hold yet, write pictures and gallery, and print the tables."""
    train, test, results = opened(NAME, DATA, quick=quick, fresh=fresh)
    choices = [PLAIN] if quick else [PLAIN, BEST]
    pages = (results.path.parent if quick else user_cache()) / NAME
    for choice in choices:
        name, shown = f"resnet8 {choice.name}", choice is choices[-1]
        if not results.holds(name, 0) or (shown and not (pages / "index.html").exists()):
            chosen = tuned_setting(shipped_network("resnet8-45000"), train, choice, progress=True)
            if quick:  # so small a memory does not help: use it all the same, so that there is something to show
                chosen = replace(chosen, best=replace(chosen.best, shrinkage=1.0))
            network = shipped_network("resnet8-50000")
            memory = build_memory(network, Images(train), None, **choice.options)
            seen = Seen.by(memory, network, chosen, choice.name, test)
            measure_parts(results, name, seen, test)
            if shown:
                write_gallery(seen, train, test, pages, None if quick else PICTURES / "roses-gallery.png")
        if not results.holds(f"{TAIL} {choice.name}", 0):
            measure_long_tail(results, choice, train, test)
    if not quick:
        superclass_figure(results.rows).savefig(PICTURES / "roses-superclasses.png", dpi=80)
        where_figure(results.rows).savefig(PICTURES / "roses-where.png", dpi=80)
    print(tables(results.rows))
    print(f"gallery: {pages / 'index.html'}")


def measure_parts(results: ResultFile, name: str, seen: Seen, test: Cifar100) -> None:
    """All rows of one memory; the row named after it comes last and marks them done."""
    answers = seen.answers
    for part, rows, known in parts_of(seen, test):
        if rows.any():
            results.row(f"{name}, {part}", 0, partial(compared, answers, rows, known))
    results.row(f"{name}, superclass accuracy", 0, lambda: superclasses_compared(answers))
    results.row(f"{name}, {INSIDE}", 0, lambda: split_of_gain(answers))
    second = (answers.base != answers.labels) & (answers.runner_up == answers.labels)
    results.row(f"{name}, {SECOND}", 0, lambda: split_of_gain(answers, second))
    chosen = {"chosen": seen.measured.setting.to_dict()}
    results.row(name, 0, lambda: {"method": "resmem", **seen.measured.evaluation.to_dict(), **chosen})


def parts_of(seen: Seen, test: Cifar100) -> Iterator[tuple[str, Bool[ndarray, " q"], Row]]:
    """Every part of the test images that gets a row: what it is called, its rows, and what else is known of it."""
    for number, name in enumerate(test.superclass_names):
        yield f"superclass {name}", test.superclasses == number, {}
    for number, name in enumerate(test.class_names):
        superclass = test.superclass_names[seen.answers.superclass_of[number]]
        yield f"class {name}", test.labels == number, {"superclass": superclass}
    confidence = np.asarray(seen.rows.predictions).max(1)
    for low, high in pairwise(CONFIDENCES):
        rows = (confidence > low) & (confidence <= high)
        yield f"base confidence {low:g} to {high:g}", rows, {"low": low, "high": high}
    for name, distances in (("distance", seen.nearest), ("k-th distance", seen.farthest)):
        for place, rows in enumerate(np.array_split(np.argsort(distances, kind="stable"), N_PARTS), 1):
            known = {"low": float(distances[rows].min()), "high": float(distances[rows].max())}
            yield f"{name} decile {place}", np.isin(np.arange(len(test)), rows), known


def compared(answers: Answers, rows: Bool[ndarray, " q"], known: Row) -> Row:
    """Accuracies of the three methods on these rows, and the paired gain."""
    base, alone, corrected = (
        float((said[rows] == answers.labels[rows]).mean())
        for said in (answers.base, answers.memory_only, answers.corrected)
    )
    figures = {"base": base, "memory_only": alone, "corrected": corrected}
    gain = _fields("gain", mean_interval(answers.change[rows]))
    return {"method": "resmem", "metric": "accuracy", **figures, **gain, "n_test": int(rows.sum()), **known}


def superclasses_compared(answers: Answers) -> Row:
    """How often the answer's superclass is the true one."""
    coarse = replace(
        answers,
        **{
            name: answers.superclass_of[getattr(answers, name)]
            for name in ("labels", "base", "memory_only", "corrected")
        },
    )
    row = compared(coarse, np.ones(len(answers.labels), bool), {})
    return {**row, "metric": "superclass_accuracy"}


def split_of_gain(answers: Answers, chosen: Bool[ndarray, " q"] | None = None) -> Row:
    """The gain inside superclasses and across them, beside the base's errors inside and across.

    Parameters
    ----------
    chosen : which images count; by default all.
    """
    chosen = np.ones(len(answers.labels), bool) if chosen is None else chosen
    change, inside, wrong = answers.change[chosen], answers.inside[chosen], (answers.base != answers.labels)[chosen]
    right_before = np.where(wrong, 0.0, change)  # the images made wrong: all of them had a right base answer

    def share(rows: Int64[ndarray, " r"]) -> float:
        return _ratio((change * inside)[rows].sum(), change[rows].sum())

    def share_by_base(rows: Int64[ndarray, " r"]) -> float:
        return _ratio((change * (inside & wrong) + right_before)[rows].sum(), change[rows].sum())

    def share_of_errors(rows: Int64[ndarray, " r"]) -> float:
        return _ratio((inside & wrong)[rows].sum(), wrong[rows].sum())

    def excess(rows: Int64[ndarray, " r"]) -> float:
        return share(rows) - share_of_errors(rows)

    row: Row = {"method": "resmem", "metric": "share_inside", "n_test": len(change)}
    for name, here in (("inside", inside), ("across", ~inside)):
        row |= {
            f"errors_{name}": int((here & wrong).sum()),
            f"put_right_{name}": int((here & (change > 0)).sum()),
            f"made_wrong_{name}": int((here & (change < 0)).sum()),
            **_fields(f"gain_{name}", mean_interval(change * here)),
        }
        if (here & wrong).any():
            row |= _fields(f"errors_put_right_{name}", mean_interval(change[here & wrong]))
    for name, figure in (
        ("share_inside", share),
        ("share_inside_by_base_answer", share_by_base),
        ("share_of_errors_inside", share_of_errors),
        ("excess", excess),
    ):
        row |= _fields(name, bootstrap_interval(figure, len(change)))
    return row


def measure_long_tail(results: ResultFile, choice: KeyChoice, train: Cifar100, test: Cifar100) -> None:
    """The long-tailed network and its memory by class frequency, with settings chosen in two ways."""
    network, kept = trained(*LONG_TAIL), SAMPLES["long-tailed"](train)
    counts = np.bincount(train.labels[kept], minlength=len(train.class_names))
    memory = build_memory(network, Images(train, kept), None, **choice.options)
    held_out = observe(network, Images(train, held_out_split(len(train))[1]), memory)
    every = np.arange(len(memory))
    fitted = memory.snapshot.predictions(every).argmax(1) == memory.snapshot.targets(every)
    groups = [*zip(THIRDS, thirds(counts), strict=True)]
    by_count = np.array_split(np.argsort(counts, kind="stable"), N_PARTS)
    groups += [(f"frequency decile {place}", classes) for place, classes in enumerate(by_count, 1)]
    for start, chosen_on in ((IN_PROPORTION, in_proportion(held_out.labels, counts)), (TAIL, np.arange(len(held_out)))):
        chosen = _tuned(memory, held_out, chosen_on, choice)
        seen, name = Seen.by(memory, network, chosen, choice.name, test), f"{start} {choice.name}"
        for part, classes in groups:
            rows, known = np.isin(test.labels, classes), _frequencies(counts[classes])
            results.row(f"{name}, {part}", 0, partial(compared, seen.answers, rows, known))
        results.row(f"{name}, {AGAINST}", 0, partial(thirds_compared, seen.answers, thirds(counts)))
        known = {"n_held_out": len(chosen_on), "train_accuracy": float(fitted.mean()), **_frequencies(counts)}
        figures = seen.measured.evaluation.to_dict() | {"chosen": chosen.best.to_dict()} | known
        results.row(name, 0, partial(dict, figures, method="resmem"))


def thirds(counts: Int64[ndarray, " c"]) -> tuple[Int64[ndarray, " r"], Int64[ndarray, " m"], Int64[ndarray, " f"]]:
    """The classes from the rarest third to the commonest, which has one more where they do not divide by three."""
    order, third = np.argsort(counts, kind="stable"), len(counts) // 3
    return order[:third], order[third : 2 * third], order[2 * third :]


def in_proportion(labels: Int64[ndarray, " q"], counts: Int64[ndarray, " c"]) -> Int64[ndarray, " r"]:
    """The most rows whose classes are as frequent as the counts, one a class at least."""
    scale = np.bincount(labels, minlength=len(counts)).min() / counts.max()
    kept = [np.flatnonzero(labels == label)[: max(1, round(scale * count))] for label, count in enumerate(counts)]
    return np.sort(np.concatenate(kept))


def thirds_compared(answers: Answers, classes: Sequence[Int64[ndarray, " m"]]) -> Row:
    """The gain of the rarest third over that of the commonest: their ratio and their difference."""
    rare, common = (np.isin(answers.labels, some) for some in (classes[0], classes[-1]))
    change = answers.change

    def gains(rows: Int64[ndarray, " r"]) -> tuple[float, float]:
        return _mean(change[rows][rare[rows]]), _mean(change[rows][common[rows]])

    ratio = bootstrap_interval(lambda rows: _ratio(*gains(rows)), len(change))
    difference = bootstrap_interval(lambda rows: gains(rows)[0] - gains(rows)[1], len(change))
    return {"method": "resmem", "metric": "ratio", **_fields("ratio", ratio), **_fields("difference", difference)}


def _tuned(memory: Memory, held_out: Observations, rows: Int64[ndarray, " r"], choice: KeyChoice) -> TuningResult:
    """As `tuned_setting` does, from these held-out images."""
    return tune(
        memory,
        np.asarray(held_out.keys)[rows],
        np.asarray(held_out.labels)[rows],
        np.asarray(held_out.predictions)[rows],
        n_neighbors=KRIGING_NEIGHBORS if choice.kernels == ("kriging",) else N_NEIGHBORS,
        shrinkages=(1.0,) if choice is PLAIN else None,
        kernel=choice.kernels,
    )


def _frequencies(counts: Int64[ndarray, " c"]) -> Row:
    return {"n_classes": len(counts), "rarest": int(counts.min()), "commonest": int(counts.max())}


def _mean(values: Float[ndarray, " q"]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


def _fields(name: str, estimate: Estimate) -> Row:
    """The estimate as fields of a row; none where there is nothing to divide by."""
    ends = {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return ends if np.isfinite([*ends.values()]).all() else {}


def write_gallery(seen: Seen, train: Cifar100, test: Cifar100, folder: Path, picture: Path | None) -> None:
    """A page for each superclass, of images that the memory put right or made wrong, drawn at random; and an index.

    Parameters
    ----------
    picture : where three go for the documentation: put right inside the superclass, put right across, made wrong.
    """
    change, names = seen.answers.change, [name.replace("_", " ") for name in test.superclass_names]
    moved = {sign: np.random.default_rng(0).permutation(np.flatnonzero(change == sign)) for sign in (1, -1)}
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(PAGE)
    folder.mkdir(parents=True, exist_ok=True)
    index = []
    for number, name in enumerate(names):
        right, wrong = (rows[test.superclasses[rows] == number] for rows in moved.values())
        parts = []
        for title, rows, shown in (("put right", right, PUT_RIGHT), ("made wrong", wrong, MADE_WRONG)):
            roses = [_rose(rose, train.class_names, train, test) for rose in roses_of(seen, rows[:shown], train)]
            parts.append({"title": title, "n": len(rows), "roses": roses})
        link = f"{test.superclass_names[number]}.html"
        (folder / link).write_text(page.render(title=name, parts=parts, index=[]), encoding="utf-8")
        index.append({"link": link, "name": name, "right": len(right), "wrong": len(wrong)})
    title = f"Roses: {seen.measured.name}"
    (folder / "index.html").write_text(page.render(title=title, parts=[], index=index), encoding="utf-8")
    if picture is not None:
        inside = seen.answers.inside[moved[1]]
        rows = np.concatenate([moved[1][inside][:1], moved[1][~inside][:1], moved[-1][:1]])
        roses_figure(tuple(roses_of(seen, rows, train)), train, test).savefig(picture, dpi=70)
        Image.open(picture).convert("RGB").quantize().save(picture, optimize=True)


def _rose(rose: Rose, class_names: tuple[str, ...], train: Cifar100, test: Cifar100) -> dict[str, Any]:
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


def roses_of(seen: Seen, rows: Int64[ndarray, " r"], train: Cifar100) -> list[Rose]:
    """These test images, and the training images that moved them most from the base's answer to the corrected one.

    A weight is the part that an image, with its mirror image, has in the change between the two answers' scores; since
    others pull back, the weights may sum to more than 1.
    """
    if not len(rows):
        return []
    answers, said = seen.answers, seen.measured.said
    found, parts = seen.knn.contributions(np.asarray(seen.rows.keys)[rows])
    roses = []
    for row, ids, part in zip(rows.tolist(), found.ids, parts, strict=True):
        label, before, after = (int(some[row]) for some in (answers.labels, answers.base, answers.corrected))
        pair = label, after if before == label else before
        images, owner = np.unique(ids % len(train), return_inverse=True)
        pulls = np.bincount(owner, weights=part[:, after] - part[:, before])
        most = np.argsort(-pulls, kind="stable")[:ROSE_NEIGHBORS]
        base, corrected = (
            (float(scores[row, pair[0]]), float(scores[row, pair[1]])) for scores in (said.base, said.corrected)
        )
        labels, weights = train.labels[images[most]].tolist(), (pulls[most] / pulls.sum()).tolist()
        roses.append(Rose(row, *pair, base, corrected, tuple(images[most].tolist()), tuple(labels), tuple(weights)))
    return roses


def parts_named(rows: Sequence[Row], name: str) -> dict[str, Row]:
    """The rows of one memory by what follows its name; "" is the whole."""
    return {
        row["setting"].removeprefix(name).removeprefix(", "): row
        for row in rows
        if row["setting"] == name or row["setting"].startswith(f"{name}, ")
    }


def superclass_figure(rows: Sequence[Row]) -> "Figure":
    """Gain by superclass, from the rows of the result file alone."""
    from matplotlib.figure import Figure

    start, figure = "superclass ", Figure(figsize=(7.2, 6.2), layout="constrained")
    axes, memories = figure.add_subplot(), [parts_named(rows, name) for name in NAMES]
    last = {part: row for part, row in memories[-1].items() if part.startswith(start) and row["metric"] == "accuracy"}
    order = sorted(last, key=lambda part: last[part]["gain"])
    for parts, name, colour, shift in zip(memories, NAMES, COLOURS, (-0.12, 0.12), strict=True):
        _draw(axes, [parts[part] for part in order], np.arange(len(order)) + shift, colour, name, upright=False)
    captions = [
        f"{part.removeprefix(start).replace('_', ' ')}  (base {100 * last[part]['base']:.0f} %)" for part in order
    ]
    axes.set_yticks(np.arange(len(order)), captions)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("gain in points, 95 % intervals")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def where_figure(rows: Sequence[Row]) -> "Figure":
    """Gain by base confidence, by distance and by class frequency, from the rows of the result file alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = (
        ("base confidence ", NAMES, "largest probability of the base"),
        ("distance decile ", NAMES, "distance to the nearest memory, by tenths"),
        ("frequency decile ", LONG_NAMES, "long tail: training images of a class"),
    )
    for axes, (start, names, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for name, colour, shift in zip(names, COLOURS, (-0.06, 0.06), strict=True):
            some = {part: row for part, row in parts_named(rows, name).items() if part.startswith(start)}
            _draw(axes, list(some.values()), np.arange(len(some)) + shift, colour, name.removeprefix(f"{TAIL} "))
        long_tail = start.startswith("frequency")
        captions = [
            f"{row['rarest']}–{row['commonest']}" if long_tail else part.removeprefix(start).replace(" to ", "–")
            for part, row in some.items()
        ]
        axes.set_xticks(np.arange(len(some)), captions, fontsize=8, rotation=30 if long_tail else 0)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xlabel=title, ylabel="gain in points, 95 % intervals")
    lines = axes.get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def _draw(axes: Any, rows: Sequence[Row], places: ndarray, colour: str, label: str, *, upright: bool = True) -> None:
    gain, low, high = (100 * np.array([row[name] for row in rows]) for name in ("gain", "gain_low", "gain_high"))
    x, y, margins = (places, gain, "yerr") if upright else (gain, places, "xerr")
    style = {"marker": "o", "markersize": 4, "linewidth": 1, "linestyle": "-" if upright else ""}
    axes.errorbar(x, y, **{margins: [gain - low, high - gain]}, color=colour, label=label, **style)
    axes.spines[["top", "right"]].set_visible(False)


def tables(rows: Sequence[Row]) -> str:
    """The main findings for a terminal of 100 columns; of the classes only those that gain most and least."""
    lines = ["in per cent and points; in brackets 95 % intervals, paired by test image"]
    for name in (*NAMES, *LONG_NAMES, *PROPORTION_NAMES):
        parts = parts_named(rows, name)
        if not parts:
            continue
        lines += ["", name, f"{'':<42}{'n':>7}{'base':>8}{'memory':>8}{'corrected':>11}{'gain':>24}"]
        classes = sorted((part for part in parts if part.startswith("class ")), key=lambda part: parts[part]["gain"])
        hidden = set(classes[3:-3])
        for part, row in parts.items():
            if "corrected" in row and part not in hidden:
                figures = (f"{100 * row[method]:>{width}.2f}" for method, width in METHODS.items())
                lines.append(f"{part or 'all':<42.42}{row['n_test']:>7}{''.join(figures)}{_interval(row, 'gain'):>24}")
        if classes:
            up, down = (sum(sign * parts[part][end] > 0 for part in classes) for sign, end in SURE)
            lines.append(f"classes whose whole interval is above 0: {up}, below 0: {down} of {len(classes)}")
        lines += [line for part in SPLITS if part in parts for line in _split_lines(part, parts[part])]
        if AGAINST in parts:
            lines.append(long_tail_sentence(parts))
    return "\n".join(lines)


def _split_lines(part: str, row: Row) -> Iterator[str]:
    yield f"{part}:"
    for name in SHARES:
        yield f"  {name.replace('_', ' '):<40}{_interval(row, name):>24}"
    for name in ("inside", "across"):
        counts = ", ".join(f"{row[f'{what}_{name}']} {what.replace('_', ' ')}" for what in COUNTS)
        yield f"  {name}: {counts}, gain {_interval(row, f'gain_{name}')}"


def long_tail_sentence(parts: dict[str, Row]) -> str:
    """Whether the rarest third of the classes gains at least twice what the commonest third gains."""
    rare, common, against = (parts[part] for part in (THIRDS[0], THIRDS[2], AGAINST))
    if "ratio" not in against:
        return "Long tail: the memory is not used, no class gains."
    twice = "at least twice" if against["ratio"] >= 2 else "not twice"
    times = "{ratio:.2f} times [{ratio_low:.2f}, {ratio_high:.2f}]".format(**against)
    return (
        f"Long tail: the rarest third gains {_interval(rare, 'gain')} points,\n"
        f"{times} the {_interval(common, 'gain')} of the commonest third: {twice} as much."
    )


def _interval(row: Row, name: str) -> str:
    if name not in row:
        return "–"
    value, low, high = (100 * row[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
