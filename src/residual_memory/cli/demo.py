"""`resmem demo`: the whole method on real images."""

from pathlib import Path
from typing import Annotated

import typer

from residual_memory.cli.options import Json
from residual_memory.cli.output import note, report
from residual_memory.errors import InvalidInput


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A slice of the data, in seconds.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.html", help="Write a report with pictures.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Give a small CIFAR-100 network a memory, and see what it gains.

    Works without a network and without a GPU, on keys that ship with the package.
    """
    if out is not None and not out.absolute().parent.is_dir():
        raise InvalidInput(f"--out is {out}, but there is no folder {out.parent}; make it first")
    from residual_memory.demo.run import run_demo

    result = run_demo(out=out, quick=quick, progress=True, say=note)
    report(result.to_dict(), *result.text.splitlines(), as_json=as_json)
    if not result.helps:
        raise typer.Exit(1)
