"""A model and its memory in one folder, with a card that says what they are: what `save_pretrained` writes.

The folder holds `memory/`, the base's weights (`model.safetensors`, or what transformers writes in `base/`),
`resmem.json` with how they are used and the checksums of the weights, and `README.md`, the card.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from residual_memory._version import __version__
from residual_memory.errors import (
    CorruptFile,
    DataNotFound,
    FingerprintMismatch,
    InvalidInput,
    StorageFailure,
    UnsupportedFormat,
)
from residual_memory.evaluation import Evaluation, Setting, summarize
from residual_memory.language import LanguageSetting, TokenScores
from residual_memory.memory import Memory
from residual_memory.memory.format import canonical, checked_body
from residual_memory.memory.storage import LOCK, RESERVE, Directory, Disk, part_of
from residual_memory.metrics import Estimate, mean_interval
from residual_memory.models.base import Source
from residual_memory.privacy import PrivacyReport

FORMAT = 1
OPTIONS, MEMORY, WEIGHTS, BASE, CARD = "resmem.json", "memory", "model.safetensors", "base", "README.md"
UNITS = {"accuracy": "accuracy, %", "log_loss": "log-loss, nats", "rmse": "RMSE"}

_Setting = TypeVar("_Setting", Setting, LanguageSetting)

# ---------------------------------------------------------------------- the card


@dataclass(frozen=True)
class Card:
    """What the readers of a model card should know beside what the memory says itself.

    All of it is plain text. The card is a file like any other and may be edited once it is written.

    Attributes
    ----------
    title : of the card.
    base : which model it is, and where it comes from.
    data : what the memory was built from.
    evaluations : by the name of the held-out data, what `tune`, `evaluate` or `ResMemForCausalLM.score` found on them.
    privacy : what `audit_privacy` found.
    license : an identifier of SPDX, such as "apache-2.0".
    """

    title: str = "A model with a residual memory"
    base: str = ""
    data: str = ""
    evaluations: Mapping[str, Evaluation | TokenScores] = field(default_factory=dict)
    privacy: PrivacyReport | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        if self.license is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", self.license):
            raise InvalidInput(f"license is {self.license!r}, expected an identifier of SPDX such as 'apache-2.0'")

    def text(self, memory: Memory, setting: Setting | LanguageSetting, *, base_class: str, example: str) -> str:
        """The card in Markdown, with what the Hugging Face hub reads at its top.

        Parameters
        ----------
        memory, setting : of the model.
        base_class : of the base.
        example : code that uses the folder.
        """
        layout = memory.layout
        source = None if memory.source is None else Source.from_dict(memory.source)
        front = ["library_name: residual-memory", "tags:", "- residual-memory", f"- {layout.task}"]
        front += [f"license: {self.license.lower()}"] if self.license else []
        facts = {
            "base": self.base or "not said",
            "class of the base": base_class,
            "data of the memory": self.data or "not said",
            "keys": f"{layout.dim} numbers, {layout.key_dtype}, {layout.metric}",
            "layer of the keys": "not said" if source is None else f"{source.side} of {source.layer}",
            "predictions": f"{layout.n_outputs:,} outputs, {layout.residuals}, {layout.prediction_dtype}",
            "rows": f"{len(memory):,}",
            "size of the memory": f"{memory.n_bytes / 1e6:,.1f} MB",
            "neighbours (k)": f"{setting.n_neighbors}",
        }
        lines = [
            *("---", *front, "---", "", f"# {_plain(self.title)}", ""),
            "A trained model and a memory of what it could not learn: a prediction is the model's own plus the "
            "weighted residuals of the nearest memories (ResMem, Yang et al., NeurIPS 2023).",
            "",
            *_table(("", ""), list(facts.items())),
            *("", "```python", "import residual_memory as rm", "", example, "```", "", "## Figures", ""),
            *_figures(self.evaluations),
            *("", "## Privacy", "", _carried(memory), ""),
            "How well that can be told was not measured; `audit_privacy` does it."
            if self.privacy is None
            else f"Measured: {_attacks(self.privacy)}.",
            *("", f"Written by residual-memory {__version__}."),
        ]
        return "\n".join(lines) + "\n"


def _figures(evaluations: Mapping[str, Evaluation | TokenScores]) -> list[str]:
    if not evaluations:
        return ["None were given, so nothing is said of what the memory gains."]
    header = ("held-out data", "metric", "base", "memory alone", "corrected", "gain", "rows")
    rows = [(name, *row) for name, found in evaluations.items() for row in _rows(found)]
    verdicts = [f"- On {_plain(name)}: {found.verdict}" for name, found in evaluations.items()]
    return [*_table(header, rows), "", "Intervals are of 95 %, that of the gain paired by row.", "", *verdicts]


def _rows(found: Evaluation | TokenScores) -> list[tuple[str, ...]]:
    """Metric, base, memory alone, corrected, gain and number of rows."""
    if isinstance(found, Evaluation):
        return [_row(found.metric, found.n_rows, found.base, found.memory_only, found.corrected, found.gain)]
    hits = (found.base_hit, found.memory_hit, found.corrected_hit)
    base, alone, corrected = (1.0 - hit for hit in hits)
    accuracy = summarize("accuracy", base=base, memory_only=alone, corrected=corrected, groups=found.documents)
    losses = [mean_interval(loss, found.documents) for loss in (found.base_loss, found.corrected_loss)]
    return [*_rows(accuracy), _row("log_loss", len(found), losses[0], None, losses[1], found.log_loss_gain)]


def _row(metric: str, n_rows: int, *figures: Estimate | None) -> tuple[str, ...]:
    scale = 100 if metric == "accuracy" else 1
    shown = ["–" if some is None else f"{scale * some.value:.4g} ± {scale * some.margin:.2g}" for some in figures]
    return (UNITS[metric], *shown, f"{n_rows:,}")


def _carried(memory: Memory) -> str:
    found = memory.inventory()
    further = {
        "groups": found.groups > 0,
        "owners": any(found.owners),
        "tags": any(found.tags),
        "snippets": found.snippets > 0,
    }
    names = ["keys", "labels", "predictions", "ids", *(name for name, there in further.items() if there)]
    return (
        f"Memorizing rows is the method: whoever has this folder has the {', '.join(names)} of every row, and whoever "
        "may ask the model can tell to some degree which rows are in it."
    )


def _attacks(report: PrivacyReport) -> str:
    near = report.auc_nearest
    return f"{report.verdict}; with AUC {near.value:.3f} ± {near.margin:.3f} where neighbours may be asked for"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(map(_plain, cells))} |" for cells in (header, *rows)]
    return [lines[0], f"|{'---|' * len(header)}", *lines[1:]]


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return re.sub(r"([\\`*_\[\]#|~!$])", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


# ---------------------------------------------------------------------- writing


@contextmanager
def saving(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write to, which takes its name, durably, when all of it is there; until then nothing is.

    Raises
    ------
    InvalidInput : if there is something already under the name.
    StorageFailure : if the disk refuses.
    """
    path = Path(folder).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InvalidInput(f"{folder} already exists and is not empty; name another folder")
    part = part_of(path)
    directory = Directory(part)
    try:
        directory.make()
        yield part
        _flush(part)
        directory.move(path)
    except OSError as error:
        if isinstance(error, StorageFailure):
            raise
        raise StorageFailure(error.errno, f"{folder}: {error.strerror}; nothing was saved") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _flush(folder: Path) -> None:
    disk = Disk()
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            disk.sync_folder(path)
        else:
            with disk.open(path) as file:
                disk.sync(file)


