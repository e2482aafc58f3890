"""The options that several commands share, and the checks that are worth making before any work."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from residual_memory.errors import DataNotFound, InvalidInput, MemoryNotFound, ResidualMemoryError
from residual_memory.memory import Memory

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, for programs.")]
MemoryPath = Annotated[Path, typer.Argument(metavar="MEMORY", help="Directory of the memory.", show_default=False)]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        help="Arrays (.npz, .parquet, .arrow, .feather, .safetensors, or a folder with keys.npy, labels.npy, "
        "predictions.npy), a folder of images in "
        "class subfolders, MODULE:NAME of a data set of (x, y), or text (.txt, blank lines between documents).",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:NAME",
        help="The torch model, or a function that makes it; for text also a folder of a transformers model; not needed "
        "for arrays.",
        show_default=False,
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="MODULE:NAME",
        help="For text: the tokenizer, or a folder of it; by default the model's folder.",
        show_default=False,
    ),
]
Length = Annotated[
    int | None,
    typer.Option(
        "--length", metavar="T", help="For text: tokens a window; by default 256, or what the model can read."
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", help="For text: tokens after which to stop.", show_default=False),
]
Autocast = Annotated[
    str | None, typer.Option("--autocast", metavar="TYPE", help="Run the model in bfloat16 or float16.")
]
TextAutocast = Annotated[
    str | None,
    typer.Option("--autocast", metavar="TYPE", help="For text: bfloat16 or float16, as the memory was built with."),
]
Outputs = Annotated[
    str,
    typer.Option("--outputs", metavar="KIND", help="What the model gives: logits, probabilities or log-probabilities."),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        metavar="N",
        help="Examples that the model sees at once; by default 256, of text what fits into 128 MiB of logits.",
        show_default=False,
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option("--image-size", metavar="H", help="Resize images to H × H.", show_default=False),
]
Index = Annotated[
    str,
    typer.Option("--index", metavar="SPEC", help="Search engine: auto, exact, or such as faiss:IVF1024,PQ64x4fs."),
]

OUTPUTS = ("logits", "probabilities", "log-probabilities")
AUTOCASTS = ("bfloat16", "float16")
DTYPES = ("float16", "float32", "float64")
MODEL_BATCH = 256


class Interrupted(ResidualMemoryError):
    """Ctrl-C in work that goes on only if the user says where."""


def chosen(option: str, value: str, allowed: Sequence[str]) -> str:
    """One of the allowed values.

    Raises
    ------
    InvalidInput : naming the close one, for another value.
    """
    if value in allowed:
        return value
    close = difflib.get_close_matches(value.lower(), allowed, 1, 0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InvalidInput(f"{option} is {value!r}, expected {' or '.join(map(repr, allowed))}{hint}")


def leave_out(why: str, given: Mapping[str, bool]) -> None:
    """Refuse, by their names, options that make no sense for the data."""
    if names := [name for name, there in given.items() if there]:
        raise InvalidInput(f"{why}; leave {' and '.join(names)} out")


def task_named(value: str | None) -> Literal["classification", "regression"] | None:
    """The task; None is left to the data."""
    if value is None:
        return None
    return cast(Literal["classification", "regression"], chosen("--task", value, ("classification", "regression")))


def open_memory(path: Path, *, writable: bool = False) -> Memory:
    """The memory at a path.

    Raises
    ------
    MemoryNotFound : naming a memory of a similar name, where there is one.
    """
    try:
        return Memory.open(path, writable=writable)
    except MemoryNotFound as error:
        raise MemoryNotFound(f"{error}{similar(path)}") from None


def similar(path: Path) -> str:
    """A question whether a neighbour of a mistyped path is meant."""
    try:
        names = [entry.name for entry in path.parent.iterdir()] if not path.exists() else []
    except OSError:
        names = []
    close = difflib.get_close_matches(path.name, names, 1)
    return f"; did you mean {str(path.parent / close[0])!r}?" if close else ""


def lines_of(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises
    ------
    DataNotFound : if there is no such file.
    """
    if not path.is_file():
        raise DataNotFound(f"there is no file {path}{similar(path)}")
    try:
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from None
