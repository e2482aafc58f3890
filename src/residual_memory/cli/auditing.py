"""`resmem audit`: what a memory tells of the rows in it."""

from typing import Annotated

import typer

from residual_memory.cli import options
from residual_memory.cli.data import Reading, read_all, rows_for
from residual_memory.cli.measuring import saved_setting
from residual_memory.cli.options import BatchSize, Data, ImageSize, Index, Json, MemoryPath, Model, Outputs
from residual_memory.cli.output import facts, report, table
from residual_memory.indexes.registry import check_index
from residual_memory.privacy import MAX_WEIGHTS, N_MEMBERS, audit_privacy
from residual_memory.validation import as_count, as_fraction

MEANING = (
    "An AUC is how often a member looks more like one than another row does: at 0.5 nobody can tell, at 1 everybody, "
    "and what is as far below 0.5 tells as much. "
    "These are plain attacks on average rows, so the figures are no bound: a better attack, or an unusual row, may "
    "give more away."
)


def privacy(
    path: MemoryPath,
    data: Data,
    model: Model = None,
    outputs: Outputs = "logits",
    max_weight: Annotated[
        list[float] | None,
        typer.Option(
            "--max-weight",
            metavar="W",
            help="A cap on what one row may contribute; again to try several. 1 is none.",
            show_default=", ".join(f"{value:g}" for value in MAX_WEIGHTS),
        ),
    ] = None,
    members: Annotated[
        int, typer.Option("--members", metavar="N", help="Rows of the memory to ask about, drawn at random.")
    ] = N_MEMBERS,
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Of the draw.")] = 0,
    index: Index = "auto",
    batch_size: BatchSize = None,
    image_size: ImageSize = None,
    as_json: Json = False,
) -> None:
    """Attack the memory: tell its rows from rows that it does not hold, with and without a cap on weights.

    The data are rows that are not in the memory, drawn like those that are. The setting is the saved one.
    """
    memory = options.open_memory(path)
    check_index(index, memory.layout.dim)
    caps = [as_fraction("--max-weight", value, above_zero=True) for value in max_weight or MAX_WEIGHTS]
    count = as_count("--members", members)
    rows = read_all(rows_for(data, memory, Reading(model, outputs, batch_size, image_size)), memory)
    setting = saved_setting(memory)
    found = audit_privacy(
        memory,
        rows.keys,
        rows.labels,
        rows.predictions,
        setting,
        max_weights=caps,
        n_members=count,
        seed=seed,
        index=index,
        groups=rows.groups,
    )
    report(
        {
            "memory": memory.path,
            "data": data,
            **found.to_dict(),
            "seed": seed,
            "verdict": found.verdict,
            "setting": setting.to_dict(),
        },
        f"{found.n_members:,} rows of the memory against {found.n_rows:,} that it does not hold; 95 % intervals",
        "",
        facts(found.facts),
        "",
        table(found.table[0], found.table[1:], numbers=found.table[0]),
        "",
        found.verdict,
        MEANING,
        as_json=as_json,
    )
