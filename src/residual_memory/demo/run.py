"""The demo: CIFAR-100, a trained ResNet-8, its memory, and what the memory changes on the 10,000 test images.

Settings are chosen without test images: the network that was trained on 45,000 images tells, on the other 5,000, which
setting is best; the network that was trained on all 50,000 uses it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from residual_memory.demo.assets import N_TRAIN, shipped_keys, shipped_network, shipped_settings
from residual_memory.demo.cifar100 import (
    Cifar100,
    download_cifar100,
    find_cifar100,
    held_out_split,
    read_cifar100,
    user_cache,
)
from residual_memory.errors import DataNotFound
from residual_memory.evaluation import Evaluation, HeldOut, Predicted, Setting, corrected_predictions, evaluation_of
from residual_memory.memory import Memory
from residual_memory.models.base import KeyChoice
from residual_memory.progress import progress_bar
from residual_memory.tuning import TuningResult, tune
from residual_memory.types import Observations

if TYPE_CHECKING:
    from residual_memory.demo.networks import CifarResNet

Say = Callable[[str], None]

N_NEIGHBORS = (5, 10, 20, 50, 100)
KRIGING_NEIGHBORS = (100, 200)
ROSES, LOST = 12, 6
ROSE_NEIGHBORS = 5
SERVED = (("model", "network"), ("data", "images"))  # options of `resmem serve`, and what they name
LARGEST_SHARE = 0.5  # of the memories shown; above it a few near-duplicates make the correction
FAMOUS = (("rose", "poppy"), ("cup", "plate"), ("squirrel", "rabbit"))  # the paper's own: true class, base's answer


def mirrored(image: Any) -> Any:
    """An image tensor with left and right exchanged."""
    return image.flip(-1)


PLAIN = KeyChoice("plain", "head", "input", 1, "euclidean")
FINE = KeyChoice("tuned 4x4", "stage3", "output", 4, "cosine", "float16")
BEST = KeyChoice(
    "tuned two layers, mirrored, kriging",
    "stage3.0.conv2@input+stage3@output",
    pool=4,
    metric="cosine",
    key_dtype="float16",
    copies=(mirrored,),
    kernels=("kriging",),
)


@dataclass(frozen=True)
class Rose:
    """A test image that the base had wrong and the memory put right, and the memories that did it.

    Attributes
    ----------
    row : of the test image.
    label, said : true class, and what the base said.
    base, corrected : scores of those two classes, before and after.
    ids, labels, weights : of the memories that counted most.
    """

    row: int
    label: int
    said: int
    base: tuple[float, float]
    corrected: tuple[float, float]
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """One key choice on the test images.

    Attributes
    ----------
    name : of the key choice.
    setting : chosen on held-out images.
    evaluation : on the test images.
    said : the predictions for the test images [10000 100].
    memory : where it lies on disk.
    """

    name: str
    setting: Setting
    evaluation: Evaluation
    said: Predicted
    memory: Path | None


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes
    ----------
    rows : one a key choice.
    roses : of the last row; empty where there are no images.
    lost : likewise, images that the memory put wrong.
    data : where the images came from.
    seen : the test images in the last row: keys, labels, and predictions of the network.
    class_names : of CIFAR-100.
    seconds : the whole run.
    report : the HTML file, if one was written.
    """

    rows: tuple[Measured, ...]
    roses: tuple[Rose, ...]
    lost: tuple[Rose, ...]
    data: str
    seen: HeldOut
    class_names: tuple[str, ...]
    seconds: float
    report: Path | None = None

    @property
    def helps(self) -> bool:
        """Whether the memory helps in every row."""
        return all(row.evaluation.helps for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """As one JSON object."""
        return {
            "data": self.data,
            "seconds": round(self.seconds, 1),
            "report": None if self.report is None else str(self.report),
            "rows": [
                {
                    "setting": f"resnet8 {row.name}",
                    "method": "resmem",
                    **row.evaluation.to_dict(),
                    "chosen": row.setting.to_dict(),
                    "memory": None if row.memory is None else str(row.memory),
                    "verdict": row.evaluation.verdict,
                }
                for row in self.rows
            ],
        }

    @property
    def text(self) -> str:
        """The table, for a terminal of 80 columns."""
        lines = [
            "CIFAR-100, ResNet-8: accuracy on the 10,000 test images, 95 % intervals",
            f"({self.data})",
            "",
            f"{'keys':<12}{'base':>15}{'memory only':>17}{'corrected':>17}{'gain':>17}",
        ]
        for row in self.rows:
            figures = row.evaluation
            parts = (figures.base, figures.memory_only, figures.corrected, figures.gain)
            cells = [f"{100 * part.value:.2f} ± {100 * part.margin:.2f}" for part in parts]
            lines.append(f"{row.name:<12}{cells[0]:>15}{cells[1]:>17}{cells[2]:>17}{'+' + cells[3]:>17}")
        lines += ["", *(f"{row.name}: {row.evaluation.verdict}" for row in self.rows)]
        lines += [f"memory of '{row.name}' keys: {row.memory}" for row in self.rows if row.memory]
        if memories := [row.memory for row in self.rows if row.memory]:
            options = [f"--{name} residual_memory.demo.served:{what}" for name, what in SERVED]
            lines += ["look at it:", " \\\n  ".join(["resmem serve", str(memories[-1]), *options])]
        if self.report:
            lines.append(f"report: {self.report}")
        return "\n".join([*lines, f"{self.seconds:.0f} seconds"])


def run_demo(
    *,
    out: Path | None = None,
    quick: bool = False,
    progress: bool = True,
    say: Say = print,
    facts: Sequence[tuple[str, str]] = (),
) -> DemoResult:
    """Build, tune and measure a memory for the shipped ResNet-8, and write the report.

    Parameters
    ----------
    out : HTML file to write; None writes none.
    quick : work from the keys that ship with the package even where the images are.
    progress : show progress bars.
    say : called with a line on each step.
    facts : names and values for the report: the command, …

    Raises
    ------
    CorruptFile : if the images on this machine are damaged.
    MissingExtra : if the report is wanted and its packages are not installed.
    """
    started = time.perf_counter()
    folder = None if quick else _images(say, progress)
    if folder is None:
        result, images = _from_keys(say), None
    else:
        result, images = _from_images(folder, say, progress)
    if out is not None:
        from residual_memory.demo.report import write_report

        write_report(result, images, out, facts)
    return replace(result, seconds=time.perf_counter() - started, report=out)


def tuned_setting(network: "CifarResNet", train: Cifar100, choice: KeyChoice, *, progress: bool) -> TuningResult:
    """Choose a setting on the 5,000 held-out images with the network that was trained on the others."""
    from residual_memory.demo.images import Images
    from residual_memory.models.torch import build_memory, observe

    fitted, held_out = held_out_split(len(train))
    memory = build_memory(network, Images(train, fitted), None, **choice.options, verbose=progress)
    seen = observe(network, Images(train, held_out), memory, verbose=progress)
    return tune(
        memory,
        seen.keys,
        seen.labels,
        np.asarray(seen.predictions),
        n_neighbors=KRIGING_NEIGHBORS if choice.kernels == ("kriging",) else N_NEIGHBORS,
        shrinkages=(1.0,) if choice is PLAIN else None,
        kernel=choice.kernels,
    )


def measure(
    memory: Memory, seen: Observations, setting: Setting, name: str, memory_only: Setting | None = None
) -> Measured:
    """Measure a setting on the test images, keeping the scores for the pictures."""
    rows = _checked(memory, seen)
    said = corrected_predictions(memory, rows.keys, rows.predictions, setting, memory_only=memory_only)
    return Measured(name, setting, evaluation_of(rows, said), said, memory.path)


def _checked(memory: Memory, seen: Observations) -> HeldOut:
    return HeldOut.checked(memory, seen.keys, seen.labels, np.asarray(seen.predictions), "accuracy")


def find_roses(
    memory: Memory, seen: Observations, measured: Measured, train: Cifar100, *, lost: bool = False
) -> tuple[Rose, ...]:
    """Test images that the memory put right within their superclass, by memories that agree on the class.

    The paper's own pairs come first. Corrections that hang on a few near-duplicates are left out: they show little.

    Parameters
    ----------
    lost : the images that it put wrong instead, by memories that agree on the wrong class.
    """
    base, scores = measured.said.base, measured.said.corrected
    labels = np.asarray(seen.labels)
    right, said = (base, scores) if lost else (scores, base)
    moved, said = (right.argmax(1) == labels) & (said.argmax(1) != labels), said.argmax(1)
    superclass_of = np.zeros(len(train.class_names), np.int64)
    superclass_of[train.labels] = train.superclasses
    rows = np.flatnonzero(moved & (superclass_of[said] == superclass_of[labels]))
    if not len(rows):
        return ()
    knn = measured.setting.knn(memory, index="auto")
    found = knn.neighbors(seen.keys[rows])
    weights, ids = found.weights[:, :ROSE_NEIGHBORS], found.ids[:, :ROSE_NEIGHBORS]
    held = memory.snapshot
    near = held.targets(held.rows_of(ids.ravel())).reshape(ids.shape)
    for_class = (said if lost else labels)[rows, None]
    agreement = (weights * (near == for_class)).sum(1) / weights.sum(1)
    order = np.argsort(np.where(weights.sum(1) <= LARGEST_SHARE, -agreement, 1.0), kind="stable")
    pairs = [(train.class_names.index(true), train.class_names.index(wrong)) for true, wrong in FAMOUS]
    famous = [place for pair in pairs for place in [i for i in order if (labels[rows[i]], said[rows[i]]) == pair][:1]]
    roses = []
    for place in [*famous, *(i for i in order if i not in famous)][: LOST if lost else ROSES]:
        row = int(rows[place])
        pair = int(labels[row]), int(said[row])
        roses.append(
            Rose(
                row=row,
                label=pair[0],
                said=pair[1],
                base=(float(base[row, pair[0]]), float(base[row, pair[1]])),
                corrected=(float(scores[row, pair[0]]), float(scores[row, pair[1]])),
                ids=tuple(ids[place].tolist()),
                labels=tuple(near[place].tolist()),
                weights=tuple(weights[place].tolist()),
            )
        )
    return tuple(roses)


def _images(say: Say, progress: bool) -> Path | None:
    """The folder with the images, downloaded if need be; None where they cannot be had."""
    if (folder := find_cifar100()) is not None:
        return folder
    say("CIFAR-100 is not on this machine; asking its publisher …")
    try:
        with progress_bar("downloading", 0, shown=progress) as advance:
            return download_cifar100(progress=lambda done, _: advance(done))
    except DataNotFound as error:
        say(f"{error}")
        say("Going on with the keys that ship with the package: the same table, but no pictures.")
        return None


def _from_images(folder: Path, say: Say, progress: bool) -> tuple[DemoResult, tuple[Cifar100, Cifar100]]:
    from residual_memory.demo.images import Images
    from residual_memory.models.torch import build_memory, observe
    from residual_memory.models.watching import fingerprint

    train, test = read_cifar100(folder, "train"), read_cifar100(folder, "test")
    choosing, final = shipped_network("resnet8-45000"), shipped_network("resnet8-50000")
    rows: list[Measured] = []
    for choice in (PLAIN, FINE):
        say(f"{choice.name}: choosing the setting on 5,000 held-out training images …")
        chosen = tuned_setting(choosing, train, choice, progress=progress)
        say(f"{choice.name}: {chosen.verdict}, with k = {chosen.best.n_neighbors}, T = {chosen.best.temperature:g}")
        say(f"{choice.name}: building the memory of all 50,000 training images …")
        name = f"resnet8-{choice.layer}-{choice.pool}x{choice.pool}-{fingerprint(final)['sha256'][:8]}"
        path = user_cache() / "demo" / name
        with build_memory(final, Images(train), path, **choice.options, verbose=progress) as memory:
            memory.save_setting(chosen.best.to_dict())
            seen = observe(final, Images(test), memory, verbose=progress)
            rows.append(measure(memory, seen, chosen.best, choice.name, chosen.best_memory_only))
            roses, lost = (find_roses(memory, seen, rows[-1], train, lost=lost) for lost in (False, True))
            held_out = _checked(memory, seen)
    data = "official images, settings chosen on 5,000 held-out training images"
    return DemoResult(tuple(rows), roses, lost, data, held_out, train.class_names, 0.0), (train, test)


def _from_keys(say: Say) -> DemoResult:
    shipped, settings = shipped_keys(), shipped_settings()[PLAIN.name]
    predictions = shipped.predictions()
    memory = Memory.create(dim=shipped.keys.shape[1], n_outputs=len(shipped.class_names))
    say("building the memory of 50,000 training images from their shipped keys …")
    memory.append(shipped.keys[:N_TRAIN], shipped.labels[:N_TRAIN], predictions[:N_TRAIN])
    rows = np.arange(N_TRAIN, len(shipped.keys))
    seen = Observations(rows, shipped.keys[rows], shipped.labels[rows], predictions[rows])
    setting, alone = (Setting.from_dict(settings[name]) for name in ("best", "best_memory_only"))
    row = measure(memory, seen, setting, PLAIN.name, alone)
    data = "shipped 8-bit keys, setting chosen earlier on 5,000 held-out training images"
    return DemoResult((row,), (), (), data, _checked(memory, seen), shipped.class_names, 0.0)
