"""What lies beside the rows of an exported memory, so that an identical one can be made of them."""

from collections.abc import Collection, Iterable
from dataclasses import asdict, replace

from residual_memory.errors import CorruptFile
from residual_memory.memory.format import FORMAT, Manifest, canonical, checked_body

_CARRIED = "carried"


def description_of(manifest: Manifest, carried: Iterable[str]) -> bytes:
    """The manifest without its files, and the names of the columns of what rows carry.

    These are named since nothing else would tell that one is missing: a damaged name would free rows of their owners.
    """
    bare = replace(manifest, version=0, generation=0, segments=(), forgotten=None)
    return canonical({"format": FORMAT, **asdict(bare), _CARRIED: sorted(carried)})


def described_in(text: bytes, where: str, present: Collection[str]) -> Manifest:
    """The manifest in a description.

    Parameters
    ----------
    where : for messages.
    present : the columns that the file has.

    Raises
    ------
    UnsupportedFormat : if a newer library wrote it.
    CorruptFile : if it is not, to the byte, what was written, or names a column that is not there.
    """
    body = checked_body(text, where)
    carried = body.pop(_CARRIED, [])
    manifest = Manifest.from_bytes(canonical(body), where)
    if not isinstance(carried, list):
        raise CorruptFile(f"{where} is no description: {_CARRIED} is no list; export the memory again")
    if missing := [name for name in carried if name not in present]:
        raise CorruptFile(f"{where} is of rows that carry {missing[0]!r}, which are not there; export the memory again")
    return manifest
