"""`--out FILE.html`: the report of a run, and what is checked before the run begins."""

import datetime
import platform
import shlex
import subprocess
import tempfile
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated

import typer

from residual_memory.errors import InvalidInput, StorageFailure

Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE.html", help="Write a report with pictures.", show_default=False),
]
ShownExamples = Annotated[
    str | None,
    typer.Option(
        "--examples",
        metavar="DATA",
        help="For the report: what the memory was built from, to be shown: a folder of images or MODULE:NAME.",
        show_default=False,
    ),
]
COMMAND_LINE: ContextVar[tuple[str, ...]] = ContextVar("COMMAND_LINE", default=())  # what `main` runs
CROSS_FITTED = (
    "The figures are cross-fitted: no row is measured with a setting that it chose. resmem evaluate --out shows rows "
    "and where the gain comes from, on data that chose nothing."
)


def check_out(out: Path | None) -> None:
    """See that the report can be written, before any work.

    Raises
    ------
    InvalidInput : if there is no such folder, or the file is one.
    StorageFailure : if the folder takes no file.
    MissingExtra : if the packages of a report are not installed.
    """
    if out is None:
        return
    folder = out.absolute().parent
    if not folder.is_dir():
        raise InvalidInput(f"--out is {out}, but there is no folder {out.parent}; make it first")
    if out.is_dir():
        raise InvalidInput(f"--out is {out}, which is a folder; name a file in it")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StorageFailure(f"--out is {out}, but {folder} takes no file: {error}; name another folder") from error
    import residual_memory.reports.page  # noqa: F401  says what is missing


def provenance(data: str) -> tuple[tuple[str, str], ...]:
    """Where the figures come from: data, command, commit of the directory, machine and time."""
    commit = _commit()
    return (
        ("data", data),
        ("command", shlex.join(["resmem", *COMMAND_LINE.get()])),
        *((("commit", commit),) if commit else ()),
        ("machine", f"{platform.machine()}, Python {platform.python_version()}"),
        ("made", datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="minutes")),
    )


def _commit() -> str | None:
    """Of the current directory, with whether files differ from it; None outside of git."""
    try:
        told = [
            subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return told[0] + (", with changes" if told[1] else "")
