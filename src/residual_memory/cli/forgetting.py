"""`resmem forget`, `compact` and `inventory`: whose rows there are, and rows that go."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from residual_memory.cli.carrying import Owners, WithTags, as_kind, meant, moment_text, where_of
from residual_memory.cli.options import Json, MemoryPath, leave_out, lines_of, open_memory
from residual_memory.cli.output import report, table
from residual_memory.display import shown, size_text
from residual_memory.errors import InvalidInput, StorageFailure
from residual_memory.memory import Certificate, Memory

TOP = 20  # entries of a count that people are shown

CertificateFile = Annotated[
    Path | None,
    typer.Option(
        "--certificate",
        metavar="FILE",
        help="Look for the erased rows' bytes in every file, and write down what was erased and found.",
        show_default=False,
    ),
]


def forget(
    path: MemoryPath,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID...", help="Ids of the rows.", show_default=False)
    ] = None,
    ids_file: Annotated[
        Path | None, typer.Option("--ids-file", metavar="FILE", help="A file of ids, one a line.", show_default=False)
    ] = None,
    owner: Owners = None,
    tag: WithTags = None,
    group: Annotated[
        list[str] | None,
        typer.Option("--group", metavar="GROUP", help="Rows of this group; may be repeated.", show_default=False),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="CLASS", help="Rows of this class; may be repeated.", show_default=False),
    ] = None,
    expired: Annotated[bool, typer.Option("--expired", help="Rows whose moment has come.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many rows it would be, and change nothing.")] = (
        False
    ),
    erase: Annotated[bool, typer.Option("--erase", help="Erase them from disk right away, as compact does.")] = False,
    certificate: CertificateFile = None,
    as_json: Json = False,
) -> None:
    """Take rows out of use at once; `resmem compact` then erases them from disk.

    All or none: an id that the memory does not hold changes nothing. Of one condition that is repeated any will do; of
    several different ones a row must meet all.

    Example: resmem forget memory --owner alice --erase --certificate alice.json
    """
    wanted = [*(ids or []), *(lines_of(ids_file) if ids_file else [])]
    if dry_run:
        leave_out("--dry-run changes nothing", {"--erase": erase, "--certificate": certificate is not None})
    if certificate is not None and not erase:
        raise InvalidInput("--certificate is of rows that are erased; add --erase")
    _check_free(certificate)
    with open_memory(path, writable=not dry_run) as memory:
        where = where_of(memory, owners=owner, tags=tag, groups=group, labels=label, expired=expired)
        if bool(wanted) == bool(where):
            raise InvalidInput(
                "rows are named by their ids and by conditions; use one of both"
                if wanted
                else "no ids are given; name them on the command line or in a file with --ids-file, or use --owner, "
                "--tag, --group, --label or --expired"
            )
        named = as_kind("id", wanted, memory.snapshot.manifest.id_kind, memory)
        if dry_run:
            _report_dry(memory, _count(memory, named, where), where, as_json)
            return
        forgotten = memory.forget(where=where) if where else memory.forget(named)
        lines = [f"forgot {forgotten:,} rows; {path} holds {len(memory):,}"]
        if where and not forgotten:
            lines = [f"no row is meant; {path} holds {len(memory):,}", *filter(None, [meant(memory, where)])]
        result = {"memory": path, "forgotten": forgotten, "rows": len(memory)}
        found = False
        if erase:
            erased, more, found = _erased(memory, certificate)
            lines, result = [*lines, *more], {**result, **erased}
        elif forgotten:
            lines.append("the bytes stay on disk until: resmem compact " + shown(path))
        if forgotten:
            lines.append("the base model was trained on the rows and still remembers what it learned of them")
        report({**result, "version": memory.version}, *lines, as_json=as_json)
    if found:
        raise typer.Exit(1)


def compact(path: MemoryPath, certificate: CertificateFile = None, as_json: Json = False) -> None:
    """Erase forgotten rows from disk and join the files of many small changes.

    With a certificate it exits with 1 if the rows' bytes are found anywhere.
    """
    _check_free(certificate)
    with open_memory(path, writable=True) as memory:
        before = memory.n_bytes
        result, lines, found = _erased(memory, certificate)
        report(
            {
                "memory": path,
                **result,
                "rows": len(memory),
                "bytes_before": before,
                "bytes": memory.n_bytes,
                "segments": len(memory.snapshot.manifest.segments),
                "version": memory.version,
            },
            *lines,
            f"{path} holds {len(memory):,} rows: {size_text(before)} before, {size_text(memory.n_bytes)} now",
            as_json=as_json,
        )
    if found:
        raise typer.Exit(1)


def inventory(path: MemoryPath, owner: Owners = None, tag: WithTags = None, as_json: Json = False) -> None:
    """Count the rows by owner, tag and label, and those that have expired.

    With --owner or --tag it lists the ids of those rows instead.
    """
    memory = open_memory(path)
    if where := where_of(memory, owners=owner, tags=tag):
        ids = memory.find(where).tolist()
        report(
            {"memory": path, "where": where, "rows": len(ids), "ids": ids},
            f"{len(ids):,} of {len(memory):,} rows",
            *map(str, ids),
            *([] if ids else filter(None, [meant(memory, where)])),
            as_json=as_json,
        )
        return
    held = memory.inventory()
    names = memory.class_names
    labels = [(names[label] if names else label, count) for label, count in held.labels.items()]
    erasable = f", {held.forgotten:,} forgotten but not erased" if held.forgotten else ""
    parts: list[str | Table] = [f"{held.rows:,} rows{erasable}"]
    if set(held.owners) - {""}:
        parts += _counts("owner", [(owner or "(nobody)", count) for owner, count in held.owners.items()])
    parts += _counts("tag", list(held.tags.items())) + _counts("label", labels)
    if held.groups:
        parts.append(f"{held.groups:,} groups")
    if held.snippets:
        parts.append(f"{held.snippets:,} rows with a snippet")
    if held.expired:
        parts.append(f"{held.expired:,} rows have expired: resmem forget {shown(path)} --expired")
    if held.next_expiry is not None:
        parts.append(f"the next rows expire at {moment_text(held.next_expiry)}")
    report({"memory": path, **asdict(held)}, *parts, as_json=as_json)


def _counts(what: str, counts: Sequence[tuple[object, int]]) -> list[str | Table]:
    if not counts:
        return []
    made = table((what, "rows"), [(name, f"{count:,}") for name, count in counts[:TOP]], numbers=("rows",))
    more = len(counts) - TOP
    return [made, *([f"and {more:,} more"] if more > 0 else [])]


def _count(memory: Memory, ids: list[Any], where: dict[str, Any]) -> int:
    """How many rows are meant; refuses an id that the memory does not hold."""
    if where:
        return len(memory.find(where))
    memory.attributes(ids)
    return len(np.unique(np.asarray(ids)))


def _report_dry(memory: Memory, count: int, where: dict[str, Any], as_json: bool) -> None:
    report(
        {"memory": memory.path, "would_forget": count, "rows": len(memory), "version": memory.version},
        f"would forget {count:,} of {len(memory):,} rows; nothing was changed",
        *([] if count else filter(None, [meant(memory, where)])),
        as_json=as_json,
    )


def _check_free(certificate: Path | None) -> None:
    """Refuse a place for a certificate before anything is erased."""
    if certificate is None:
        return
    folder = certificate.absolute().parent
    if certificate.exists():
        raise InvalidInput(f"{certificate} is there already, and a certificate is not overwritten; name another file")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InvalidInput(f"{certificate} cannot be written in {folder}; name a folder that is there and writable")


def _erased(memory: Memory, file: Path | None) -> tuple[dict[str, Any], list[str], bool]:
    """What a compaction says as JSON and to people, and whether bytes of the rows were found."""
    made = memory.compact(search_files=file is not None)
    result: dict[str, Any] = {"erased": made.erased if made else 0}
    if file is None:
        return result, [f"erased {result['erased']:,} rows"], False
    if made is None:
        return {**result, "certificate": None}, [f"nothing to erase: {shown(file)} is not written"], False
    try:
        made.save(file)
    except OSError as error:
        lost = f"{file}: {error.strerror}; the rows are erased, but their certificate is lost"
        raise StorageFailure(error.errno, lost) from error
    lines = [f"erased {made.erased:,} rows; the certificate is {shown(file)}", *_searched(made)]
    lines += [f"remains: {remains}" for remains in made.remains]
    found = made.search is not None and made.search.found > 0
    return {**result, "certificate": file, "search": made.search and asdict(made.search)}, lines, found


def _searched(made: Certificate) -> list[str]:
    if made.search is None:
        return []
    looked = made.search
    where = f"{looked.files:,} files, {size_text(looked.bytes)}"
    lines = [f"looked for {looked.traces:,} values of the rows in {where}: none is there"]
    if looked.found:
        lines = [
            f"FOUND {looked.found:,} values of the erased rows in {where}",
            "run resmem compact once more; if they stay, remove files that are not the memory's own from its directory",
        ]
    if looked.shared:
        lines.append(f"{looked.shared:,} values are those of rows that stay, equal to the last bit")
    if looked.too_plain:
        lines.append(f"{looked.too_plain:,} values were too short or too plain to look for")
    return lines
