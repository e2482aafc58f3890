"""A new memory from a stream of blocks: it is there, whole, or it is not there."""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from residual_memory.exchange.rows import Block
from residual_memory.memory import Memory, require_empty
from residual_memory.memory.format import Manifest
from residual_memory.memory.memory import begun
from residual_memory.memory.storage import Directory, part_of
from residual_memory.progress import Advance, progress_bar


def made(
    path: str | os.PathLike[str] | None,
    manifest: Manifest,
    blocks: Iterable[Block],
    *,
    as_stored: bool,
    n_rows: int,
    doing: str,
) -> Memory:
    """A memory of which the manifest is true, with the rows of all blocks, open for writing.

    Parameters
    ----------
    path : a new or empty directory; None keeps the memory in RAM.
    as_stored : whether the rows come from a memory of this metric.
    n_rows, doing : how many rows there are, and what is done with them, for the progress bar.

    Raises
    ------
    InvalidInput : if the path holds something already, or a block does not fit; nothing is there then.
    StorageFailure : if the disk refuses, likewise.
    """

    def fill(memory: Memory) -> None:
        with progress_bar(doing, n_rows) as advance:
            memory.extend(_arguments(blocks, advance), as_stored=as_stored)

    if path is None:
        memory = begun(None, manifest)
        fill(memory)
        return memory
    require_empty(path)
    part = part_of(Path(path).absolute())
    try:
        with begun(part, manifest) as memory:
            fill(memory)
        Directory(part).move(Path(path))
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return Memory.open(path, writable=True)


def _arguments(blocks: Iterable[Block], advance: Advance) -> Iterator[dict[str, Any]]:
    for block in blocks:
        yield block.arguments
        advance(len(block))
