"""`resmem export`, `import`, `merge` and `shrink`: memories into files, files into memories, memories of memories."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from residual_memory.cli import options
from residual_memory.cli.options import Json, MemoryPath, chosen, open_memory, similar
from residual_memory.cli.output import facts, report
from residual_memory.display import shown, size_text
from residual_memory.errors import DataNotFound
from residual_memory.exchange import export_memory, import_memory, merge_memories
from residual_memory.memory import Memory
from residual_memory.memory.codes import LOG_SCALES
from residual_memory.shrinking import shrink as shrink_memory
from residual_memory.types import Metric
from residual_memory.validation import as_count, as_fraction, as_non_negative

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


def shrink(
    path: MemoryPath,
    to: Annotated[Path, typer.Argument(metavar="TO", help="Directory to make.", show_default=False)],
    keep_rows: Annotated[
        float,
        typer.Option("--keep-rows", metavar="SHARE", help="Draw this share of the rows, large residuals more often."),
    ] = 1.0,
    smallest_residual: Annotated[
        float,
        typer.Option(
            "--smallest-residual",
            metavar="SIZE",
            help="Leave out all rows of which the base missed less: 1 - its probability of the label, or the distance "
            "of its value.",
        ),
    ] = 0.0,
    twins_within: Annotated[
        float | None,
        typer.Option(
            "--twins-within",
            metavar="MULTIPLE",
            help="Of rows of one label whose keys lie close together, the first stays: 1 is the usual distance to the "
            "nearest row of the same label, 0 means equal keys.",
            show_default=False,
        ),
    ] = None,
    within_groups: Annotated[
        bool, typer.Option("--within-groups", help="Twins are of one group too, such as a document.")
    ] = False,
    top_m: Annotated[
        int | None,
        typer.Option("--top-m", metavar="M", help="Keep the M largest probabilities of each row.", show_default=False),
    ] = None,
    prediction_dtype: Annotated[
        str | None,
        typer.Option(
            "--prediction-dtype",
            metavar="TYPE",
            help="Stored predictions: float16, float32, float64; of top-m ones also log8, the default of --top-m on "
            "whole predictions, or log16.",
            show_default=False,
        ),
    ] = None,
    key_dtype: Annotated[
        str | None,
        typer.Option(
            "--key-dtype", metavar="TYPE", help="Stored keys: float16, float32 or float64.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the draw.")] = 0,
    as_json: Json = False,
) -> None:
    """Make a smaller memory of one: fewer rows, and shorter ones. The old one stays as it is.

    Tune the new one on held-out data, and compare the two gains before the old one goes.
    """
    types = (*options.DTYPES, *LOG_SCALES)
    old = open_memory(path)
    made = shrink_memory(
        old,
        to,
        keep_rows=as_fraction("--keep-rows", keep_rows, above_zero=True),
        smallest_residual=as_non_negative("--smallest-residual", smallest_residual),
        twins_within=None if twins_within is None else as_non_negative("--twins-within", twins_within),
        within_groups=within_groups,
        top_m=None if top_m is None else as_count("--top-m", top_m),
        prediction_dtype=None if prediction_dtype is None else chosen("--prediction-dtype", prediction_dtype, types),
        key_dtype=None if key_dtype is None else chosen("--key-dtype", key_dtype, options.DTYPES),
        seed=seed,
    )
    with made.memory as new:
        sizes = [_row_bytes(memory) for memory in (old, new)]
        left_out = {"twins": made.twins, "small": made.small, "not_drawn": made.not_drawn}
        near = "" if made.twin_distance is None else f" within {made.twin_distance:.3g}"
        lost = old.setting is not None and new.setting is None
        report(
            {
                "memory": new.path,
                "from": path,
                "rows_before": made.n_rows,
                "rows": len(new),
                "left_out": left_out,
                "twin_distance": made.twin_distance,
                "bytes_before": old.n_bytes,
                "bytes": new.n_bytes,
                "bytes_per_row_before": sizes[0],
                "bytes_per_row": sizes[1],
                "layout": vars(new.layout),
                "setting_kept": new.setting is not None,
            },
            f"{len(new):,} of {made.n_rows:,} rows of {path} in {to}, {size_text(new.n_bytes)} of "
            f"{size_text(old.n_bytes)}",
            facts(
                [
                    (
                        "left out",
                        f"{made.twins:,} twins{near}, {made.small:,} small residuals, {made.not_drawn:,} not drawn",
                    ),
                    ("bytes a row", f"{sizes[1]:,}, before {sizes[0]:,}"),
                ]
            ),
            *(["the setting did not move along; resmem tune chooses a new one"] if lost else []),
            as_json=as_json,
        )


def _row_bytes(memory: Memory) -> int:
    return memory.layout.bytes_per_row(memory.snapshot.manifest.top_m)


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
