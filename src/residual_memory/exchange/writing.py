"""A memory into one file that other tools read."""

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from residual_memory.errors import InvalidInput
from residual_memory.exchange.arrow import write_arrow, write_parquet
from residual_memory.exchange.fields import Exported
from residual_memory.exchange.npy import write_npz
from residual_memory.exchange.safetensors import write_safetensors
from residual_memory.memory import Memory
from residual_memory.memory.storage import whole_file
from residual_memory.progress import progress_bar

WRITERS: dict[str, Callable[[IO[bytes], Exported], None]] = {
    ".npz": write_npz,
    ".parquet": write_parquet,
    ".arrow": write_arrow,
    ".feather": write_arrow,
    ".safetensors": write_safetensors,
}


def export_memory(memory: Memory, path: str | os.PathLike[str], *, overwrite: bool = False) -> int:
    """Write all rows that are not forgotten to one file, with what makes an identical memory of them.

    The file has the columns keys, labels, predictions (of top-m memories indices, probabilities and rest), ids, groups,
    and owners, expires, tags and snippets where a row has one; in Arrow and Parquet some are called label, id, group,
    owner and snippet. Values are those that are stored, in their types, but for probabilities on a log scale, which are
    decoded. Rows go out block by block: the memory may be larger than
    the RAM. The file appears under its name when it is whole and on the disk.

    Parameters
    ----------
    path : ends in .npz, .parquet, .arrow, .feather or .safetensors, which says what is written.
    overwrite : take the place of a file that is there.

    Returns
    -------
    How many rows the file holds.

    Raises
    ------
    InvalidInput : if the name ends in something else, the folder is missing, something is there already, or a row
        expires in a year that Parquet cannot say.
    MissingExtra : if Arrow or Parquet is asked for without pyarrow.
    StorageFailure : if the disk refuses; nothing is left, and a file that was there before still is.

    Examples
    --------
    >>> import tempfile
    >>> memory = Memory.create(dim=2, n_outputs=2)
    >>> ids = memory.append([[0.0, 0.0], [1.0, 1.0]], [0, 1], [[0.9, 0.1], [0.8, 0.2]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_memory(memory, f"{folder}/rows.npz")
    2
    """
    target = Path(path)
    write = writer_for(target, overwrite=overwrite)
    exported = Exported(memory)
    n_steps = exported.n_rows * (len(exported.fields) + len(exported.texts))
    with whole_file(target) as file, progress_bar("exporting", n_steps) as advance:
        exported.advance = advance
        write(file, exported)
    return exported.n_rows


def writer_for(target: Path, *, overwrite: bool) -> Callable[[IO[bytes], Exported], Any]:
    """What writes a file of this name, if it may be written.

    Raises
    ------
    InvalidInput : if not.
    """
    suffix = target.suffix.lower()
    if suffix not in WRITERS:
        close = difflib.get_close_matches(suffix, WRITERS, 1, 0.5)
        hint = f"; is {close[0]!r} meant?" if close else ""
        raise InvalidInput(f"{target} ends in {suffix!r}, expected {', '.join(WRITERS)}{hint}")
    if not target.absolute().parent.is_dir():
        raise InvalidInput(f"{target} cannot be written: there is no folder {target.absolute().parent}; make it first")
    if target.is_dir() or (target.exists() and not overwrite):
        raise InvalidInput(f"{target} is there already; name another file, or ask to overwrite it")
    return WRITERS[suffix]
