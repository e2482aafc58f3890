"""A model and its memory in one folder, with a card that says what they are: what `save_pretrained` writes.

The folder holds `memory/`, the base's weights, `resmem.json` with how they are used, and `README.md`, the card.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from residual_memory._version import __version__
from residual_memory.errors import CorruptFile, DataNotFound, InvalidInput, UnsupportedFormat
from residual_memory.evaluation import Evaluation
from residual_memory.memory import Memory
from residual_memory.models.base import Source
from residual_memory.privacy import PrivacyReport

FORMAT = 1
OPTIONS, MEMORY, WEIGHTS, BASE, CARD = "resmem.json", "memory", "model.safetensors", "base", "README.md"
UNITS = {"accuracy": "%", "log_loss": "nats", "rmse": ""}


@dataclass(frozen=True)
class Card:
    """What a reader of a model card should know, beside what the memory says itself.

    Attributes
    ----------
    title : of the card.
    base : which model it is, and where it comes from.
    data : what the memory was built from.
    evaluations : by the name of the data that was held out.
    privacy : what `audit_privacy` found.
    license : an identifier of SPDX.
    notes : anything else, in Markdown.
    """

    title: str = "A model with a residual memory"
    base: str = ""
    data: str = ""
    evaluations: Mapping[str, Evaluation] | None = None
    privacy: PrivacyReport | None = None
    license: str | None = None
    notes: str = ""

    def text(self, memory: Memory, setting: Mapping[str, Any], *, kind: str, example: str) -> str:
        """The card in Markdown, with what hubs read at its top.

        Parameters
        ----------
        memory, setting : of the model.
        kind : the class that reads the folder.
        example : code that uses it.
        """
        layout, source = memory.layout, memory.source
        layer = "" if source is None else f"{Source.from_dict(source).side} of `{Source.from_dict(source).layer}`"
        front = ["library_name: residual-memory", f"tags: [residual-memory, {layout.task}]"]
        front += [f"license: {self.license}"] if self.license else []
        facts = {
            "base model": self.base or "not said",
            "data of the memory": self.data or "not said",
            "layer of the keys": layer or "filled from arrays",
            "rows": f"{len(memory):,}",
            "key": f"{layout.dim} numbers, {layout.key_dtype}, {layout.metric}",
            "predictions": f"{layout.n_outputs} outputs, {layout.residuals}, {layout.prediction_dtype}",
            "neighbours (k)": str(setting.get("n_neighbors")),
            "size of the memory": f"{memory.n_bytes / 1e6:,.1f} MB",
        }
        lines = ["---", *front, "---", "", f"# {self.title}", ""]
        lines += [
            "A trained model and a memory of what it could not learn: predictions are the model's own plus the "
            "weighted residuals of the nearest memories (ResMem, Yang et al., NeurIPS 2023). Read it with "
            "residual-memory.",
            "",
            *_table(("", ""), facts.items()),
            "",
            "```python",
            example,
            "```",
            "",
            "## Figures",
            "",
            *self._figures(),
            "",
            "## Privacy",
            "",
            *self._privacy(),
        ]
        lines += ["", self.notes] if self.notes else []
        lines += ["", f"Written by residual-memory {__version__} ({kind})."]
        return "\n".join(lines) + "\n"

    def _figures(self) -> list[str]:
        if not self.evaluations:
            return ["Not measured: pass `evaluations` when saving."]
        rows = []
        for name, found in self.evaluations.items():
            scale = 100 if found.metric == "accuracy" else 1
            figures = [
                f"{scale * part.value:.4g} ± {scale * part.margin:.2g}"
                for part in (found.base, found.memory_only, found.corrected, found.gain)
            ]
            unit = UNITS[found.metric]
            rows.append((name, f"{found.metric}{f', {unit}' if unit else ''}", *figures, f"{found.n_rows:,}"))
        header = ("held-out data", "metric", "base", "memory alone", "corrected", "gain", "rows")
        verdicts = [f"{name}: {found.verdict}." for name, found in self.evaluations.items()]
        return [*_table(header, rows), "", "Intervals are of 95 %, of the gain paired by row.", "", *verdicts]

    def _privacy(self) -> list[str]:
        told = [
            "Memorizing rows is the method: whoever has this folder has their keys, labels and predictions, and "
            "whoever may ask the model can tell to some degree which rows are in it.",
        ]
        if self.privacy is None:
            return [*told, "How well was not measured: `audit_privacy` does it."]
        return [*told, "", f"Measured: {self.privacy.verdict}."]


def _table(header: tuple[str, ...], rows: Any) -> list[str]:
    return [
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows),
    ]


@contextmanager
def saving(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write to, which takes its name when all of it is there.

    Raises
    ------
    InvalidInput : if there is something already under the name.
    """
    path = Path(folder).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InvalidInput(f"{folder} already exists and is not empty; name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield part
        part.chmod(0o755)
        if path.exists():
            path.rmdir()
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_options(folder: Path, kind: str, options: Mapping[str, Any]) -> None:
    """How model and memory are used, as JSON."""
    body = {"format": FORMAT, "kind": kind, "library": __version__, **options}
    (folder / OPTIONS).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def read_options(folder: str | os.PathLike[str], kind: str) -> tuple[Path, dict[str, Any]]:
    """A saved folder and its options; what is no folder is looked for on the hub.

    Parameters
    ----------
    folder : or the name of a repository of the Hugging Face hub.
    kind : the class that reads it.

    Raises
    ------
    DataNotFound : if there is no such folder, or the hub does not have it.
    InvalidInput : if another class wrote it.
    UnsupportedFormat : if a newer version of the library did.
    CorruptFile : if it cannot be read.
    """
    path = Path(folder)
    if not path.is_dir():
        path = _from_hub(str(folder))
    file = path / OPTIONS
    if not file.is_file():
        raise DataNotFound(f"{folder} holds no {OPTIONS}; name a folder that save_pretrained made")
    try:
        options = json.loads(file.read_text(encoding="utf-8"))
        number, written_by = options.pop("format"), options.pop("kind")
        library = options.pop("library")
    except (ValueError, KeyError, AttributeError) as error:
        raise CorruptFile(f"{file} cannot be read: {error!r}") from error
    if not isinstance(number, int) or number > FORMAT:
        raise UnsupportedFormat(
            f"{file} is of format {number}, written by residual-memory {library}; upgrade to read it"
        )
    if written_by != kind:
        raise InvalidInput(f"{folder} was saved by {written_by}; read it with {written_by}.from_pretrained")
    return path, options


def kind_of(folder: str | os.PathLike[str]) -> str:
    """Which class saved a folder.

    Raises
    ------
    DataNotFound : if none did.
    CorruptFile : if it cannot be read.
    """
    file = Path(folder) / OPTIONS
    if not file.is_file():
        raise DataNotFound(f"{folder} holds no {OPTIONS}; name a folder that save_pretrained made")
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["kind"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{file} cannot be read: {error!r}") from error


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise DataNotFound(f"there is no folder {name}; install huggingface_hub to ask the hub for it") from None
    try:
        return Path(snapshot_download(name))
    except (OSError, HFValidationError, ValueError) as error:
        raise DataNotFound(f"there is no folder {name}, and the hub does not give it: {error}") from error
