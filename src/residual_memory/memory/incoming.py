"""New rows on their way into a memory: checked at the door, and brought into the form in which they are stored."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike

from residual_memory.errors import DimensionMismatch, DuplicateId, InvalidInput
from residual_memory.memory.attributes import EXPIRES, TEXTS, attribute_columns
from residual_memory.memory.snapshot import Snapshot, Table
from residual_memory.types import TopM
from residual_memory.validation import as_ids, as_keys, as_labels, as_predictions, as_unit_keys

_REQUIRED = ("keys", "labels", "predictions")
_OPTIONAL = ("ids", "groups", EXPIRES, *TEXTS)


class Incoming:
    """Rows of one block or of many, as if each block had been appended.

    Parameters
    ----------
    snapshot : of the memory that they are for.
    as_stored : the keys come from a memory of this metric: under "cosine" they have length 1 already.
    """

    def __init__(self, snapshot: Snapshot, *, as_stored: bool = False) -> None:
        self._snapshot, self._manifest, self._as_stored = snapshot, snapshot.manifest, as_stored
        self._ids: list[ndarray] = []
        self.n_rows = 0

    def tables(self, blocks: Iterable[Mapping[str, Any]]) -> Iterator[Table]:
        """Each block that has rows, in the stored form.

        Raises
        ------
        InvalidInput, DimensionMismatch, DuplicateId : if a block does not fit, naming its first row.
        """
        for block in blocks:
            try:
                table = self.table(**_arguments(block))
            except InvalidInput as error:
                raise type(error)(f"in the block that begins with row {self.n_rows:,}: {error}") from None
            if len(table["keys"]):
                yield table

    def changes(self) -> dict[str, Any]:
        """What the manifest says after all blocks.

        Raises
        ------
        DuplicateId : if two blocks have an id in common.
        """
        if len(self._ids) > 1:
            ids = np.concatenate(self._ids)
            ordered = ids if (ids[1:] > ids[:-1]).all() else np.sort(ids)
            if (twice := ordered[1:] == ordered[:-1]).any():
                raise DuplicateId(f"id {ordered[1:][twice][0].item()!r} is given in more than one block")
        return {name: getattr(self._manifest, name) for name in ("id_kind", "group_kind", "next_id", "top_m")}

    def table(
        self,
        keys: ArrayLike,
        labels: ArrayLike,
        predictions: "ArrayLike | TopM",
        ids: ArrayLike | None = None,
        groups: ArrayLike | None = None,
        *,
        owners: str | Sequence[str] | None = None,
        expires: Any = None,
        tags: "Sequence[str] | Sequence[Sequence[str]] | None" = None,
        snippets: Sequence[str] | None = None,
    ) -> dict[str, ndarray]:
        """One block in the stored form; the parameters are those of `Memory.append`."""
        manifest = self._manifest
        table, top_m = self._numbers(keys, labels, predictions)
        n = len(table["keys"])
        table["ids"] = self._new_ids(ids, n).copy()
        group_kind = self._group_kind(groups, n)
        if groups is not None:
            table["groups"] = as_ids(groups, n, name="groups").copy()
        table |= attribute_columns(n, owners=owners, expires=expires, tags=tags, snippets=snippets)
        if n:
            kind = kind_of(table["ids"])
            next_id = max(manifest.next_id, int(table["ids"].max()) + 1) if kind == "integer" else manifest.next_id
            self._manifest = replace(manifest, id_kind=kind, group_kind=group_kind, next_id=next_id, top_m=top_m)
            self._ids.append(table["ids"])
            self.n_rows += n
        return table

    def _numbers(
        self, keys: ArrayLike, labels: ArrayLike, predictions: "ArrayLike | TopM"
    ) -> tuple[dict[str, ndarray], int | None]:
        layout = self._manifest.layout
        if isinstance(predictions, TopM) != (layout.residuals == "top-m"):
            wanted = "rm.TopM(indices, probabilities, rest)" if layout.residuals == "top-m" else "an array"
            raise InvalidInput(
                f"predictions are {type(predictions).__name__}, but residuals={layout.residuals!r} takes {wanted}"
            )
        unit = self._as_stored and layout.metric == "cosine"
        new_keys = as_unit_keys(keys, layout.dim) if unit else as_keys(keys, layout.dim, metric=layout.metric)
        table = {"keys": new_keys, "labels": as_labels(labels, layout.task, layout.n_outputs, len(new_keys))}
        checked = as_predictions(predictions, layout.task, layout.n_outputs)
        if len(checked) != len(new_keys):
            raise DimensionMismatch(f"there are {len(checked):,} predictions for {len(new_keys):,} keys")
        top_m = self._manifest.top_m
        if isinstance(checked, TopM):
            m = checked.indices.shape[1]
            if top_m not in (None, m):
                raise DimensionMismatch(f"predictions are the top {m}, but the memory keeps the top {top_m}")
            top_m = m
            table |= {"indices": checked.indices, "probabilities": checked.probabilities, "rest": checked.rest}
        else:
            table["predictions"] = checked
        if scale := layout.log_scale:
            table |= {name: scale.encoded(table[name]) for name in ("probabilities", "rest")}
        for name, (dtype, _) in layout.columns(top_m).items():
            table[name] = _stored(name, table[name], dtype)
        return table, top_m

    def _new_ids(self, ids: ArrayLike | None, n: int) -> ndarray:
        manifest = self._manifest
        if ids is None:
            if manifest.id_kind == "string":
                raise InvalidInput("the memory's ids are strings, so it cannot give ids by itself; pass ids=")
            if manifest.next_id + n > np.iinfo(np.int64).max:
                raise InvalidInput("the largest ids are taken, so the memory cannot give ids by itself; pass ids=")
            return np.arange(manifest.next_id, manifest.next_id + n)
        new = as_ids(ids, n)
        if manifest.id_kind not in (None, kind_of(new)) and n:
            raise InvalidInput(f"ids are of kind {kind_of(new)}, but the memory's are of kind {manifest.id_kind}")
        values, counts = np.unique(new, return_counts=True)
        if (counts > 1).any():
            raise DuplicateId(f"id {values[counts > 1][0].item()!r} is given {counts.max()} times")
        fresh = kind_of(new) == "integer" and n > 0 and values[0] >= manifest.next_id
        if not fresh and (held := self._snapshot.rows_of(new) >= 0).any():
            example = new[held][0].item()
            raise DuplicateId(
                f"the memory already holds {held.sum():,} of the {n:,} ids, for example {example!r}; forget them first"
            )
        return new

    def _group_kind(self, groups: ArrayLike | None, n: int) -> str | None:
        manifest = self._manifest
        kind = None if groups is None else kind_of(as_ids(groups, n, name="groups"))
        if manifest.id_kind is not None and kind != manifest.group_kind:
            raise InvalidInput(
                f"groups are {kind or 'missing'}, but the rows held so far have {manifest.group_kind or 'none'}"
            )
        return kind


def kind_of(ids: ndarray) -> str:
    """The kind of ids or groups, as a manifest says it."""
    return "string" if ids.dtype.kind == "U" else "integer"


def _arguments(block: Mapping[str, Any]) -> Mapping[str, Any]:
    if missing := [name for name in _REQUIRED if name not in block]:
        raise InvalidInput(f"a block holds no {missing[0]}, it has {', '.join(block)}")
    if unknown := set(block) - {*_REQUIRED, *_OPTIONAL}:
        expected = f"{', '.join((*_REQUIRED, *_OPTIONAL[:-1]))} and {_OPTIONAL[-1]}"
        raise InvalidInput(f"a block holds {min(unknown)!r}, expected {expected}")
    return block


def _stored(name: str, values: ndarray, dtype: np.dtype[Any]) -> ndarray:
    """A copy in the stored type; a value that does not fit it is refused, not turned into infinity."""
    with np.errstate(over="ignore"):
        stored = np.array(values, dtype)
    if dtype == np.float16 != values.dtype and not np.isfinite(stored).all():
        raise InvalidInput(
            f"{name} hold values up to {np.abs(values).max():.4g}, above what float16 holds; store float32"
        )
    return stored
