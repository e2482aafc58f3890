"""`resmem index`, `verify`, `salvage` and `info`: looking after a memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from residual_memory.cli.carrying import moment_text
from residual_memory.cli.options import Index, Json, MemoryPath, open_memory, similar
from residual_memory.cli.output import facts, report, table
from residual_memory.correction import ResidualKNN
from residual_memory.display import shown, size_text
from residual_memory.errors import CorruptFile, MemoryNotFound
from residual_memory.indexes.registry import check_index
from residual_memory.memory import Inventory, Memory, Problem
from residual_memory.memory import salvage as salvage_memory
from residual_memory.memory import verify as verify_memory
from residual_memory.memory.attributes import is_attribute
from residual_memory.memory.format import COPY
from residual_memory.memory.saved import SavedPart

CHANGES = 10  # that info tells of


def index(path: MemoryPath, spec: Index = "auto", as_json: Json = False) -> None:
    """Build a search index and keep it with the memory: whoever opens it with the same engine need not build it again.

    `resmem compact` takes it away.
    """
    with open_memory(path, writable=True) as memory:
        check_index(spec, memory.layout.dim)
        knn = ResidualKNN(memory, n_neighbors=1, bandwidth=1.0, index=spec)
        knn.save_index()
        report(
            {"memory": path, "index": knn.description, "rows": len(memory), "version": memory.version},
            f"saved {knn.description}, {len(memory):,} rows",
            as_json=as_json,
        )


def verify(
    path: MemoryPath,
    fast: Annotated[
        bool, typer.Option("--fast", help="Look at files, lengths and headers, and not at every byte.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare every byte on disk with what was written; exits with 1 where something differs."""
    try:
        found = verify_memory(path, fast=fast)
    except MemoryNotFound as error:
        raise MemoryNotFound(f"{error}{similar(path)}") from None
    problems, ignored = _listed(found.problems), _listed(found.ignored)
    read = f"{found.n_files:,} files, {size_text(found.n_bytes)}"
    lines: list[str | Table]
    if found.ok:
        beside = "" if not ignored else ", but not what lies beside the rows"
        lines = [f"whole: {read} are as they were written" if not ignored else f"whole: {read}{beside}"]
        if fast:
            lines = [f"whole as far as names, lengths and headers tell: {found.n_files:,} files; no value was read"]
    else:
        lines = [
            f"damaged: {len(problems):,} places in {read}",
            _file_table(problems),
            "restore the named files from a copy, or save the whole rows: resmem salvage " + shown(path) + " TO",
        ]
    if ignored:
        lines.append(_file_table(ignored))
        if any(problem["file"] == COPY for problem in ignored):
            lines.append("the copy of the manifest is written anew by the next change")
        if any(problem["file"] != COPY for problem in ignored):
            lines.append("a saved index that is damaged is passed over and built again")
    report(
        {
            "memory": path,
            "ok": found.ok,
            "full": found.full,
            "problems": problems,
            "ignored": ignored,
            "files": found.n_files,
            "bytes": found.n_bytes,
        },
        *lines,
        as_json=as_json,
    )
    if not found.ok:
        raise typer.Exit(1)


