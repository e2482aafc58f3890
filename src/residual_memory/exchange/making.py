"""A new memory from a stream of blocks: it is there, whole, or it is not there."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from residual_memory.exchange.rows import Block
from residual_memory.memory import Memory, require_empty
from residual_memory.memory.format import Manifest
from residual_memory.memory.memory import begun
from residual_memory.memory.storage import move, part_of


def made(path: str | os.PathLike[str] | None, manifest: Manifest, blocks: Iterable[Block]) -> Memory:
    """A memory of which the manifest is true, with the rows of all blocks, open for writing.

    Parameters
    ----------
    path : a new or empty directory; None keeps the memory in RAM.

    Raises
    ------
    InvalidInput : if the path holds something already, or a block does not fit; nothing is there then.
    StorageFailure : if the disk refuses, likewise.
    """
    rows = (block.arguments for block in blocks)
    if path is None:
        memory = begun(None, manifest)
        memory.extend(rows)
        return memory
    require_empty(path)
    part = part_of(Path(path).absolute())
    try:
        with begun(part, manifest) as memory:
            memory.extend(rows)
        move(part, Path(path))
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return Memory.open(path, writable=True)
