"""`resmem export`, `import` and `merge`: memories into files, files into memories, and several memories into one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from residual_memory.cli import options
from residual_memory.cli.options import Json, MemoryPath, chosen, open_memory, similar
from residual_memory.cli.output import report, shown, size_text
from residual_memory.errors import DataNotFound
from residual_memory.exchange import export_memory, import_memory, merge_memories
from residual_memory.memory import Memory
from residual_memory.memory.codes import LOG_SCALES
from residual_memory.types import Metric
from residual_memory.validation import as_count

_FORMS = ".npz, .parquet, .arrow, .feather or .safetensors"


def export(
    path: MemoryPath,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help=f"What to write; it ends in {_FORMS}.", show_default=False)
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Take the place of a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a memory's rows to one file that other tools read, and from which `resmem import` makes it again."""
    n_rows = export_memory(open_memory(path), file, overwrite=overwrite)
    size = file.stat().st_size
    report(
        {"memory": path, "file": file, "rows": n_rows, "bytes": size},
        f"{n_rows:,} rows of {path} in {file}, {size_text(size)}",
        as_json=as_json,
    )


def import_(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help=f"{_FORMS}, or a folder of .npy files.", show_default=False),
    ],
    path: Annotated[Path, typer.Argument(metavar="MEMORY", help="Directory to make.", show_default=False)],
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="TASK", help="classification or regression; by default read off the labels."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="METRIC", help="Distance of keys: euclidean or cosine.")
    ] = None,
    n_outputs: Annotated[
        int | None,
        typer.Option("--n-outputs", metavar="N", help="More classes than the file's leave room for new ones."),
    ] = None,
    class_names: Annotated[
        Path | None, typer.Option("--class-names", metavar="FILE", help="Names of the classes, one a line.")
    ] = None,
    key_dtype: Annotated[
        str | None, typer.Option("--key-dtype", metavar="TYPE", help="Stored keys: float16, float32 or float64.")
    ] = None,
    prediction_dtype: Annotated[
        str | None,
        typer.Option(
            "--prediction-dtype", metavar="TYPE", help="Stored predictions, likewise; of top-m ones also log8 or log16."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a memory of a file of rows, all of them or none.

    A file of `resmem export` makes the same memory again; the options are for other files, or to change something.
    """
    asked = None if metric is None else chosen("--metric", metric, ("euclidean", "cosine"))
    types = (*options.DTYPES, *LOG_SCALES)
    try:
        memory = import_memory(
            file,
            path,
            task=options.task_named(task),
            metric=cast(Metric | None, asked),
            n_outputs=None if n_outputs is None else as_count("--n-outputs", n_outputs),
            class_names=None if class_names is None else options.lines_of(class_names),
            key_dtype=None if key_dtype is None else chosen("--key-dtype", key_dtype, options.DTYPES),
            prediction_dtype=None
            if prediction_dtype is None
            else chosen("--prediction-dtype", prediction_dtype, types),
        )
    except DataNotFound as error:
        raise DataNotFound(f"{error}{similar(file)}") from None
    with memory:
        _report_made(memory, [file], as_json)


def merge(
    paths: Annotated[
        list[Path], typer.Argument(metavar="MEMORY...", help="Directories of the memories.", show_default=False)
    ],
    to: Annotated[Path, typer.Option("--to", metavar="MEMORY", help="Directory to make.", show_default=False)],
    ids: Annotated[
        str, typer.Option("--ids", metavar="KIND", help="keep the rows' ids, or give new ones from 0.")
    ] = "keep",
    any_source: Annotated[
        bool, typer.Option("--any-source", help="Merge memories of different models, layers or data too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make one memory with the rows of several, in order; those stay as they are."""
    kind = cast(Literal["keep", "new"], chosen("--ids", ids, ("keep", "new")))
    memories = [open_memory(path) for path in paths]
    with merge_memories(memories, to, ids=kind, check_source=not any_source) as memory:
        _report_made(memory, paths, as_json)


def _report_made(memory: Memory, sources: Sequence[Path], as_json: bool) -> None:
    layout = memory.layout
    report(
        {
            "memory": memory.path,
            "from": list(sources),
            "rows": len(memory),
            "bytes": memory.n_bytes,
            "layout": vars(layout),
            "next_id": memory.next_id,
        },
        f"{len(memory):,} rows in {memory.path}, {size_text(memory.n_bytes)}, from {', '.join(map(shown, sources))}",
        f"{layout.task} with {layout.n_outputs:,} outputs, keys of {layout.dim:,} numbers",
        as_json=as_json,
    )
