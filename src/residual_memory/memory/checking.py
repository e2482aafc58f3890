"""Whether the bytes on disk are those that were written."""

import os
from dataclasses import dataclass

from residual_memory.errors import MemoryNotFound, ResidualMemoryError
from residual_memory.memory.format import COPY, MANIFEST, MAX_MANIFEST, Manifest
from residual_memory.memory.reading import forgotten_of, rows_of
from residual_memory.memory.saved import check_parts
from residual_memory.memory.storage import Directory


@dataclass(frozen=True)
class Problem:
    """Something wrong with a file of a memory."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file} {self.what}"


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Attributes
    ----------
    ok : nothing is wrong with the memory.
    problems : file and place of each damage.
    n_files, n_bytes : what was looked at; bytes that a fast check passes over are not counted.
    ignored : damage of a saved index, which is passed over and built again, or of the manifest's copy, which the next
        change writes anew: the memory is whole without them.
    full : whether every byte was compared.
    """

    problems: tuple[Problem, ...]
    n_files: int
    n_bytes: int
    ignored: tuple[Problem, ...] = ()
    full: bool = True

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(path: "str | os.PathLike[str] | Directory", *, fast: bool = False) -> VerifyReport:
    """Compare a memory on disk with what was written, whether or not it can still be opened.

    Parameters
    ----------
    path : its directory.
    fast : look at the manifest, at which files there are, at their lengths and headers, and not at every byte.

    Raises
    ------
    MemoryNotFound : if there is no memory at the path.
    """
    directory = Directory.at(path)
    if not directory.exists():
        raise MemoryNotFound(f"there is no memory at {path}")
    try:
        content = directory.read(MANIFEST, MAX_MANIFEST)
        manifest = Manifest.from_bytes(content, str(directory.path / MANIFEST))
    except ResidualMemoryError as error:
        return VerifyReport((Problem(MANIFEST, f"cannot be read: {error}"),), 1, 0, full=not fast)
    records = manifest.files()
    if fast:
        return VerifyReport(tuple(wrong_headers(directory, manifest)), 1 + len(records), len(content), full=False)
    derived = [*check_parts(directory), *_check_copy(directory, content)]
    n_bytes = len(content) + sum(record.length for record in records) + sum(length for _, length, _ in derived)
    ignored = tuple(Problem(name, what) for name, _, what in derived if what is not None)
    return VerifyReport(tuple(damage(directory, manifest)), 1 + len(records) + len(derived), n_bytes, ignored)


def _check_copy(directory: Directory, manifest: bytes) -> list[tuple[str, int, str | None]]:
    length = directory.length(COPY)
    if length is None:
        return []
    same = directory.holds(COPY, manifest)
    return [(COPY, length, None if same else "is no copy of the manifest, or of an earlier one")]


def damage(directory: Directory, manifest: Manifest) -> list[Problem]:
    """Every place in which a file of the memory differs from what was written."""
    found = directory.check_all(manifest.files())
    return [Problem(name, damage.what) for name, damages in found.items() for damage in damages]


def wrong_headers(directory: Directory, manifest: Manifest) -> list[Problem]:
    """Each file that is missing, of another length, or whose header does not describe what the manifest says."""
    problems = []
    for segment in (*manifest.segments, *([manifest.forgotten] if manifest.forgotten else [])):
        try:
            if segment is manifest.forgotten:
                forgotten_of(directory, manifest)
            else:
                rows_of(directory, manifest, segment)
        except ResidualMemoryError as error:
            problems.append(Problem(segment.file.name, f"cannot be read: {error}"))
    return problems
