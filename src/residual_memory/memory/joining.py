"""One memory of several without copying a row: their files get a second name, and one manifest names them all."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from residual_memory.errors import DimensionMismatch, DuplicateId, InvalidInput
from residual_memory.memory.format import MANIFEST, Manifest, Segment
from residual_memory.memory.lookup import SegmentIds, all_ascending
from residual_memory.memory.memory import Memory, described, now, require_empty
from residual_memory.memory.snapshot import Snapshot
from residual_memory.memory.storage import Directory, part_of

_WIDTHS = ("dim", "n_outputs", "top_m")


def joined(
    path: "str | os.PathLike[str] | Directory",
    parts: "Sequence[str | os.PathLike[str] | Directory]",
    *,
    source: Mapping[str, Any] | None = None,
) -> Memory:
    """A new memory with the rows of several memories on disk, in order; those stay as they are.

    On one file system no row is read or written: the files get a second name, and what is removed of the parts later
    stays in the whole. Elsewhere they are copied and compared. A process that is killed, or a power loss, leaves the
    parts alone, or the parts and the whole memory; what was begun then lies beside it under a hidden name.

    Parameters
    ----------
    path : a new or empty directory.
    parts : of one layout, with the same class names, none of whose rows is forgotten; ids differ over all of them.
    source : of the new memory; None takes none.

    Returns
    -------
    The memory, open for writing.

    Raises
    ------
    InvalidInput, DimensionMismatch, DuplicateId : if the parts do not fit together; nothing is there then.
    StorageFailure : if the disk refuses, likewise.
    """
    target = Directory.at(path)
    require_empty(target.path)
    if not parts:
        raise InvalidInput("there are no parts to join; name at least one")
    homes = [Directory.at(part) for part in parts]
    snapshots = [Memory.open(home).snapshot for home in homes]
    manifest = _without_rows(homes, snapshots, source)
    unfinished = part_of(target.path.absolute())
    part = target.beside(unfinished)
    try:
        part.make()
        segments: list[Segment] = []
        for home, snapshot in zip(homes, snapshots, strict=True):
            for segment in snapshot.manifest.segments:
                name = f"rows-{1:08d}-{len(segments):08x}.safetensors"
                segments.append(Segment(part.take_over(home, segment.file, name), segment.n_rows))
        rows = sum(segment.n_rows for segment in segments)
        part.replace(MANIFEST, manifest.with_changes("append", rows, now(), segments=tuple(segments)).to_bytes())
        part.move(target.path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return Memory.open(target, writable=True)


def _without_rows(
    homes: Sequence[Directory], snapshots: Sequence[Snapshot], source: Mapping[str, Any] | None
) -> Manifest:
    """What is true of the whole before it has rows, after making sure that the parts fit together."""
    manifests = [snapshot.manifest for snapshot in snapshots]
    names = [f"the part at {home.path}" for home in homes]
    for manifest, name in zip(manifests[1:], names[1:], strict=True):
        check_same(manifests[0], names[0], manifest, name)
    check_kinds(manifests, names, ("id_kind", "group_kind"))
    for snapshot, name in zip(snapshots, names, strict=True):
        if len(snapshot.forgotten):
            raise InvalidInput(f"{name} holds {len(snapshot.forgotten):,} forgotten rows; compact it first")
    tables = [table for snapshot in snapshots for table in snapshot.tables]
    if not all_ascending([SegmentIds(table["ids"]) for table in tables]):
        values, counts = np.unique(np.concatenate([table["ids"] for table in tables]), return_counts=True)
        if len(twice := values[counts > 1]):
            raise DuplicateId(f"{len(twice):,} ids are in two parts, for example {twice[0].item()!r}")
    options = {**vars(manifests[0].layout), "class_names": manifests[0].class_names, "source": source}
    known = {name: first_known(manifests, name) for name in ("id_kind", "group_kind", "top_m")}
    return replace(described(**options), next_id=max(manifest.next_id for manifest in manifests), **known)


def first_known(manifests: Sequence[Manifest], name: str) -> Any:
    """What the first manifest that says something says of this."""
    return next((found for manifest in manifests if (found := getattr(manifest, name)) is not None), None)


def check_same(first: Manifest, first_name: str, other: Manifest, name: str) -> None:
    """Refuse two memories whose rows are not alike.

    Raises
    ------
    InvalidInput, DimensionMismatch : naming what differs.
    """
    pairs = {layout: (getattr(first.layout, layout), getattr(other.layout, layout)) for layout in vars(first.layout)}
    if None not in (first.top_m, other.top_m):
        pairs["top_m"] = (first.top_m, other.top_m)
    pairs["class_names"] = (first.class_names, other.class_names)
    for what, (was, found) in pairs.items():
        if was != found:
            kind = DimensionMismatch if what in _WIDTHS else InvalidInput
            raise kind(f"{name} has {what} {_short(found)}, but {first_name} has {_short(was)}")


def check_kinds(manifests: Sequence[Manifest], names: Sequence[str], kinds: Sequence[str]) -> None:
    """Refuse memories whose rows have other kinds of ids or groups; those that never had rows fit all.

    Raises
    ------
    InvalidInput : naming both.
    """
    filled = [(manifest, name) for manifest, name in zip(manifests, names, strict=True) if manifest.id_kind]
    for kind in kinds:
        for manifest, name in filled[1:]:
            was, found = getattr(filled[0][0], kind), getattr(manifest, kind)
            if was != found:
                what, here = kind.removesuffix("_kind") + "s", filled[0][1]
                raise InvalidInput(f"{what} of {name}: {found or 'none'}, but of {here}: {was or 'none'}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
