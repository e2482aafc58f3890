"""One memory of several."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from residual_memory.errors import DuplicateId, FingerprintMismatch, InvalidInput
from residual_memory.exchange.fields import Exported
from residual_memory.exchange.making import made
from residual_memory.exchange.rows import Block
from residual_memory.memory import Memory
from residual_memory.memory.format import Manifest
from residual_memory.memory.joining import check_kinds, check_same, first_known
from residual_memory.memory.memory import described


def merge_memories(
    memories: Sequence[Memory],
    path: str | os.PathLike[str] | None = None,
    *,
    ids: Literal["keep", "new"] = "keep",
    check_source: bool = True,
) -> Memory:
    """A new memory with the rows of several, in order; those are not changed.

    It answers as one would to which the rows of each had been appended in turn. A saved setting is kept where all have
    the same one.

    Parameters
    ----------
    memories : of one layout, with the same class names, and with groups all or none.
    path : a new or empty directory; None keeps the memory in RAM.
    ids : "keep" takes the rows' ids, which must differ; "new" numbers the rows from 0.
    check_source : refuse memories of different sources (model, layer, data); False keeps the first one's.

    Raises
    ------
    InvalidInput, DimensionMismatch : naming what differs.
    DuplicateId : naming an id that two memories have.
    FingerprintMismatch : if the sources differ.
    StorageFailure : if the disk refuses; nothing is left.

    Examples
    --------
    >>> first, second = (Memory.create(dim=1, n_outputs=2) for _ in range(2))
    >>> for memory in (first, second):
    ...     given = memory.append([[0.0]], [1], [[0.9, 0.1]])
    >>> merge_memories([first, second], ids="new").ids
    array([0, 1])
    """
    if not memories:
        raise InvalidInput("there are no memories to merge; name at least one")
    if ids not in ("keep", "new"):
        raise InvalidInput(f"ids is {ids!r}, expected 'keep' or 'new'")
    manifests = [memory.snapshot.manifest for memory in memories]
    names = [_name(memory, place) for place, memory in enumerate(memories)]
    for manifest, name in zip(manifests[1:], names[1:], strict=True):
        check_same(manifests[0], names[0], manifest, name)
        if check_source and manifest.source != manifests[0].source:
            raise FingerprintMismatch(
                f"{name} has another source than {names[0]}; "
                "merge memories of one model, layer and data, or leave the check out (check_source=False)"
            )
    check_kinds(manifests, names, ["group_kind"] if ids == "new" else ["id_kind", "group_kind"])
    exported = [Exported(memory) for memory in memories]
    if ids == "keep":
        _check_ids(exported, names)
    n_rows = sum(rows.n_rows for rows in exported)
    blocks = _blocks(exported, ids)
    return made(path, _merged(manifests, ids), blocks, as_stored=True, n_rows=n_rows, doing="merging")


def _merged(manifests: Sequence[Manifest], ids: str) -> Manifest:
    first = manifests[0]
    options = {**vars(first.layout), "class_names": first.class_names, "source": first.source}
    known: dict[str, Any] = {
        "setting": first.setting if all(manifest.setting == first.setting for manifest in manifests) else None,
        "top_m": first_known(manifests, "top_m"),
        "group_kind": first_known(manifests, "group_kind"),
    }
    if ids == "keep":
        known |= {"id_kind": first_known(manifests, "id_kind"), "next_id": max(m.next_id for m in manifests)}
    elif any(manifest.id_kind for manifest in manifests):
        known["id_kind"] = "integer"
    return replace(described(**options), **known)


def _blocks(exported: Sequence[Exported], ids: str) -> Iterator[Block]:
    first = 0
    for rows in exported:
        for block in rows.blocks():
            numbers = np.arange(first, first + len(block)) if ids == "new" else block.ids
            yield replace(block, first=first, ids=numbers)
            first += len(block)


def _check_ids(exported: Sequence[Exported], names: Sequence[str]) -> None:
    """Refuse an id that two memories have."""
    held = [rows.ids for rows in exported if rows.n_rows]
    owners = [name for rows, name in zip(exported, names, strict=True) if rows.n_rows]
    if not held:
        return
    joined = np.concatenate(held)
    order = np.argsort(joined, kind="stable")
    twice = np.flatnonzero(joined[order[1:]] == joined[order[:-1]])
    if len(twice):
        ends = np.cumsum([len(ids) for ids in held])
        one, other = (owners[int(np.searchsorted(ends, row, side="right"))] for row in order[twice[0] :][:2])
        raise DuplicateId(
            f"{one} and {other} both hold {len(twice):,} ids, for example {joined[order[twice[0]]].item()!r}; "
            "forget the rows of one, or number all rows anew (ids='new')"
        )


def _name(memory: Memory, place: int) -> str:
    return f"memory {place + 1} " + ("in RAM" if memory.path is None else f"at {memory.path}")
