"""The durable store of what a model said of its training data."""

import datetime
import errno
import itertools
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike

from residual_memory._version import __version__
from residual_memory.display import html_table, size_text
from residual_memory.errors import (
    CorruptFile,
    InvalidInput,
    MemoryLocked,
    MemoryNotFound,
    ReadOnlyMemory,
    StorageFailure,
    UnknownId,
)
from residual_memory.memory.attributes import Attributes
from residual_memory.memory.checking import VerifyReport, damage, verify
from residual_memory.memory.erasure import (
    Certificate,
    Traces,
    files_gone,
    ids_digest,
    search,
    traces_of,
    what_remains,
)
from residual_memory.memory.format import (
    COPY,
    MANIFEST,
    Change,
    Layout,
    Manifest,
    Segment,
    check_layout,
    encoded_strings,
    segment_length_and_pieces,
)
from residual_memory.memory.incoming import Incoming, kind_of
from residual_memory.memory.reading import forgotten_table, read_snapshot, rows_of
from residual_memory.memory.saved import (
    BuiltPart,
    Pieces,
    SavedPart,
    is_whole_part,
    read_part,
    remove_part,
    saved_parts,
    stale,
    sweep,
    write_part,
)
from residual_memory.memory.segments import Part, compacted, in_segments, plan, with_last
from residual_memory.memory.selection import Inventory, Where, inventory, matching
from residual_memory.memory.snapshot import Snapshot, Table
from residual_memory.memory.storage import LOCK, PART, Directory, FileRecord
from residual_memory.types import Metric, Task, TopM
from residual_memory.validation import as_count, as_ids

