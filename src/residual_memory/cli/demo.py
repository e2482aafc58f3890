"""`resmem demo`: the whole method on real images."""

from typing import Annotated

import typer

from residual_memory.cli.options import Json
from residual_memory.cli.output import note, report
from residual_memory.cli.reporting import Out, check_out, provenance


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A slice of the data, in seconds.")] = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Give a small CIFAR-100 network a memory, and see what it gains.

    Works without a network and without a GPU, on keys that ship with the package.
    """
    check_out(out)
    from residual_memory.demo.run import run_demo

    result = run_demo(out=out, quick=quick, progress=True, say=note, facts=provenance("CIFAR-100"))
    report(result.to_dict(), *result.text.splitlines(), as_json=as_json)
    if not result.helps:
        raise typer.Exit(1)
