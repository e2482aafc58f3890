"""`resmem forget`, `compact`, `index`, `verify` and `info`: looking after a memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from residual_memory.cli.options import Index, Json, MemoryPath, check_index, lines_of, open_memory, similar
from residual_memory.cli.output import facts, report, shown, size_text, table
from residual_memory.correction import ResidualKNN
from residual_memory.errors import InvalidInput, MemoryNotFound
from residual_memory.memory import Memory, Problem
from residual_memory.memory import verify as verify_memory


def forget(
    path: MemoryPath,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID...", help="Ids of the rows.", show_default=False)
    ] = None,
    ids_file: Annotated[
        Path | None, typer.Option("--ids-file", metavar="FILE", help="A file of ids, one a line.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Take rows out of use at once; `resmem compact` then erases them from disk.

    All or none: an id that the memory does not hold changes nothing.
    """
    wanted = [*(ids or []), *(lines_of(ids_file) if ids_file else [])]
    if not wanted:
        raise InvalidInput("no ids are given; name them on the command line, or in a file with --ids-file")
    with open_memory(path, writable=True) as memory:
        before = len(memory)
        memory.forget(_as_kind(wanted, memory))
        forgotten = before - len(memory)
        report(
            {"memory": path, "forgotten": forgotten, "rows": len(memory), "version": memory.version},
            f"forgot {forgotten:,} rows; {path} holds {len(memory):,}",
            "the bytes stay on disk until: resmem compact " + shown(path),
            "the base model was trained on the rows and still remembers what it learned of them",
            as_json=as_json,
        )


def compact(path: MemoryPath, as_json: Json = False) -> None:
    """Erase forgotten rows from disk and join the files of many small changes."""
    with open_memory(path, writable=True) as memory:
        erased, before = memory.n_forgotten, memory.n_bytes
        memory.compact()
        report(
            {
                "memory": path,
                "erased": erased,
                "rows": len(memory),
                "bytes_before": before,
                "bytes": memory.n_bytes,
                "segments": _n_segments(memory),
                "version": memory.version,
            },
            f"erased {erased:,} rows; {path} holds {len(memory):,}",
            f"{size_text(before)} before, {size_text(memory.n_bytes)} now",
            as_json=as_json,
        )


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


def verify(path: MemoryPath, as_json: Json = False) -> None:
    """Compare every byte on disk with what was written; exits with 1 where something differs."""
    try:
        found = verify_memory(path)
    except MemoryNotFound as error:
        raise MemoryNotFound(f"{error}{similar(path)}") from None
    problems, ignored = _listed(found.problems), _listed(found.ignored)
    read = f"{found.n_files:,} files, {size_text(found.n_bytes)}"
    lines: list[str | Table]
    if found.ok:
        lines = [
            f"whole: {read} are as they were written" if not ignored else f"whole: {read}, but not its saved index"
        ]
    else:
        lines = [
            f"damaged: {len(problems):,} of {read}",
            _file_table(problems),
            "restore the named files from a copy, or build the memory again",
        ]
    if ignored:
        lines += [_file_table(ignored), "a saved index that is damaged is passed over and built again"]
    report(
        {
            "memory": path,
            "ok": found.ok,
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


def _listed(problems: Sequence[Problem]) -> list[dict[str, str]]:
    return [{"file": problem.file, "what": problem.what} for problem in problems]


def _file_table(problems: list[dict[str, str]]) -> Table:
    return table(("file", "what"), [(problem["file"], problem["what"]) for problem in problems])


def info(path: MemoryPath, as_json: Json = False) -> None:
    """What a memory holds, where it comes from, and what it takes."""
    memory = open_memory(path)
    layout, manifest = memory.layout, memory.snapshot.manifest
    stored = len(memory) + memory.n_forgotten
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
            ]
        ),
        as_json=as_json,
    )


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


def _as_kind(wanted: list[str], memory: Memory) -> list[Any]:
    """Ids as the memory has them: integers or strings."""
    if memory.snapshot.manifest.id_kind == "string":
        return wanted
    try:
        return [int(text) for text in wanted]
    except ValueError:
        bad = next(text for text in wanted if not text.strip().isdecimal())
        raise InvalidInput(f"{bad!r} is not an id of {memory.path}, whose ids are whole numbers from 0") from None