CLASSES_SHOWN = 5
RESERVE_BYTES = 64 << 10  # held for a forget on a full disk, beside what its files take
_PREFIXES = ("rows-", "gone-")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_STILL_THERE = "; the rows are erased from the memory, but their old files may still be there: call compact() once more"


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
    1
    >>> len(memory), memory.ids
    (1, array([1]))
    """

    def __init__(self, directory: Directory | None, snapshot: Snapshot, *, writable: bool) -> None:
        self._directory = directory
        self._snapshot = snapshot
        self._writable = writable
        self._changing = threading.RLock()
        self._unfinished: Snapshot | None = None  # before a compaction whose old files may still be there

    # ------------------------------------------------------------------ making and opening

    @staticmethod
    def create(
        path: "str | os.PathLike[str] | Directory | None" = None,
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
    def open(path: "str | os.PathLike[str] | Directory", *, writable: bool = False, verify: bool = False) -> "Memory":
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
        directory = Directory.at(path)
        if not (directory.path / MANIFEST).exists():
            raise MemoryNotFound(f"there is no memory at {directory.path}: it has no {MANIFEST}")
        try:
            if writable:
                directory.lock()
            snapshot = read_snapshot(directory)
            if verify and (problems := damage(directory, snapshot.manifest)):
                raise CorruptFile(f"{directory.path} is damaged: {'; '.join(map(str, problems))}")
            if writable:
                _sweep(directory, snapshot.manifest)
                _hold_room(directory, snapshot.manifest, len(snapshot.manifest.to_bytes()))
            return Memory(directory, snapshot, writable=writable)
        except MemoryLocked:
            raise  # the lock is another handle's, perhaps through this very directory
        except BaseException:
            directory.unlock()
            raise

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

    def _repr_html_(self) -> str:
        """What the manifest says: no row is read."""
        layout, forgotten = self.layout, f", {self.n_forgotten:,} forgotten ones not yet erased"
        rows: list[tuple[str, object]] = [
            ("rows", f"{len(self):,}{forgotten if self.n_forgotten else ''}"),
            ("keys", f"{layout.dim:,} numbers, {layout.key_dtype}, {layout.metric}"),
            ("predictions", f"{layout.n_outputs:,} outputs, {layout.residuals}, {layout.prediction_dtype}"),
            ("task", layout.task),
            ("size", size_text(self.n_bytes)),
            ("version", f"{self.version:,}"),
            ("setting", "saved" if self.setting else "none saved: tune chooses one"),
        ]
        if self.class_names:
            more = len(self.class_names) - CLASSES_SHOWN
            names = ", ".join(self.class_names[:CLASSES_SHOWN])
            rows.append(("classes", f"{names}{f' and {more:,} more' if more > 0 else ''}"))
        where = "in RAM" if self.path is None else f"at {self.path}"
        return html_table(f"Memory {where}", rows)

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
    def writable(self) -> bool:
        """Whether rows can be added and forgotten through this handle."""
        return self._writable

    @property
    def version(self) -> int:
        """Counts the changes that were committed."""
        return self._snapshot.version

    @property
    def history(self) -> tuple[Change, ...]:
        """The last hundred changes that were committed, oldest first."""
        return self._snapshot.manifest.history

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
        *,
        owners: str | Sequence[str] | None = None,
        expires: Any = None,
        tags: "Sequence[str] | Sequence[Sequence[str]] | None" = None,
        snippets: Sequence[str] | None = None,
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
        owners : whose the rows are: one string for all, or [b].
        expires : when the rows should be forgotten, as datetimes with a time zone or seconds since 1970: one for all,
            or [b]. `forget(where={"expired": True})` then does it.
        tags : a list of strings for all rows, or one such list a row.
        snippets : of what each row was made of [b], to be shown with it.

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
            incoming = Incoming(self._snapshot)
            table = incoming.table(
                keys,
                labels,
                predictions,
                ids,
                groups,
                owners=owners,
                expires=expires,
                tags=tags,
                snippets=snippets,
            )
            new_ids: ndarray = table["ids"].copy()
            if len(new_ids):
                parts = with_last(self._snapshot, table)
                self._commit_rows("append", parts, lambda: (len(new_ids), incoming.changes()))
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
            incoming = Incoming(before, as_stored=as_stored)
            tables = in_segments(incoming.tables(blocks))
            first = next(tables, None)
            if first is None:
                return 0

            def after() -> tuple[int, dict[str, Any]]:
                if self._snapshot is not before:
                    raise InvalidInput("the memory was changed while its new rows were read; change it before or after")
                return incoming.n_rows, incoming.changes()

            rest = ((None, table) for table in tables)
            self._commit_rows("append", itertools.chain(with_last(before, first), rest), after)
            return incoming.n_rows

    def find(self, where: Where) -> Shaped[ndarray, " m"]:
        """Ids of the rows that meet all conditions, in row order.

        Parameters
        ----------
        where : "owner", "tag", "group" and "label" with a value or a list of values, any of which will do; "expired"
            with True, or with the moment by which a row has expired.

        Raises
        ------
        InvalidInput : if a condition is none.
        """
        snapshot = self._snapshot
        return snapshot.all_ids[matching(snapshot, where)]

    def attributes(self, ids: ArrayLike) -> Attributes:
        """What rows carry beside the numbers: owners, expiry, tags, snippets.

        Raises
        ------
        UnknownId : if the memory does not hold one of the ids.
        """
        snapshot = self._snapshot
        return snapshot.attributes(_known_rows(snapshot, as_ids(np.atleast_1d(np.asarray(ids)))))

    def inventory(self) -> Inventory:
        """What the memory holds, and of whom."""
        return inventory(self._snapshot)

    def forget(self, ids: ArrayLike | None = None, *, where: Where | None = None) -> int:
        """Mask rows at once, durably; `compact` then erases them from disk. Possible on a full disk too.

        The base model was trained on the rows and still remembers what it learned of them.

        Parameters
        ----------
        ids : of the rows; None where `where` names them.
        where : as in `find`; rows that meet the conditions, of which there may be none.

        Returns
        -------
        How many rows were masked.

        Raises
        ------
        UnknownId : if the memory does not hold one of the ids; nothing is forgotten.
        InvalidInput : if a condition is none, or not just one of both is given.
        """
        if (ids is None) == (where is None):
            raise InvalidInput("forget takes ids or where=, one of both")
        with self._changing:
            self._require_writable()
            snapshot = self._snapshot
            if where is not None:
                rows = matching(snapshot, where)
            else:
                rows = _known_rows(snapshot, np.unique(as_ids(np.atleast_1d(np.asarray(ids)))))
            if len(rows):
                self._commit_forgotten(np.sort(np.concatenate([snapshot.forgotten, rows])), len(rows))
            return len(rows)

    def compact(self, *, search_files: bool = False) -> Certificate | None:
        """Erase the forgotten rows from disk, and join the files of many small changes.

        Segments in which nothing was forgotten stay as they are, unless they are small. Saved indexes are removed,
        since they were built with the rows; the next use builds them again.

        Parameters
        ----------
        search_files : look for the erased rows' bytes in every file afterwards, which takes about as long as reading
            the memory twice.

        Returns
        -------
        What was erased, by this call or by one before it that could not remove its old files; None where nothing was.

        Raises
        ------
        StorageFailure : if the disk refuses. The memory then is as it was, or the rows are erased from it and the
            message says that their old files may still be there; call it again.
        """
        with self._changing:
            self._require_writable()
            before = self._snapshot
            gone = before.forgotten
            erased = before if len(gone) else self._unfinished
            looked_for = erased if search_files and self._directory is not None else None
            traces = None if looked_for is None else traces_of(looked_for, looked_for.forgotten)
            names = self._directory.names() if self._directory else []
            planned = plan(before)
            self._unfinished = erased
            if len(gone) or len(planned) < len(before.tables):
                changes = {"generation": before.generation + 1, "forgotten": None}
                self._commit_rows("compact", compacted(before, planned), lambda: (len(gone), changes))
            self._remove_leftovers()
            self._unfinished = None
            return None if erased is None else self._certificate(erased, names, traces)

    def save_setting(self, setting: Mapping[str, Any]) -> None:
        """Keep a tuned setting with the memory, so that whoever opens it predicts with it."""
        self._commit_description("setting", setting=dict(setting))

    def save_source(self, source: Mapping[str, Any]) -> None:
        """Keep where the rows come from: model, layer, data."""
        self._commit_description("source", source=dict(source))

    def refresh(self) -> bool:
        """See the newest version; True if it is another one than before."""
        if self._directory is None or self._writable:
            return False
        with self._changing:
            snapshot = read_snapshot(self._directory, self._snapshot)
            changed = snapshot.version != self._snapshot.version
            self._snapshot = snapshot
            return changed

    def copy(self, path: "str | os.PathLike[str]") -> "Memory":
        """A memory on disk with the rows that are not forgotten, setting and source; of the forgotten it holds nothing.

        Parameters
        ----------
        path : a new or empty directory.

        Returns
        -------
        The copy, open for writing.

        Raises
        ------
        InvalidInput : if the path already holds a memory or other files.
        StorageFailure : if the disk refuses.
        """
        snapshot = self._snapshot
        return filled(path, snapshot.manifest, (table for _, table in compacted(snapshot, plan(snapshot))))

    def verify(self, *, fast: bool = False) -> VerifyReport:
        """Compare every byte on disk with what was written; a memory in RAM is always whole.

        Parameters
        ----------
        fast : look at which files there are, their lengths and headers, and not at every byte.
        """
        return VerifyReport((), 0, 0) if self._directory is None else verify(self._directory, fast=fast)

    def saved_parts(self, snapshot: Snapshot) -> list[SavedPart]:
        """The saved parts of an index over this snapshot's rows; none in RAM."""
        return saved_parts(self._directory, snapshot) if self._directory else []

    def read_part(self, part: SavedPart) -> Pieces | None:
        """What an engine built, if it is to the byte what was saved."""
        return read_part(self._directory, part) if self._directory else None

    def save_parts(self, snapshot: Snapshot, built: Iterable[BuiltPart]) -> tuple[SavedPart, ...]:
        """Keep the parts of an index beside the rows, in the place of the index that was saved before.

        Parameters
        ----------
        snapshot : whose rows they are of.
        built : its parts; one that lies there already is not written again.

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
                for new in built:
                    part = there.get((new.name, new.first, new.n_rows))
                    if part is None or not is_whole_part(self._directory, part):
                        part = write_part(self._directory, snapshot, new)
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

    def _commit_rows(self, what: str, parts: Iterable[Part], after: Callable[[], tuple[int, dict[str, Any]]]) -> None:
        """Write the parts that are not written yet, and make all of them the memory's rows.

        Parameters
        ----------
        after : gives, when the last part is written, how many rows are concerned and what else the manifest says.
        """
        segments: list[Segment] = []
        held: list[Table] = []
        before = self._snapshot
        written: list[str] = []
        try:
            for segment, table in parts:
                if segment is None:
                    segment, table = self._write_rows(before.version + 1, table, written)
                segments.append(segment)
                held.append(table)
            rows, changes = after()
            forgotten = np.zeros(0, np.int64) if "forgotten" in changes else before.forgotten
            changes |= {"segments": tuple(segments), "library": __version__}
            self._commit(before.manifest.with_changes(what, rows, now(), **changes), held, forgotten)
        except BaseException:
            self._discard(written)
            raise

    def _commit_description(self, what: str, **changes: Any) -> None:
        with self._changing:
            self._require_writable()
            manifest = self._snapshot.manifest.with_changes(what, 0, now(), **changes)
            self._commit(manifest, self._snapshot.tables, self._snapshot.forgotten)

    def _commit_forgotten(self, gone: Int64[ndarray, " g"], n_new: int) -> None:
        version = self._snapshot.version
        try:
            self._try_to_forget(gone, n_new)
        except StorageFailure as error:
            full = self._directory is not None and error.errno in _FULL and self._snapshot.version == version
            if not (full and self._directory is not None and self._directory.release_reserve()):
                raise
            self._try_to_forget(gone, n_new)

    def _try_to_forget(self, gone: Int64[ndarray, " g"], n_new: int) -> None:
        before = self._snapshot
        written: list[str] = []
        try:
            file = self._write("gone", before.version + 1, forgotten_table(gone, before.n_rows), written)
            manifest = before.manifest.with_changes("forget", n_new, now(), forgotten=Segment(file, len(gone)))
            self._commit(manifest, before.tables, gone)
        except BaseException:
            self._discard(written)
            raise

    def _write_rows(self, version: int, table: Table, written: list[str]) -> tuple[Segment, Table]:
        """A segment, and what is read back from it; in RAM the table itself."""
        segment = Segment(self._write("rows", version, table, written), len(table["keys"]))
        if self._directory is None:
            return segment, table
        manifest = self._snapshot.manifest
        kinds = {name: kind_of(table[name]) if name in table else None for name in ("ids", "groups")}
        m = table["indices"].shape[1] if "indices" in table else None
        seen = replace(manifest, id_kind=kinds["ids"], group_kind=kinds["groups"], top_m=m)
        return segment, rows_of(self._directory, seen, segment)

    def _write(self, kind: str, version: int, table: Table, written: list[str]) -> FileRecord:
        """A table as an immutable file; in RAM nothing is written."""
        name = f"{kind}-{version:08d}-{secrets.token_hex(4)}.safetensors"
        if self._directory is None:
            return FileRecord(name, 0, 1, ())
        coded = {key: encoded_strings(value) if value.dtype.kind == "U" else value for key, value in table.items()}
        length, pieces = segment_length_and_pieces(coded)
        written.append(name)
        return self._directory.write(name, pieces, length)

    def _commit(self, manifest: Manifest, tables: Sequence[Table], forgotten: Int64[ndarray, " g"]) -> None:
        """Make a manifest the truth; only then is the change seen."""
        snapshot = Snapshot(manifest, tables, forgotten, self._snapshot)
        if self._directory is None:
            self._snapshot = snapshot
            return
        content = manifest.to_bytes()
        try:
            self._directory.replace(MANIFEST, content)
            self._adopt(snapshot)
        except BaseException:
            # Refused or interrupted after the rename: the change is made, though perhaps not yet safe.
            if self._snapshot is not snapshot and self._directory.holds(MANIFEST, content):
                self._adopt(snapshot)
            raise
        self._directory.put(COPY, content)
        _hold_room(self._directory, manifest, len(content))

    def _adopt(self, snapshot: Snapshot) -> None:
        """See a committed snapshot, and remove the files that only the one before it needed."""
        before, self._snapshot = self._snapshot, snapshot
        self._discard([record.name for record in before.manifest.files()])

    def _discard(self, names: Sequence[str]) -> None:
        """Remove those of the files that the memory does not name."""
        if self._directory is not None:
            for name in set(names) - {record.name for record in self._snapshot.manifest.files()}:
                self._directory.remove(name)

    def _remove_leftovers(self) -> None:
        """Leave no file of rows or of an index but those in use, durably."""
        directory, manifest = self._directory, self._snapshot.manifest
        if directory is None:
            return
        _sweep(directory, manifest)
        left = _leftovers(directory, manifest)
        try:
            directory.sync()
        except StorageFailure as error:
            raise StorageFailure(error.errno, f"{directory.path}: {error.strerror}{_STILL_THERE}") from error
        if left:
            raise StorageFailure(errno.EIO, f"{directory.path}: {', '.join(left)} cannot be removed{_STILL_THERE}")

    def _certificate(self, before: Snapshot, names: Sequence[str], traces: Traces | None) -> Certificate:
        snapshot, directory = self._snapshot, self._directory
        found = None if traces is None or directory is None else search(directory, snapshot, traces)
        return Certificate(
            memory=None if directory is None else directory.path.absolute().name,
            at=now(),
            library=__version__,
            version_before=before.version,
            version=snapshot.version,
            erased=len(before.forgotten),
            ids_sha256=ids_digest(before.all_ids[before.forgotten]),
            rows=len(snapshot),
            files_removed=() if directory is None else files_gone(names, directory.names()),
            search=found,
            remains=what_remains(before),
        )


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
    return Manifest(layout, __version__, class_names=names, source=source, created=now())


def begun(path: "str | os.PathLike[str] | Directory | None", manifest: Manifest) -> Memory:
    """An empty memory of which the manifest is true, open for writing.

    Raises
    ------
    InvalidInput : if the path already holds a memory or other files.
    MemoryLocked : if another process is making it right now.
    """
    snapshot = Snapshot(manifest, (), np.zeros(0, np.int64))
    if path is None:
        return Memory(None, snapshot, writable=True)
    directory = Directory.at(path)
    _require_empty(directory)
    directory.make()
    try:
        directory.lock()
        _require_empty(directory)
        directory.replace(MANIFEST, manifest.to_bytes())
        return Memory(directory, snapshot, writable=True)
    except MemoryLocked:
        raise
    except BaseException:
        directory.unlock()
        raise


def filled(path: str | os.PathLike[str], manifest: Manifest, tables: Iterable[Table]) -> Memory:
    """A new memory of which the manifest is true, but for its rows, which are these, in their stored form."""
    bare = replace(manifest, segments=(), forgotten=None, history=(), version=0, generation=0, created=now())
    memory = begun(path, bare)
    rows = 0

    def counted() -> Iterator[Part]:
        nonlocal rows
        for table in in_segments(tables):
            rows += len(table["ids"])
            yield None, table

    try:
        memory._commit_rows("append", counted(), lambda: (rows, {}))
    except BaseException:
        memory.close()
        raise
    return memory


def _in_ram(manifest: Manifest, tables: Sequence[Table], forgotten: Int64[ndarray, " g"]) -> Memory:
    return Memory(None, Snapshot(manifest, tables, forgotten), writable=True)


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


def _sweep(directory: Directory, manifest: Manifest) -> None:
    for name in _leftovers(directory, manifest):
        directory.remove(name)


def _hold_room(directory: Directory, manifest: Manifest, length: int) -> None:
    """Keep as much of the disk as forgetting may need, where there is that much; `length` is the manifest's."""
    directory.keep_reserve(RESERVE_BYTES + 2 * length + manifest.n_rows // 8)


def _leftovers(directory: Directory, manifest: Manifest) -> list[str]:
    """What an interrupted writer left behind, and saved indexes of rows that are erased."""
    named = {record.name for record in manifest.files()}
    ours = [name for name in directory.names() if name.startswith(_PREFIXES) or name == MANIFEST + PART]
    return [name for name in ours if name not in named] + stale(directory, manifest.generation)


def _known_rows(snapshot: Snapshot, ids: Shaped[ndarray, " b"]) -> Int64[ndarray, " b"]:
    """The row of each id.

    Raises
    ------
    UnknownId : if the memory does not hold one.
    """
    rows = snapshot.rows_of(ids)
    if (rows < 0).any():
        unknown = ids[rows < 0]
        shown = ", ".join(map(repr, unknown[:5].tolist()))
        raise UnknownId(f"the memory does not hold {len(unknown):,} of the {len(ids):,} ids, for example {shown}")
    return rows


def now() -> str:
    """The moment as a manifest says it, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
