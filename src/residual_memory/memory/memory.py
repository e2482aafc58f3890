"""The durable store of what a model said of its training data."""

import datetime
import itertools
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike

from residual_memory._version import __version__
from residual_memory.errors import (
    CorruptFile,
    DimensionMismatch,
    DuplicateId,
    InvalidInput,
    MemoryNotFound,
    ReadOnlyMemory,
    ResidualMemoryError,
    StorageFailure,
    UnknownId,
)
from residual_memory.memory.format import (
    MANIFEST,
    MAX_MANIFEST,
    Columns,
    Layout,
    Manifest,
    Segment,
    check_layout,
    decoded_strings,
    encoded_strings,
    open_segment,
    segment_columns,
    segment_length_and_pieces,
)
from residual_memory.memory.saved import (
    Pieces,
    SavedPart,
    check_parts,
    is_whole_part,
    read_part,
    remove_part,
    saved_parts,
    sweep,
    write_part,
)
from residual_memory.memory.snapshot import Snapshot, Table
from residual_memory.memory.storage import LOCK, PART, Directory, FileRecord
from residual_memory.types import Metric, Task, TopM
from residual_memory.validation import as_count, as_ids, as_keys, as_labels, as_predictions, as_unit_keys

SEGMENT_BYTES = 64 << 20  # compaction and builders write segments of about this size
MERGE_BYTES = 32 << 20  # small appends are merged up to this size, so that a memory has few files
GONE_COLUMNS: Columns = {"rows": (np.dtype(np.int64), ())}
_PREFIXES = ("rows-", "gone-")


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
    n_files, n_bytes : what was read.
    ignored : damage of a saved index, which is passed over and built again: the memory is whole without it.
    """

    problems: tuple[Problem, ...]
    n_files: int
    n_bytes: int
    ignored: tuple[Problem, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems


class Memory:
    """Keys, labels and base predictions of examples: in RAM, or as a directory that survives crashes.

    Use `Memory.create` for a new one and `Memory.open` for an existing one; both are context managers. Queries from
    several threads are safe. On disk there is one writer at a time; read-only handles pin the version that they opened
    until `refresh`.

    Examples
    --------
    >>> import numpy as np
    >>> memory = Memory.create(dim=2, n_outputs=2)
    >>> memory.append([[0.0, 0.0], [1.0, 1.0]], [0, 1], [[0.9, 0.1], [0.8, 0.2]])
    array([0, 1])
    >>> memory.forget([0])
    >>> len(memory), memory.ids
    (1, array([1]))
    """

    def __init__(self, directory: Directory | None, snapshot: Snapshot, *, writable: bool) -> None:
        self._directory = directory
        self._snapshot = snapshot
        self._writable = writable
        self._changing = threading.RLock()

    # ------------------------------------------------------------------ making and opening

    @staticmethod
    def create(
        path: str | os.PathLike[str] | None = None,
        *,
        dim: int,
        n_outputs: int,
        task: Task = "classification",
        metric: Metric = "euclidean",
        residuals: Literal["dense", "top-m"] = "dense",
        class_names: Sequence[str] | None = None,
        key_dtype: str = "float32",
        prediction_dtype: str = "float32",
        source: Mapping[str, Any] | None = None,
    ) -> "Memory":
        """Make an empty memory and open it for writing.

        Parameters
        ----------
        path : a new or empty directory; None keeps the memory in RAM.
        dim : numbers in a key.
        n_outputs : classes (may exceed the model's, to leave room for classes that the base never saw), or targets.
        task : "classification" or "regression".
        metric : "euclidean", or "cosine": keys and queries are scaled to length 1 first.
        residuals : "dense" stores whole base predictions, "top-m" takes `TopM` predictions.
        class_names : one for each class, for reports.
        key_dtype, prediction_dtype : "float16", "float32" or "float64", of what is stored. Top-m predictions also take
            "log8" (1 byte each, right within 3 %, down to e^-16) and "log16" (2 bytes, 0.03 %, e^-32); scaling the row
            to sum to 1 again may add as much.
        source : where the rows come from (model fingerprint, layer, data), as JSON values; kept and compared.

        Raises
        ------
        InvalidInput : if an option is not one of those, or the path already holds a memory or other files.
        MemoryLocked : if another process is making it right now.
        """
        manifest = described(
            dim=dim,
            n_outputs=n_outputs,
            task=task,
            metric=metric,
            residuals=residuals,
            class_names=class_names,
            key_dtype=key_dtype,
            prediction_dtype=prediction_dtype,
            source=source,
        )
        return begun(path, manifest)

    @staticmethod
    def open(path: str | os.PathLike[str], *, writable: bool = False, verify: bool = False) -> "Memory":
        """Open a memory on disk.

        Parameters
        ----------
        path : its directory.
        writable : become its one writer; False gives a read-only view of the newest version.
        verify : check every byte against the manifest before anything is read.

        Raises
        ------
        MemoryNotFound : if there is none.
        MemoryLocked : if `writable` and another process is writing.
        CorruptFile : if a file is missing, cut or changed.
        UnsupportedFormat : if a newer version of the library wrote it.
        """
        directory = Directory(path)
        if not (directory.path / MANIFEST).exists():
            raise MemoryNotFound(f"there is no memory at {path}: it has no {MANIFEST}")
        if writable:
            directory.lock()
        try:
            snapshot = _read_snapshot(directory, None)
            if verify and (problems := _damage(directory, snapshot.manifest)):
                raise CorruptFile(f"{path} is damaged: {'; '.join(map(str, problems))}")
            if writable:
                _sweep(directory, snapshot.manifest)
        except BaseException:
            directory.unlock()
            raise
        return Memory(directory, snapshot, writable=writable)

    # ------------------------------------------------------------------ what it holds

    def __len__(self) -> int:
        return len(self._snapshot)

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a memory in RAM holds its rows; that of one on disk opens it again, read-only."""
        if self.path is not None:
            return Memory.open, (str(self.path.absolute()),)
        snapshot = self._snapshot
        return _in_ram, (snapshot.manifest, [dict(table) for table in snapshot.tables], snapshot.forgotten)

    def __repr__(self) -> str:
        where = "in RAM" if self.path is None else f"at {self.path}"
        layout = self.layout
        return f"<Memory {where}: {len(self):,} rows, dim {layout.dim}, {layout.n_outputs} outputs, {layout.task}>"

    @property
    def path(self) -> Path | None:
        """Its directory; None in RAM."""
        return self._directory.path if self._directory else None

    @property
    def snapshot(self) -> Snapshot:
        """The rows of the version that this handle sees now; stays as it is when the memory changes."""
        return self._snapshot

    @property
    def layout(self) -> Layout:
        """What every row holds."""
        return self._snapshot.layout

    @property
    def ids(self) -> Shaped[ndarray, " n"]:
        """Ids of the rows, in the order in which they came."""
        return self._snapshot.ids.copy()

    @property
    def next_id(self) -> int:
        """The id that the next row gets where none is given; above every id that was ever given."""
        return self._snapshot.manifest.next_id

    @property
    def version(self) -> int:
        """Counts the changes that were committed."""
        return self._snapshot.version

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The classes' names, where they were given."""
        return self._snapshot.manifest.class_names

    @property
    def source(self) -> Mapping[str, Any] | None:
        """Where the rows come from, as given to `create`."""
        return self._snapshot.manifest.source

    @property
    def setting(self) -> Mapping[str, Any] | None:
        """The setting that tuning chose, as given to `save_setting`."""
        return self._snapshot.manifest.setting

    @property
    def n_forgotten(self) -> int:
        """Rows that are masked but not yet erased; `compact` erases them."""
        return len(self._snapshot.forgotten)

    @property
    def n_bytes(self) -> int:
        """Bytes of the segment files; in RAM, of the arrays."""
        if self._directory:
            return sum(record.length for record in self._snapshot.manifest.files())
        return sum(column.nbytes for table in self._snapshot.tables for column in table.values())

    # ------------------------------------------------------------------ changes

    def append(
        self,
        keys: ArrayLike,
        labels: ArrayLike,
        predictions: "ArrayLike | TopM",
        ids: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> Shaped[ndarray, " b"]:
        """Add rows; they are durable when the call returns.

        Parameters
        ----------
        keys : [b d].
        labels : class indices [b], or target values [b] or [b c].
        predictions : base probabilities at temperature 1 [b c] (fewer classes than the memory's are filled up with
            probability 0), base values [b] or [b c], or `TopM` for a memory of top-m residuals.
        ids : int64 ≥ 0 or strings [b], one kind a memory; None gives ids that were never given before.
        groups : int64 or strings [b], for example documents; all rows of a memory have one, or none has.

        Returns
        -------
        The ids of the new rows.

        Raises
        ------
        InvalidInput, DimensionMismatch, DuplicateId : if an argument does not fit; nothing is added.
        StorageFailure : if the disk refuses; nothing is added.
        """
        with self._changing:
            self._require_writable()
            table, top_m = self._validated(keys, labels, predictions)
            n = len(table["keys"])
            manifest = self._snapshot.manifest
            new_ids = self._new_ids(ids, n)
            id_kind = _kind(new_ids)
            group_kind = self._check_groups(groups, n)
            if n == 0:
                return new_ids
            table["ids"] = new_ids.copy()
            if groups is not None:
                table["groups"] = as_ids(groups, n, name="groups").copy()
            next_id = max(manifest.next_id, int(new_ids.max()) + 1) if id_kind == "integer" else manifest.next_id
            kept, merged = self._merge_small(table)
            self._commit_rows(kept, [merged], id_kind=id_kind, group_kind=group_kind, next_id=next_id, top_m=top_m)
            return new_ids

    def extend(self, blocks: Iterable[Mapping[str, Any]], *, as_stored: bool = False) -> int:
        """Add the rows of many blocks in one step: all of them, or none.

        Rows are written as they come, in segments of about `SEGMENT_BYTES`; only ids are held in RAM.

        Parameters
        ----------
        blocks : each with the arguments of `append` by name. Ids are unique over all blocks.
        as_stored : the keys come from a memory of this metric: under "cosine" they have length 1 already, and are kept
            to the last bit.

        Returns
        -------
        How many rows were added.

        Raises
        ------
        InvalidInput, DimensionMismatch, DuplicateId : if a block does not fit; nothing is added.
        StorageFailure : if the disk refuses; nothing is added.
        """
        with self._changing:
            self._require_writable()
            before = self._snapshot
            stream = _Stream(self, before.manifest, as_stored)
            tables = _in_segments(stream.tables(blocks))
            first = next(tables, None)
            if first is None:
                return 0
            kept, merged = self._merge_small(dict(first))

            def last() -> dict[str, Any]:
                if self._snapshot is not before:
                    raise InvalidInput("the memory was changed while its new rows were read; change it before or after")
                return stream.changes()

            self._commit_rows(kept, itertools.chain([merged], tables), last)
            return stream.n_rows

    def forget(self, ids: ArrayLike) -> None:
        """Mask rows at once, durably; `compact` then erases them from disk.

        The base model was trained on the rows and still remembers what it learned of them.

        Raises
        ------
        UnknownId : if the memory does not hold one of the ids; nothing is forgotten.
        """
        with self._changing:
            self._require_writable()
            wanted = np.unique(as_ids(np.atleast_1d(np.asarray(ids))))
            if not len(wanted):
                return
            rows = self._snapshot.rows_of(wanted)
            if (rows < 0).any():
                unknown = wanted[rows < 0]
                shown = ", ".join(map(repr, unknown[:5].tolist()))
                raise UnknownId(
                    f"the memory does not hold {len(unknown):,} of the {len(wanted):,} ids, for example {shown}"
                )
            gone = np.sort(np.concatenate([self._snapshot.forgotten, rows]))
            self._commit_forgotten(gone)

    def compact(self) -> None:
        """Rewrite the memory without its forgotten rows and in few segments; the old files are removed."""
        with self._changing:
            self._require_writable()
            snapshot = self._snapshot
            if not len(snapshot.forgotten) and len(snapshot.tables) <= 1:
                return
            self._commit_rows((), _live_tables(snapshot), generation=snapshot.generation + 1, forgotten=None)

    def save_setting(self, setting: Mapping[str, Any]) -> None:
        """Keep a tuned setting with the memory, so that whoever opens it predicts with it."""
        self._commit_description(setting=dict(setting))

    def save_source(self, source: Mapping[str, Any]) -> None:
        """Keep where the rows come from: model, layer, data."""
        self._commit_description(source=dict(source))

    def refresh(self) -> bool:
        """See the newest version; True if it is another one than before."""
        if self._directory is None or self._writable:
            return False
        with self._changing:
            snapshot = _read_snapshot(self._directory, self._snapshot)
            changed = snapshot.version != self._snapshot.version
            self._snapshot = snapshot
            return changed

    def verify(self) -> VerifyReport:
        """Compare every byte on disk with what was written; a memory in RAM is always whole."""
        if self._directory is None:
            return VerifyReport((), 0, 0)
        return verify(self._directory.path)

    def saved_parts(self, snapshot: Snapshot) -> list[SavedPart]:
        """The saved parts of an index over this snapshot's rows; none in RAM."""
        return saved_parts(self._directory, snapshot) if self._directory else []

    def read_part(self, part: SavedPart) -> Pieces | None:
        """What an engine built, if it is to the byte what was saved."""
        return read_part(self._directory, part) if self._directory else None

    def save_parts(
        self, snapshot: Snapshot, built: "Sequence[tuple[str, int, int, Callable[[], Pieces]]]"
    ) -> tuple[SavedPart, ...]:
        """Keep the parts of an index beside the rows, in the place of the index that was saved before.

        Parameters
        ----------
        snapshot : whose rows they are of.
        built : what each part is, its first row, its number of rows, and what gives the engine's bytes; it is not asked
            for them where they lie there already.

        Raises
        ------
        InvalidInput : if the memory is in RAM, or was compacted since.
        ReadOnlyMemory : if this handle may not write.
        StorageFailure : if the disk refuses; what was saved before is still there.
        """
        with self._changing:
            if self._directory is None:
                raise InvalidInput("the memory is in RAM, so an index cannot be saved with it; give it a path")
            self._require_writable()
            if snapshot.generation != self._snapshot.generation:
                raise InvalidInput("the memory was compacted after the index was built; save the index again")
            there = {(part.name, part.first, part.n_rows): part for part in saved_parts(self._directory, snapshot)}
            kept: list[SavedPart] = []
            fresh: list[SavedPart] = []
            try:
                for name, first, n_rows, pieces in built:
                    part = there.get((name, first, n_rows))
                    if part is None or not is_whole_part(self._directory, part):
                        part = write_part(self._directory, snapshot, name, first, n_rows, pieces())
                        fresh.append(part)
                    kept.append(part)
            except BaseException:
                for part in fresh:
                    remove_part(self._directory, part)
                raise
            sweep(self._directory, snapshot.generation, kept)
            return tuple(kept)

    def close(self) -> None:
        """Let another process write; the rows stay readable through this handle."""
        with self._changing:
            if self._directory:
                self._directory.unlock()
            self._writable = False

    # ------------------------------------------------------------------ inside

    def _require_writable(self) -> None:
        if not self._writable:
            raise ReadOnlyMemory(f"{self.path} is open read-only, or closed; use Memory.open(path, writable=True)")

    def _validated(
        self,
        keys: ArrayLike,
        labels: ArrayLike,
        predictions: "ArrayLike | TopM",
        manifest: Manifest | None = None,
        as_stored: bool = False,
    ) -> tuple[dict[str, ndarray], int | None]:
        layout = self.layout
        if isinstance(predictions, TopM) != (layout.residuals == "top-m"):
            wanted = "rm.TopM(indices, probabilities, rest)" if layout.residuals == "top-m" else "an array"
            raise InvalidInput(
                f"predictions are {type(predictions).__name__}, but residuals={layout.residuals!r} takes {wanted}"
            )
        unit = as_stored and layout.metric == "cosine"
        new_keys = as_unit_keys(keys, layout.dim) if unit else as_keys(keys, layout.dim, metric=layout.metric)
        table = {"keys": new_keys, "labels": as_labels(labels, layout.task, layout.n_outputs, len(new_keys))}
        checked = as_predictions(predictions, layout.task, layout.n_outputs)
        if len(checked) != len(new_keys):
            raise DimensionMismatch(f"there are {len(checked):,} predictions for {len(new_keys):,} keys")
        top_m = (self._snapshot.manifest if manifest is None else manifest).top_m
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

    def _new_ids(self, ids: ArrayLike | None, n: int, manifest: Manifest | None = None) -> ndarray:
        manifest = self._snapshot.manifest if manifest is None else manifest
        if ids is None:
            if manifest.id_kind == "string":
                raise InvalidInput("the memory's ids are strings, so it cannot give ids by itself; pass ids=")
            if manifest.next_id + n > np.iinfo(np.int64).max:
                raise InvalidInput("the largest ids are taken, so the memory cannot give ids by itself; pass ids=")
            return np.arange(manifest.next_id, manifest.next_id + n)
        new = as_ids(ids, n)
        if manifest.id_kind not in (None, _kind(new)) and n:
            raise InvalidInput(f"ids are of kind {_kind(new)}, but the memory's are of kind {manifest.id_kind}")
        values, counts = np.unique(new, return_counts=True)
        if (counts > 1).any():
            raise DuplicateId(f"id {values[counts > 1][0].item()!r} is given {counts.max()} times")
        fresh = _kind(new) == "integer" and n > 0 and values[0] >= manifest.next_id
        if not fresh and (held := self._snapshot.rows_of(new) >= 0).any():
            example = new[held][0].item()
            raise DuplicateId(
                f"the memory already holds {held.sum():,} of the {n:,} ids, for example {example!r}; forget them first"
            )
        return new

    def _check_groups(self, groups: ArrayLike | None, n: int, manifest: Manifest | None = None) -> str | None:
        manifest = self._snapshot.manifest if manifest is None else manifest
        kind = None if groups is None else _kind(as_ids(groups, n, name="groups"))
        if manifest.id_kind is not None and kind != manifest.group_kind:
            raise InvalidInput(
                f"groups are {kind or 'missing'}, but the rows held so far have {manifest.group_kind or 'none'}"
            )
        return kind

    def _merge_small(self, table: dict[str, ndarray]) -> tuple[Sequence[tuple[Segment, Table]], Table]:
        """Join the last segments with the new rows while they are no longer than these: few files, few rewrites."""
        kept = list(zip(self._snapshot.manifest.segments, self._snapshot.tables, strict=True))
        joined = [table]
        n, row_bytes = len(table["keys"]), max(_table_bytes(table) // len(table["keys"]), 1)
        while kept and kept[-1][0].n_rows <= n and (n + kept[-1][0].n_rows) * row_bytes <= MERGE_BYTES:
            segment, last = kept.pop()
            n += segment.n_rows
            joined.insert(0, dict(last))
        return kept, _concatenated(joined)

    def _commit_rows(
        self,
        kept: Sequence[tuple[Segment, Table]],
        tables: Iterable[Table],
        last: Callable[[], dict[str, Any]] = dict,
        **changes: Any,
    ) -> None:
        """Write tables and name them in a new manifest; `last` gives the changes that are known only after the last."""
        segments, held = [segment for segment, _ in kept], [table for _, table in kept]
        version = self._snapshot.version + 1
        forgotten = np.zeros(0, np.int64) if "forgotten" in changes else self._snapshot.forgotten
        written: list[str] = []
        try:
            for table in tables:
                segment, readable = self._write("rows", version, table, written)
                segments.append(segment)
                held.append(readable)
            changes |= last()
            manifest = self._snapshot.manifest.with_changes(segments=tuple(segments), library=__version__, **changes)
            self._commit(manifest, held, forgotten)
        except BaseException:
            self._discard(written)
            raise

    def _commit_description(self, **changes: Any) -> None:
        with self._changing:
            self._require_writable()
            manifest = self._snapshot.manifest.with_changes(**changes)
            self._commit(manifest, self._snapshot.tables, self._snapshot.forgotten)

    def _commit_forgotten(self, gone: ndarray) -> None:
        written: list[str] = []
        try:
            segment, _ = self._write("gone", self._snapshot.version + 1, {"rows": gone}, written)
            self._commit(self._snapshot.manifest.with_changes(forgotten=segment), self._snapshot.tables, gone)
        except BaseException:
            self._discard(written)
            raise

    def _write(self, kind: str, version: int, table: Table, written: list[str]) -> tuple[Segment, Table]:
        """A table as an immutable file, and what is read back from it; in RAM the table itself."""
        n_rows = len(next(iter(table.values())))
        name = f"{kind}-{version:08d}-{secrets.token_hex(4)}.safetensors"
        if self._directory is None:
            return Segment(FileRecord(name, 0, 1, ()), n_rows), table
        coded = {key: encoded_strings(value) if value.dtype.kind == "U" else value for key, value in table.items()}
        length, pieces = segment_length_and_pieces(coded)
        written.append(name)
        segment = Segment(self._directory.write(name, pieces, length), n_rows)
        expected = {key: (value.dtype, value.shape[1:]) for key, value in coded.items()}
        return segment, _readable(self._directory, segment, expected)

    def _commit(self, manifest: Manifest, tables: Sequence[Table], forgotten: ndarray) -> None:
        """Make a manifest the truth; only then is the change seen."""
        snapshot = Snapshot(manifest, tables, forgotten, self._snapshot)
        if self._directory is None:
            self._snapshot = snapshot
            return
        content = manifest.to_bytes()
        try:
            self._directory.replace(MANIFEST, content)
        except BaseException:
            if self._directory.holds(MANIFEST, content):  # refused after the rename: the change is made, not yet safe
                self._adopt(snapshot)
            raise
        self._adopt(snapshot)

    def _adopt(self, snapshot: Snapshot) -> None:
        """See a committed snapshot, and remove the files that only the one before it needed."""
        before, self._snapshot = self._snapshot, snapshot
        self._discard([record.name for record in before.manifest.files()])
        if self._directory is not None and snapshot.generation != before.generation:
            sweep(self._directory, snapshot.generation)  # an index of rows that are erased holds something of them

    def _discard(self, names: Sequence[str]) -> None:
        """Remove those of the files that the memory does not name."""
        if self._directory is not None:
            for name in set(names) - {record.name for record in self._snapshot.manifest.files()}:
                self._directory.remove(name)


class _Stream:
    """Rows of many blocks on their way into a memory: checked block by block, as if each had been appended.

    Parameters
    ----------
    memory : whose rows they become.
    manifest : of the memory before them; what the blocks settle is noted in it.
    as_stored : whether the keys are kept as they are.
    """

    def __init__(self, memory: Memory, manifest: Manifest, as_stored: bool) -> None:
        self._memory, self._manifest, self._as_stored = memory, manifest, as_stored
        self._ids: list[ndarray] = []
        self.n_rows = 0

    def tables(self, blocks: Iterable[Mapping[str, Any]]) -> Iterator[Table]:
        for block in blocks:
            try:
                table = self._table(**_arguments(block))
            except InvalidInput as error:
                raise type(error)(f"in the block that begins with row {self.n_rows:,}: {error}") from None
            self.n_rows += len(table["keys"])
            if len(table["keys"]):
                yield table

    def changes(self) -> dict[str, Any]:
        """What the manifest says after all blocks.

        Raises
        ------
        DuplicateId : if two blocks have an id in common.
        """
        ids = np.concatenate(self._ids)
        if not (ids[1:] > ids[:-1]).all():
            ordered = np.sort(ids)
            if (twice := ordered[1:] == ordered[:-1]).any():
                raise DuplicateId(f"id {ordered[1:][twice][0].item()!r} is given in more than one block")
        return {name: getattr(self._manifest, name) for name in ("id_kind", "group_kind", "next_id", "top_m")}

    def _table(
        self,
        keys: ArrayLike,
        labels: ArrayLike,
        predictions: "ArrayLike | TopM",
        ids: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> dict[str, ndarray]:
        memory, manifest = self._memory, self._manifest
        table, top_m = memory._validated(keys, labels, predictions, manifest, self._as_stored)
        n = len(table["keys"])
        table["ids"] = memory._new_ids(ids, n, manifest).copy()
        group_kind = memory._check_groups(groups, n, manifest)
        if groups is not None:
            table["groups"] = as_ids(groups, n, name="groups").copy()
        if n:
            kind = _kind(table["ids"])
            next_id = max(manifest.next_id, int(table["ids"].max()) + 1) if kind == "integer" else manifest.next_id
            self._manifest = replace(manifest, id_kind=kind, group_kind=group_kind, next_id=next_id, top_m=top_m)
            self._ids.append(table["ids"])
        return table


def _arguments(block: Mapping[str, Any]) -> Mapping[str, Any]:
    if missing := [name for name in ("keys", "labels", "predictions") if name not in block]:
        raise InvalidInput(f"a block holds no {missing[0]}, it has {', '.join(block)}")
    if unknown := set(block) - {"keys", "labels", "predictions", "ids", "groups"}:
        raise InvalidInput(f"a block holds {min(unknown)!r}, expected keys, labels, predictions, ids and groups")
    return block


def _in_segments(tables: Iterable[Table]) -> Iterator[Table]:
    """The same rows in tables of about `SEGMENT_BYTES`."""
    waiting: list[Table] = []
    n_bytes = 0
    for table in tables:
        waiting.append(table)
        n_bytes += _table_bytes(table)
        if n_bytes >= SEGMENT_BYTES:
            yield _concatenated(waiting)
            waiting, n_bytes = [], 0
    if waiting:
        yield _concatenated(waiting)


def described(
    *,
    dim: int,
    n_outputs: int,
    task: Task = "classification",
    metric: Metric = "euclidean",
    residuals: str = "dense",
    class_names: Sequence[str] | None = None,
    key_dtype: str = "float32",
    prediction_dtype: str = "float32",
    source: Mapping[str, Any] | None = None,
) -> Manifest:
    """What is true of a memory of these options before it has rows.

    Raises
    ------
    InvalidInput : if an option is not one that a memory can have.
    """
    layout = Layout(
        as_count("dim", dim), as_count("n_outputs", n_outputs), task, metric, residuals, key_dtype, prediction_dtype
    )
    check_layout(layout)
    names = None if class_names is None else tuple(str(name) for name in class_names)
    if names is not None and len(names) != n_outputs:
        raise InvalidInput(f"there are {len(names)} class_names for n_outputs = {n_outputs}")
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Manifest(layout, __version__, class_names=names, source=source, created=created)


def begun(path: str | os.PathLike[str] | None, manifest: Manifest) -> Memory:
    """An empty memory of which the manifest is true, open for writing.

    Raises
    ------
    InvalidInput : if the path already holds a memory or other files.
    MemoryLocked : if another process is making it right now.
    """
    snapshot = Snapshot(manifest, (), np.zeros(0, np.int64))
    if path is None:
        return Memory(None, snapshot, writable=True)
    directory = Directory(path)
    _require_empty(directory)
    directory.make()
    directory.lock()
    try:
        _require_empty(directory)
        directory.replace(MANIFEST, manifest.to_bytes())
    except BaseException:
        directory.unlock()
        raise
    return Memory(directory, snapshot, writable=True)


def _in_ram(manifest: Manifest, tables: Sequence[Table], forgotten: Int64[ndarray, " g"]) -> Memory:
    return Memory(None, Snapshot(manifest, tables, forgotten), writable=True)


def verify(path: str | os.PathLike[str]) -> VerifyReport:
    """Compare every byte of a memory on disk with what was written, whether or not it can still be opened.

    Raises
    ------
    MemoryNotFound : if there is no memory at the path.
    """
    directory = Directory(path)
    if not directory.exists():
        raise MemoryNotFound(f"there is no memory at {path}")
    try:
        content = directory.read(MANIFEST, MAX_MANIFEST)
        manifest = Manifest.from_bytes(content, str(directory.path / MANIFEST))
    except ResidualMemoryError as error:
        return VerifyReport((Problem(MANIFEST, f"cannot be read: {error}"),), 1, 0)
    records, derived = manifest.files(), list(check_parts(directory))
    n_bytes = len(content) + sum(record.length for record in records) + sum(length for _, length, _ in derived)
    ignored = tuple(Problem(name, what) for name, _, what in derived if what is not None)
    return VerifyReport(tuple(_damage(directory, manifest)), 1 + len(records) + len(derived), n_bytes, ignored)


def require_empty(path: str | os.PathLike[str]) -> None:
    """Refuse a place for a new memory that holds something already.

    Raises
    ------
    InvalidInput : if it does.
    """
    _require_empty(Directory(path))


def _require_empty(directory: Directory) -> None:
    path = directory.path
    if path.exists() and (not path.is_dir() or set(directory.names()) - {LOCK, MANIFEST + PART}):
        raise InvalidInput(f"{path} already exists and is not empty; open it with Memory.open, or name another path")


def _damage(directory: Directory, manifest: Manifest) -> list[Problem]:
    checked = ((record.name, directory.check(record)) for record in manifest.files())
    return [Problem(name, what) for name, what in checked if what is not None]


def _read_snapshot(directory: Directory, known: Snapshot | None, attempts: int = 20) -> Snapshot:
    """The newest committed version; files of `known` are not opened again."""
    tables = {} if known is None else dict(zip((s.file for s in known.manifest.segments), known.tables, strict=True))
    for attempt in range(attempts):
        content = directory.read(MANIFEST, MAX_MANIFEST)
        manifest = Manifest.from_bytes(content, str(directory.path / MANIFEST))
        try:
            expected = segment_columns(manifest)
            opened = [tables.get(s.file) or _readable(directory, s, expected) for s in manifest.segments]
            return Snapshot(manifest, opened, _forgotten(directory, manifest), known)
        except (CorruptFile, StorageFailure):
            # A compaction between the two reads removes files that the newer manifest no longer names.
            if attempt + 1 < attempts and directory.read(MANIFEST, MAX_MANIFEST) != content:
                continue
            raise
    raise CorruptFile(f"{directory.path} changes faster than it can be read")


def _forgotten(directory: Directory, manifest: Manifest) -> Int64[ndarray, " g"]:
    if manifest.forgotten is None:
        return np.zeros(0, np.int64)
    gone = np.array(_readable(directory, manifest.forgotten, GONE_COLUMNS)["rows"])
    n_rows = sum(segment.n_rows for segment in manifest.segments)
    if len(gone) and (gone[0] < 0 or gone[-1] >= n_rows or (gone[1:] <= gone[:-1]).any()):
        raise CorruptFile(f"{directory.path / manifest.forgotten.file.name} names rows that the memory does not have")
    return gone


def _readable(directory: Directory, segment: Segment, expected: Columns) -> Table:
    columns = open_segment(directory, segment, expected)
    for name in ("ids", "groups"):
        if name in columns and columns[name].dtype == np.uint8:
            columns[name] = _decoded(columns[name], directory.path / segment.file.name)
    return columns


def _decoded(encoded: ndarray, where: Path) -> ndarray:
    try:
        return decoded_strings(encoded)
    except UnicodeDecodeError as error:
        raise CorruptFile(f"{where} holds ids or groups that are no text: {error}") from error


def _sweep(directory: Directory, manifest: Manifest) -> None:
    """Remove what an interrupted writer left behind."""
    named = {record.name for record in manifest.files()}
    for name in directory.names():
        if name not in named and (name.startswith(_PREFIXES) or name == MANIFEST + PART):
            directory.remove(name)
    sweep(directory, manifest.generation)


def _live_tables(snapshot: Snapshot) -> Iterator[Table]:
    """The rows that are not forgotten, in tables of about `SEGMENT_BYTES`."""
    alive = np.flatnonzero(snapshot.alive)
    if not len(alive):
        return
    row_bytes = max(sum(_table_bytes(table) for table in snapshot.tables) // snapshot.n_rows, 1)
    columns = {name: snapshot.column(name) for name in snapshot.tables[0]}
    size = max(SEGMENT_BYTES // row_bytes, 1)
    for start in range(0, len(alive), size):
        rows = alive[start : start + size]
        yield {name: column.take(rows) for name, column in columns.items()}


def _concatenated(tables: Sequence[Table]) -> Table:
    if len(tables) == 1:
        return tables[0]
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _table_bytes(table: Table) -> int:
    return sum(column.nbytes for column in table.values())


def _stored(name: str, values: ndarray, dtype: np.dtype[Any]) -> ndarray:
    """A copy in the stored type; a value that does not fit it is refused, not turned into infinity."""
    with np.errstate(over="ignore"):
        stored = np.array(values, dtype)
    if dtype == np.float16 != values.dtype and not np.isfinite(stored).all():
        raise InvalidInput(
            f"{name} hold values up to {np.abs(values).max():.4g}, above what float16 holds; store float32"
        )
    return stored


def _kind(ids: ndarray) -> str:
    return "string" if ids.dtype.kind == "U" else "integer"
