"""A build in parts: rows cut into ranges, a memory of each, and the one memory that they make."""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from residual_memory.errors import FingerprintMismatch, InvalidInput, StorageFailure
from residual_memory.memory import Memory
from residual_memory.memory.joining import joined
from residual_memory.memory.storage import PART, Directory, part_of
from residual_memory.models.base import Source

PART_NAME = r"rows-(\d{12,})-(\d{12,})"


def join_parts(parts: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> Memory:
    """One memory of the parts of a build, in the order of their rows.

    On one file system no row is copied. The parts stay as they are, and may be removed afterwards.

    Parameters
    ----------
    parts : directories of what `build_memory` made with ``part=range(first, end)``, in any order; together they hold
        each row once.
    path : a new or empty directory.

    Returns
    -------
    The memory, open for writing, the same as if it had been built in one go.

    Raises
    ------
    InvalidInput : if a part was not built to its end, or rows are missing or there twice; nothing is there then.
    FingerprintMismatch : if the parts are of different models, layers or data.
    StorageFailure : if the disk refuses.
    """
    found = sorted(((_source_of(part), part) for part in parts), key=lambda pair: pair[0].part or ())
    if not found:
        raise InvalidInput("there are no parts to join; name at least one")
    wanted, first = found[0]
    for source, part in found[1:]:
        if source.whole != wanted.whole:
            raise FingerprintMismatch(
                f"the part at {part} has another source than the one at {first}; "
                "join parts of one model, layer and data set"
            )
    _check_complete([source.part for source, _ in found if source.part is not None])
    return joined(path, [part for _, part in found], source=wanted.whole.to_dict())


def _source_of(path: str | os.PathLike[str]) -> Source:
    source = Memory.open(path).source
    if source is None or "part" not in source.get("data", {}):
        raise InvalidInput(f"{path} holds no part; build it with build_memory(…, part=range(first, end))")
    found = Source.from_dict(source)
    if not found.complete:
        raise InvalidInput(f"the part at {path} was not built to its end; build it again with the same arguments")
    return found


def _check_complete(parts: Sequence[tuple[int, int, int]]) -> None:
    """Refuse parts that do not hold each row once."""
    end, n_rows = 0, parts[0][2]
    for first, after, _ in [*parts, (n_rows, n_rows, n_rows)]:
        if first != end:
            what = f"rows {end:,} to {first:,} are in no part" if first > end else f"row {first:,} is in two parts"
            raise InvalidInput(f"{what} of the {n_rows:,} rows; join parts that hold each row once")
        end = after


# ---------------------------------------------------------------------- a folder of parts


def folder_of(path: Path) -> Path:
    """Where the parts of a memory lie while it is built: beside it."""
    return path.with_name(f"{path.name}.parts")


def place_of(folder: Path, rows: range) -> Path:
    """The directory of a part."""
    return folder / f"rows-{rows.start:012d}-{rows.stop:012d}"


def whole_parts(folder: Path) -> list[range]:
    """The rows of the parts that are there, ascending."""
    found = (re.fullmatch(PART_NAME, name) for name in Directory(folder).names())
    return sorted((range(int(named[1]), int(named[2])) for named in found if named), key=lambda rows: rows.start)


def planned(folder: Path, n_rows: int, n_parts: int, step: int) -> list[range]:
    """Ranges that cover all rows: those of the parts that are there, and between them others of about one length.

    Parameters
    ----------
    step : new ranges are a multiple of it long, so that rows pass through the model in the same batches as in one go.
    """
    length = -(-n_rows // (n_parts * step)) * step
    there = whole_parts(folder)
    ranges: list[range] = []
    end = 0
    for known in [*there, range(n_rows, n_rows)]:
        ranges += [range(first, min(first + length, known.start)) for first in range(end, known.start, length)]
        ranges += [known] if len(known) else []
        end = known.stop
    return ranges


def make_part(folder: Path, rows: range, build: Callable[[Path], Memory]) -> None:
    """Have a part there, whole, once, whoever else may be making it.

    Parameters
    ----------
    build : makes the memory of the rows in a new directory; on one that is whole it looks whether that fits.
    """
    home = place_of(folder, rows)
    if home.exists():
        build(home).close()
        return
    unfinished = part_of(home)
    try:
        build(unfinished).close()
        Directory(unfinished).move(home)
    except StorageFailure:
        if not home.exists():  # nobody was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def unfinished_in(folder: Path, name: str) -> list[Path]:
    """What killed processes began in a folder and never finished.

    Parameters
    ----------
    name : a pattern of the name that it would have got.
    """
    hidden = re.compile(rf"\.{name}-[0-9a-f]{{8}}{re.escape(PART)}")
    return [folder / found for found in Directory(folder).names() if hidden.fullmatch(found)]