def save_memory(memory: Memory, folder: Path) -> Memory:
    """A copy of the rows that are not forgotten, closed, without the files that only a writer needs."""
    copy = memory.copy(folder / MEMORY)
    copy.close()
    for name in (LOCK, RESERVE):
        (folder / MEMORY / name).unlink(missing_ok=True)
    return copy


def write_options(folder: Path, kind: str, options: Mapping[str, Any]) -> None:
    """How model and memory are used, and the length and SHA-256 of each file of the model, as JSON."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_relative_to(folder / MEMORY)]
    files = {path.relative_to(folder).as_posix(): [path.stat().st_size, _digest(path)] for path in paths}
    body = {"format": FORMAT, "kind": kind, "library": __version__, "files": files, "options": options}
    (folder / OPTIONS).write_bytes(canonical(body))


def with_measured(setting: _Setting, bandwidth: float, n_rows: int) -> _Setting:
    """A setting whose bandwidth is the number that was measured, where one was."""
    return replace(setting, bandwidth=bandwidth) if n_rows > 1 else setting


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Saved:
    """A folder that `save_pretrained` made.

    Attributes
    ----------
    path : of the folder.
    kind : the class that saved it.
    files : length and SHA-256 of each file of the model.
    options : how model and memory are used.
    """

    path: Path
    kind: str
    files: Mapping[str, tuple[int, str]]
    options: Mapping[str, Any]

    @staticmethod
    def at(folder: str | os.PathLike[str]) -> "Saved":
        """Read what a folder is.

        Raises
        ------
        DataNotFound : if there is no such folder, or `save_pretrained` did not make it.
        InvalidInput : if it is of links to files.
        UnsupportedFormat : if a newer version of the library wrote it.
        CorruptFile : if `resmem.json` is not what was written.
        """
        path = Path(folder)
        file = path / OPTIONS
        if not file.is_file():
            raise DataNotFound(
                f"{folder} holds no {OPTIONS}; name a folder that save_pretrained made, or fetch it first: "
                "hf download REPOSITORY --local-dir FOLDER"
            )
        if file.is_symlink():
            raise InvalidInput(
                f"{file} is a link, as in the cache of the Hugging Face hub, expected a file; "
                "fetch the folder with hf download REPOSITORY --local-dir FOLDER"
            )
        body = checked_body(file.read_bytes(), str(file))
        number = body.get("format")
        if isinstance(number, int) and number > FORMAT:
            raise UnsupportedFormat(
                f"{file} is of format {number}, written by residual-memory {body.get('library')}, and this version "
                f"reads up to {FORMAT}; upgrade to read it"
            )
        try:
            files = {str(name): (int(length), str(digest)) for name, (length, digest) in body["files"].items()}
            return Saved(path, str(body["kind"]), files, dict(body["options"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptFile(f"{file} cannot be used: {error!r}") from error

    @staticmethod
    def by(kind: str, folder: str | os.PathLike[str], *, verify: bool) -> "Saved":
        """A folder that this class saved, whose model files are there.

        Parameters
        ----------
        kind : the class.
        verify : look at every byte of them, and not at their lengths alone.

        Raises
        ------
        InvalidInput : if another class saved it.
        CorruptFile : if a file is missing, cut or changed.
        """
        saved = Saved.at(folder)
        if saved.kind != kind:
            raise InvalidInput(f"{folder} was saved by {saved.kind}; read it with {saved.kind}.from_pretrained")
        for name, (length, digest) in saved.files.items():
            file = saved.path / name
            found = file.stat().st_size if file.is_file() else None
            if found != length:
                what = "is missing" if found is None else f"has {found:,} bytes, expected {length:,}"
                raise CorruptFile(f"{file} {what}; fetch the folder again")
            if verify and _digest(file) != digest:
                raise CorruptFile(f"{file} is damaged: its bytes are not those that were saved; fetch the folder again")
        return saved

    def check_base(self, found: Mapping[str, Any], *, names: Sequence[str] = ("class", "sha256")) -> None:
        """Refuse another base than the one that was saved.

        Parameters
        ----------
        found : fingerprint of the base.
        names : what of it must be the same.

        Raises
        ------
        FingerprintMismatch : if it is another one.
        """
        for name in names:
            if (was := self.options["model"][name]) != found[name]:
                raise FingerprintMismatch(
                    f"{self.path} was saved with a base of {name} {was!r}, but this one's is {found[name]!r}; "
                    "use the model that it was saved with"
                )

    def memory(self, *, writable: bool, verify: bool) -> Memory:
        """Its memory, opened."""
        return Memory.open(self.path / MEMORY, writable=writable, verify=verify)
