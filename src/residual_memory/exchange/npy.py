"""Arrays as numpy saves them: a folder of .npy files, or the members of an .npz."""

import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
from numpy import ndarray

from residual_memory.errors import CorruptFile, InvalidInput
from residual_memory.exchange.columns import ColumnRows, FileColumn, columns_of, opened
from residual_memory.exchange.description import described_in
from residual_memory.exchange.fields import Exported
from residual_memory.exchange.rows import BLOCK_BYTES, COLUMNS
from residual_memory.memory.attributes import ENDS, TEXTS
from residual_memory.memory.format import MAX_MANIFEST, Manifest

DESCRIPTION = "memory.json"  # the member with what makes an identical memory again
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the same memory gives the same bytes


def folder_rows(folder: Path) -> ColumnRows:
    """The files keys.npy, predictions.npy, … of a folder."""
    known = (*COLUMNS, *(name + ENDS for name in TEXTS))
    present = [name for name in known if (folder / f"{name}.npy").exists()]
    return ColumnRows(str(folder), columns_of(str(folder), present, lambda name: npy_file(folder / f"{name}.npy")))


def npz_rows(path: Path) -> ColumnRows:
    """The members of an .npz, compressed or not."""
    with opened(str(path), partial(zipfile.ZipFile, path)) as archive:
        for entry in archive.infolist():
            archive.open(entry).close()  # compares its two names: a changed one would hide the member
        members = {name.removesuffix(".npy") for name in archive.namelist()}
    columns = columns_of(str(path), members, partial(_member, path))
    manifest = _manifest(path, members) if DESCRIPTION in members else None
    return ColumnRows(str(path), columns, manifest)


def npy_file(path: Path) -> FileColumn:
    """The array of an .npy file.

    Raises
    ------
    CorruptFile : if it is no such file, or cut.
    """
    column = _npy(str(path), partial(open, path, "rb"))
    return _whole(column, path.stat().st_size)


def _member(path: Path, name: str) -> FileColumn:
    column = _npy(f"{path}:{name}", partial(_open_member, path, f"{name}.npy"))
    with opened(column.name, partial(zipfile.ZipFile, path)) as archive:
        return _whole(column, archive.getinfo(f"{name}.npy").file_size)


def _whole(column: FileColumn, size: int) -> FileColumn:
    if len(column) * column.row_bytes > size:
        raise CorruptFile(f"{column.name} ends too early: it announces the shape {column.shape}; save it again")
    return column


def _npy(name: str, open_file: Callable[[], Any]) -> FileColumn:
    with opened(name, open_file) as file:
        shape, dtype = _npy_header(file, name)
        return FileColumn(name, open_file, file.tell(), dtype, shape)


@contextmanager
def _open_member(path: Path, name: str) -> Iterator[Any]:
    with zipfile.ZipFile(path) as archive, archive.open(name) as member:
        yield _Member(member)


class _Member:
    """A member of an archive, read from its first byte on: after a seek, zipfile compares no checksum any more."""

    def __init__(self, member: Any) -> None:
        self.read, self.readinto, self.tell = member.read, member.readinto, member.tell

    def seek(self, place: int) -> None:
        while (left := place - self.tell()) > 0 and self.read(min(left, BLOCK_BYTES)):
            pass


def _manifest(path: Path, members: set[str]) -> Manifest:
    column = _member(path, DESCRIPTION)
    where = f"{path}:{DESCRIPTION}"
    if column.dtype.kind != "U" or column.shape != (1,) or column.row_bytes > 4 * MAX_MANIFEST:
        raise CorruptFile(f"{where} is {column.dtype} {column.shape}, expected one text; export the memory again")
    text = column.read()[0]
    try:
        return described_in(str(text).encode(), where, members)
    except UnicodeEncodeError as error:
        raise CorruptFile(f"{where} is no text: {error}; export the memory again") from None


def _npy_header(file: Any, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(file)
        if version not in read:
            raise ValueError(f"its version is {version}")
        shape, fortran, dtype = read[version](file)
    except (ValueError, SyntaxError, TokenError) as error:
        raise CorruptFile(f"{name} is not an array in .npy form: {error}; save it with numpy.save") from None
    if dtype.hasobject:
        raise InvalidInput(
            f"{name} holds Python objects, which are not read since they can run code; save a plain array of numbers"
        )
    if fortran and len(shape) > 1:
        raise InvalidInput(
            f"{name} is stored column by column and cannot be read row by row; save numpy.ascontiguousarray(array)"
        )
    return shape, dtype


# ---------------------------------------------------------------------- out


def write_npz(file: IO[bytes], exported: Exported) -> None:
    """The columns of a memory as the members of an .npz that is not compressed, block after block."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        text = np.array([exported.description.decode("ascii")])
        _write_member(archive, DESCRIPTION, text.dtype, text.shape, [text])
        for field in exported.fields:
            shape = (exported.n_rows, *field.shape)
            blocks = (field.take(rows).astype(field.dtype, copy=False) for rows in exported.row_blocks())
            _write_member(archive, field.name, field.dtype, shape, blocks)
        for carried in exported.texts:
            flat = (carried.take(rows).flat for rows in exported.row_blocks())
            _write_member(archive, carried.name, np.dtype(np.uint8), (carried.n_bytes,), flat)
            _write_member(archive, carried.name + ENDS, np.dtype(np.int64), (exported.n_rows,), exported.ends(carried))


def _write_member(
    archive: zipfile.ZipFile,
    name: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    blocks: Iterable[ndarray],
) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with archive.open(zipfile.ZipInfo(f"{name}.npy", _LONG_AGO), "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for block in blocks:
            member.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
