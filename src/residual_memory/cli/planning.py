"""`resmem estimate`: what a memory will take, before it is built."""

import re
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from residual_memory import planning
from residual_memory.cli import options
from residual_memory.cli.options import Index, Json, chosen
from residual_memory.cli.output import facts, report, unbroken
from residual_memory.display import size_text
from residual_memory.errors import InvalidInput
from residual_memory.memory.codes import LOG_SCALES
from residual_memory.planning import Plan
from residual_memory.validation import as_count

_UNITS = {"": 1, **{letter: 1000**power for power, letter in enumerate("kMGTP", 1)}}
_BINARY = {f"{letter}i": 1024**power for power, letter in enumerate("KMGTP", 1)}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGTP]?i?)B?")


def estimate(
    rows: Annotated[int, typer.Option("--rows", metavar="N", help="Examples to remember.", show_default=False)],
    dim: Annotated[int, typer.Option("--dim", metavar="D", help="Numbers in a key.", show_default=False)],
    n_outputs: Annotated[int, typer.Option("--outputs", metavar="C", help="Classes, or targets.", show_default=False)],
    key_dtype: Annotated[
        str, typer.Option("--key-dtype", metavar="TYPE", help="float16, float32 or float64.")
    ] = "float32",
    prediction_dtype: Annotated[
        str, typer.Option("--prediction-dtype", metavar="TYPE", help="Likewise; with --top-m also log8 or log16.")
    ] = "float32",
    top_m: Annotated[
        int | None,
        typer.Option("--top-m", metavar="M", help="Keep the M largest probabilities of each row, not all."),
    ] = None,
    task: Annotated[
        str, typer.Option("--task", metavar="TASK", help="classification or regression.")
    ] = "classification",
    index: Index = "auto",
    path: Annotated[
        Path,
        typer.Option("--path", metavar="MEMORY", help="Where the memory is to lie: that disk is looked at."),
    ] = Path("."),
    disk: Annotated[
        str | None,
        typer.Option(
            "--disk", metavar="SIZE", help="Free on that disk, such as 2TB; by default what is.", show_default=False
        ),
    ] = None,
    ram: Annotated[
        str | None,
        typer.Option(
            "--ram", metavar="SIZE", help="RAM to use, such as 64GB; by default what is left.", show_default=False
        ),
    ] = None,
    seconds_per_row: Annotated[
        float, typer.Option("--seconds-per-row", metavar="S", help="Of running the model, which is not probed.")
    ] = 0.0,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Time the parts of a build on this machine, for about 5 seconds.")
    ] = True,
    as_json: Json = False,
) -> None:
    """What a memory would take on disk, in RAM and in time, before it is built.

    Exits with 1 where it does not fit, and names the nearest plan that does.
    """
    chosen("--key-dtype", key_dtype, options.DTYPES)
    chosen("--prediction-dtype", prediction_dtype, (*options.DTYPES, *LOG_SCALES))
    n, d, c = as_count("--rows", rows), as_count("--dim", dim), as_count("--outputs", n_outputs)
    m = None if top_m is None else as_count("--top-m", top_m)
    if m is None and prediction_dtype in LOG_SCALES:
        raise InvalidInput(f"--prediction-dtype {prediction_dtype} is for top-m predictions alone; add --top-m M")
    if m is not None and m > c:
        raise InvalidInput(f"--top-m is {m}, expected 1 to {c}, the number of classes")
    plan = planning.estimate(
        n,
        d,
        c,
        task=options.task_named(task) or "classification",
        key_dtype=key_dtype,
        prediction_dtype=prediction_dtype,
        top_m=m,
        index=index,
        path=path,
        free_disk=None if disk is None else size_of("--disk", disk),
        free_ram=None if ram is None else size_of("--ram", ram),
        seconds_per_row=seconds_per_row,
        probe=probe,
    )
    fitting = None if plan.fits else planning.nearest_fitting(plan)
    given = {"--disk": disk, "--ram": ram, "--path": None if path == Path(".") else str(path)}
    report(
        {
            **planning.named(plan),
            "nearest": None if fitting is None else {**planning.named(fitting), "command": command(fitting, given)},
        },
        facts(plan.facts),
        *([] if plan.fits else _remedy(plan, fitting, given)),
        as_json=as_json,
    )
    if not plan.fits:
        raise typer.Exit(1)


def size_of(option: str, text: str) -> int:
    """Bytes of a size such as "64GB", "1.5 TB" or "512MiB".

    Raises
    ------
    InvalidInput : if it is none.

    Examples
    --------
    >>> size_of("--ram", "1.5TB"), size_of("--ram", "2GiB")
    (1500000000000, 2147483648)
    """
    found = _SIZE.fullmatch(text.strip())
    unit = "" if found is None else found[2].replace("K", "k") if not found[2].endswith("i") else found[2].capitalize()
    if found is None or unit not in {**_UNITS, **_BINARY}:
        raise InvalidInput(f"{option} is {text!r}, expected bytes, or such as 64GB, 1.5TB, 512MiB")
    return as_count(option, int(float(found[1]) * {**_UNITS, **_BINARY}[unit]))


def _remedy(plan: Plan, fitting: Plan | None, given: dict[str, str | None]) -> list[str | Text]:
    """What is missing, and what would fit."""
    missing = {
        "disk": f"{size_text(plan.disk_bytes - plan.free_disk)} of disk",
        "manifest": "a manifest that can name so many files",
        "search": f"{size_text(plan.search_bytes - plan.free_ram)} of RAM to search",
        "building": f"{size_text(plan.building_bytes - plan.free_ram)} of RAM to build",
    }
    lines: list[str | Text] = ["", f"does not fit: {', '.join(missing[name] for name in plan.shortages)} missing"]
    if fitting is not None:
        sizes = f"{size_text(fitting.disk_bytes)} on disk, {size_text(fitting.building_bytes)} in RAM"
        return [*lines, f"the nearest plan that fits ({sizes}):", unbroken(command(fitting, given))]
    least = planning.smallest(plan)
    ram = max(least.building_bytes, least.search_bytes)
    return [
        *lines,
        f"no plan of {plan.n_rows:,} rows fits here; the smallest needs {size_text(least.disk_bytes)} of disk "
        f"and {size_text(ram)} of RAM:",
        unbroken(command(least, given)),
        f"about {planning.most_rows(plan):,} rows would fit",
    ]


def command(plan: Plan, given: dict[str, str | None]) -> str:
    """The line that estimates a plan."""
    layout = plan.layout
    words: dict[str, object] = {
        "--rows": plan.n_rows,
        "--dim": layout.dim,
        "--outputs": layout.n_outputs,
        "--task": layout.task if layout.task != "classification" else None,
        "--key-dtype": layout.key_dtype,
        "--prediction-dtype": layout.prediction_dtype,
        "--top-m": plan.top_m,
        "--index": plan.index,
        **given,
    }
    parts = [f"{name} {shlex.quote(str(value))}" for name, value in words.items() if value is not None]
    return " ".join(["resmem estimate", *parts])