def salvage(
    path: MemoryPath,
    to: Annotated[Path, typer.Argument(metavar="TO", help="Directory to make.", show_default=False)],
    keep_forgotten: Annotated[
        bool,
        typer.Option("--keep-forgotten", help="Save all rows where it cannot be read which ones were forgotten."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a new memory of the rows of a damaged one that are whole; exits with 1 if rows are lost.

    The damaged memory is not changed.
    """
    try:
        saved = salvage_memory(path, to, keep_forgotten=keep_forgotten)
    except MemoryNotFound as error:
        raise MemoryNotFound(f"{error}{similar(path)}") from None
    except CorruptFile as error:
        raise CorruptFile(str(error).replace("keep_forgotten=True", "--keep-forgotten")) from None
    problems = _listed(saved.problems)
    report(
        {"memory": path, "to": to, "rows": saved.rows, "lost": saved.lost, "problems": problems},
        f"saved {saved.rows:,} rows in {to}; {saved.lost:,} are lost",
        *([_file_table(problems)] if problems else [f"{path} is whole: a copy would have done"]),
        as_json=as_json,
    )
    if saved.lost:
        raise typer.Exit(1)


def _listed(problems: Sequence[Problem]) -> list[dict[str, str]]:
    return [{"file": problem.file, "what": problem.what} for problem in problems]


def _file_table(problems: list[dict[str, str]]) -> Table:
    return table(("file", "what"), [(problem["file"], problem["what"]) for problem in problems])


def info(path: MemoryPath, as_json: Json = False) -> None:
    """What a memory holds, where it comes from, and what it takes."""
    memory = open_memory(path)
    layout, manifest = memory.layout, memory.snapshot.manifest
    stored = len(memory) + memory.n_forgotten
    held = memory.inventory() if _carries(memory) else None
    result: dict[str, Any] = {
        "memory": path,
        "rows": len(memory),
        "forgotten": memory.n_forgotten,
        "version": memory.version,
        "created": manifest.created,
        "library": manifest.library,
        "layout": vars(layout),
        "ids": manifest.id_kind,
        "groups": manifest.group_kind,
        "class_names": memory.class_names,
        "bytes": memory.n_bytes,
        "bytes_per_row": memory.n_bytes / stored if stored else None,
        "segments": _n_segments(memory),
        "source": _source_of(memory),
        "setting": memory.setting,
        "carried": None if held is None else {name: getattr(held, name) for name in _CARRIED},
        "saved_indexes": [_index_of(part) for part in memory.saved_parts(memory.snapshot)],
        "history": [vars(change) for change in memory.history[-CHANGES:]],
    }
    names = ", ".join(shown(name, 24) for name in (memory.class_names or ())[:6])
    more = len(memory.class_names or ()) - 6
    report(
        result,
        facts(
            [
                ("memory", path),
                (
                    "rows",
                    f"{len(memory):,}"
                    + (f" ({memory.n_forgotten:,} forgotten, not erased)" if memory.n_forgotten else ""),
                ),
                ("task", f"{layout.task}, {layout.n_outputs:,} outputs"),
                *([("classes", names + (f" and {more:,} more" if more > 0 else ""))] if names else []),
                ("keys", f"{layout.dim:,} numbers, {layout.key_dtype}, {layout.metric}"),
                ("predictions", f"{layout.residuals}, {layout.prediction_dtype}"),
                (
                    "size",
                    size_text(memory.n_bytes) + (f", {result['bytes_per_row']:,.0f} bytes a row" if stored else ""),
                ),
                ("files", f"{result['segments']:,} segments, version {memory.version:,}"),
                ("created", f"{manifest.created} by residual-memory {manifest.library}"),
                ("source", _source_text(memory)),
                ("setting", _setting_text(memory)),
                *([] if held is None else [("owners", _carried_text(held))]),
                *(("index", f"{part['rows']:,} rows, {part['index']}") for part in result["saved_indexes"]),
            ]
        ),
        *([_history_table(memory)] if memory.history else []),
        as_json=as_json,
    )


def _index_of(part: SavedPart) -> dict[str, Any]:
    return {"index": part.description, "first_row": part.first, "rows": part.n_rows, "measured": part.measured}


_CARRIED = ("owners", "tags", "expired", "next_expiry", "snippets")


def _carries(memory: Memory) -> bool:
    """Whether a segment says anything of its rows beside the numbers; counting takes as long as reading that."""
    return any(is_attribute(name) for table in memory.snapshot.tables for name in table)


def _carried_text(held: Inventory) -> str:
    parts = [f"{len(set(held.owners) - {''}):,}"]
    if held.owners.get("") and len(held.owners) > 1:
        parts.append(f"{held.owners['']:,} rows of nobody")
    if held.expired:
        parts.append(f"{held.expired:,} rows have expired")
    if held.next_expiry is not None:
        parts.append(f"the next expire at {moment_text(held.next_expiry)}")
    return ", ".join(parts)


def _history_table(memory: Memory) -> Table:
    rows = [(f"{c.version:,}", c.at, c.what, f"{c.rows:,}") for c in memory.history[-CHANGES:]]
    return table(("version", "when", "what", "rows"), rows, numbers=("version", "rows"))


def _n_segments(memory: Memory) -> int:
    return len(memory.snapshot.manifest.segments)


def _source_of(memory: Memory) -> Mapping[str, Any] | None:
    """The source, with the shape of a projection in place of its numbers."""
    source = memory.source
    matrix = source and source.get("projection")
    return source if not source or not matrix else {**source, "projection": matrix.partition(":")[0]}


def _source_text(memory: Memory) -> str:
    if memory.source is None:
        return "arrays"
    source = memory.source
    state = "" if source["complete"] else "; the build did not end: run it again"
    return f"{source['side']} of {source['layer']!r} of {source['model'].get('class')}{state}"


def _setting_text(memory: Memory) -> str:
    if memory.setting is None:
        return "none saved: resmem tune chooses one"
    plain = {name: value for name, value in memory.setting.items() if name != "gate"}
    named = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in plain.items()]
    return ", ".join([*named, *(["gated"] if memory.setting.get("gate") else [])])
