"""`resmem serve`: a memory behind HTTP, and the page that explains it."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from residual_memory.cli import options
from residual_memory.cli.data import examples_at, open_data
from residual_memory.cli.loading import load_model
from residual_memory.cli.options import (
    OUTPUTS,
    ImageSize,
    Index,
    MemoryPath,
    Model,
    Outputs,
    TextAutocast,
    Tokenizer,
    chosen,
    leave_out,
)
from residual_memory.cli.output import note
from residual_memory.cli.text import TextReading, autocast_named, encoded, load_language_model, load_tokenizer
from residual_memory.errors import InvalidInput, MemoryLocked
from residual_memory.indexes.registry import check_index, for_few_queries
from residual_memory.memory import Memory
from residual_memory.models.base import Source
from residual_memory.windows import TextFile


def serve(
    path: MemoryPath,
    model: Model = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="What the memory was built from, to be shown with its rows: a folder of images, MODULE:NAME, or text.",
            show_default=False,
        ),
    ] = None,
    outputs: Outputs = "logits",
    tokenizer: Tokenizer = None,
    autocast: TextAutocast = None,
    image_size: ImageSize = None,
    index: Index = "auto",
    max_weight: Annotated[
        float, typer.Option("--max-weight", metavar="W", help="What one memory may contribute at most.")
    ] = 0.1,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0 takes a free one.")] = 8000,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", metavar="NAME", help="A name that clients may ask for it by.", show_default=False),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help="Tokens, a line each: TOKEN, or TOKEN and its scopes (predict, explain, write); by default a random "
            "one is printed.",
            show_default=False,
        ),
    ] = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Nothing is added or forgotten, and other processes may write.")
    ] = False,
) -> None:
    """Serve corrected predictions, explanations and changes over HTTP, with a page to look at them.

    Text: resmem serve memory --model FOLDER --data train.txt
    """
    from residual_memory.server import create_app
    from residual_memory.server import serve as run
    from residual_memory.server.access import HOSTS
    from residual_memory.server.observing import write_log

    chosen("--outputs", outputs, OUTPUTS)
    autocast_named(autocast)
    tokens = None if token_file is None else _tokens(token_file)
    memory = _opened(path, read_only)
    try:
        check_index(index, memory.layout.dim)
        of_text = memory.source is not None and Source.from_dict(memory.source).of_text
        leave_out(
            f"the memory at {path} is {'of text' if of_text else 'of no text'}",
            {"--outputs": outputs != "logits", "--image-size": image_size is not None}
            if of_text
            else {"--tokenizer": tokenizer is not None, "--autocast": autocast is not None},
        )
        if of_text:
            text = TextReading(model, tokenizer, autocast=autocast)
            served = _language_model(memory, data, text, index, max_weight)
        else:
            examples = None if data is None else examples_at("--data", data, memory, image_size)
            served = {"model": _model(model, memory, outputs), "examples": examples}
        app = create_app(
            memory,
            **served,
            token=tokens,
            index=index,
            max_weight=max_weight,
            hosts=(*HOSTS, *(allow_host or ()), *([host] if host not in ("0.0.0.0", "::") else ())),
        )
        write_log(sys.stderr)
        run(app, host=host, port=port, announce=lambda address: _announce(address, app, tokens))
    finally:
        memory.close()


def _opened(path: Path, read_only: bool) -> Memory:
    try:
        return options.open_memory(path, writable=not read_only)
    except MemoryLocked as error:
        raise MemoryLocked(f"{error}; serve it with --read-only beside the process that writes") from None


def _model(reference: str | None, memory: Memory, outputs: str) -> Any:
    if reference is None:
        return None
    from residual_memory.models.torch import ResMemModule

    return ResMemModule(load_model(reference), memory, outputs=outputs)  # type: ignore[arg-type]


def _language_model(
    memory: Memory, data: str | None, text: TextReading, index: str, max_weight: float
) -> dict[str, Any]:
    """What `create_app` takes for a memory of text."""
    if text.model is None:
        raise InvalidInput(f"the memory at {memory.path} is of text; add --model, a folder or MODULE:NAME")
    file = None if data is None else open_data(data)
    if not isinstance(file, TextFile | None):
        raise InvalidInput(f"--data is {data}, but the memory at {memory.path} is of text; name its .txt file")
    tokenizer = load_tokenizer(text.model, text.tokenizer)
    model = load_language_model(text.model)
    from residual_memory.models.transformers import ResMemForCausalLM

    lm = ResMemForCausalLM(
        model,
        memory,
        tokenizer=tokenizer,
        autocast=text.precision,
        index=for_few_queries(index, len(memory)),
        max_weight=max_weight,
    )
    return {"model": lm, "tokenizer": tokenizer, "text": None if file is None else encoded(file, tokenizer)}


def _tokens(path: Path) -> dict[str, list[Any]]:
    """Tokens and their scopes, a line each; `create_app` refuses what is no scope."""
    tokens: dict[str, list[Any]] = {}
    for line in options.lines_of(path):
        token, *scopes = line.replace(",", " ").split()
        tokens[token] = scopes or ["predict", "explain", "write"]
    if not tokens:
        raise InvalidInput(f"--token-file {path} holds no token; write one a line")
    return tokens


def _announce(address: str, app: Any, tokens: dict[str, list[Any]] | None) -> None:
    """Where the page is; a token that the user made is never printed."""
    note(f"serving {app.state.service.memory!r}")
    note(f"open {address}/?token={app.state.token}" if tokens is None else f"open {address} (with a token of yours)")
    note("stop with Ctrl-C")
