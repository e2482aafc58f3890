"""`resmem build` and `resmem add`: rows into a memory."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import typer
from numpy import ndarray

from residual_memory.cli import options
from residual_memory.cli.carrying import Expires, Given, Owner, Tags
from residual_memory.cli.data import Reading, batch_of, open_data, rows_for
from residual_memory.cli.images import ImageFolder
from residual_memory.cli.loading import FITTING, Examples, as_torch_dataset, load_model, user_code
from residual_memory.cli.options import (
    Autocast,
    BatchSize,
    Data,
    ImageSize,
    Json,
    Length,
    Limit,
    MemoryPath,
    Model,
    Outputs,
    Tokenizer,
    chosen,
    leave_out,
)
from residual_memory.cli.output import note, report
from residual_memory.cli.text import POST_ATTENTION, TextReading, autocast_named, reading
from residual_memory.display import size_text
from residual_memory.errors import DataNotFound, FingerprintMismatch, InvalidInput, ResidualMemoryError
from residual_memory.exchange import Rows
from residual_memory.exchange.npy import npy_file
from residual_memory.exchange.rows import task_of
from residual_memory.memory import Memory
from residual_memory.memory.codes import LOG_SCALES
from residual_memory.memory.format import MANIFEST, Layout
from residual_memory.models.base import Side, fill, warn_if_in_sample
from residual_memory.planning import require_room
from residual_memory.progress import progress_bar
from residual_memory.types import Metric, Observations, Task, TopM
from residual_memory.validation import as_count, as_fraction, as_keys
from residual_memory.windows import TextFile


def build(
    path: Annotated[Path, typer.Argument(metavar="MEMORY", help="Directory to make.", show_default=False)],
    data: Data,
    model: Model = None,
    tokenizer: Tokenizer = None,
    layer: Annotated[
        str | None,
        typer.Option(
            "--layer",
            metavar="NAME",
            help="Layer of the keys; by default the last Linear that runs, for text post-attention.",
        ),
    ] = None,
    side: Annotated[str, typer.Option("--side", metavar="SIDE", help="Of the layer: input or output.")] = "input",
    pool: Annotated[int, typer.Option("--pool", metavar="N", help="Average feature maps to N × N cells.")] = 1,
    outputs: Outputs = "logits",
    metric: Annotated[
        str, typer.Option("--metric", metavar="METRIC", help="Distance of keys: euclidean or cosine.")
    ] = "euclidean",
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="TASK", help="classification or regression; by default read off the labels."),
    ] = None,
    n_outputs: Annotated[
        int | None,
        typer.Option("--n-outputs", metavar="N", help="More classes than the model's leave room for new ones."),
    ] = None,
    class_names: Annotated[
        Path | None, typer.Option("--class-names", metavar="FILE", help="Names of the classes, one a line.")
    ] = None,
    key_dtype: Annotated[
        str | None,
        typer.Option(
            "--key-dtype",
            metavar="TYPE",
            help="Stored keys: float16, float32 or float64; by default float32, for text float16.",
        ),
    ] = None,
    prediction_dtype: Annotated[
        str | None,
        typer.Option(
            "--prediction-dtype",
            metavar="TYPE",
            help="Stored predictions, likewise; for text also log8, the default there, or log16.",
        ),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            "--predictions", metavar="FILE.npy", help="Out-of-fold predictions to keep in place of the model's."
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option("--held-out", metavar="DATA", help="Other data, to tell whether the residuals mean anything."),
    ] = None,
    length: Length = None,
    limit: Limit = None,
    top_m: Annotated[
        int | None,
        typer.Option("--top-m", metavar="M", help="For text: probabilities to keep of each prediction; by default 8."),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option("--keep", metavar="P", help="For text: leave tokens out that the model gives more than P."),
    ] = None,
    projection: Annotated[
        int | None,
        typer.Option("--projection", metavar="P", help="For text: principal components to keep of the keys."),
    ] = None,
    batch_size: BatchSize = None,
    autocast: Autocast = None,
    image_size: ImageSize = None,
    owner: Owner = None,
    expires: Expires = None,
    tag: Tags = None,
    as_json: Json = False,
) -> None:
    """Make a memory of what a model could not learn of its training data.

    An interrupted build goes on where it was when the same command is run again.

    Example: resmem build memory --data train:dataset --model train:model

    Text: resmem build memory --data train.txt --model FOLDER
    """
    chosen("--side", side, ("input", "output"))
    chosen("--metric", metric, ("euclidean", "cosine"))
    chosen("--outputs", outputs, options.OUTPUTS)
    autocast_named(autocast)
    given = Given.checked(owner, expires, tag)
    started = time.monotonic()
    found = open_data(data, image_size=image_size)
    is_text = isinstance(found, TextFile)
    text = TextReading(model, tokenizer, length, None, limit, batch_size, autocast)
    sparse = _Sparse.checked(top_m, keep, projection)
    leave_out(
        f"{data} is {'text' if is_text else 'no text'}",
        {
            "--pool": pool != 1,
            "--outputs": outputs != "logits",
            "--task": task is not None,
            "--class-names": class_names is not None,
            "--predictions": predictions is not None,
            "--held-out": held_out is not None,
            "--image-size": image_size is not None,
        }
        if is_text
        else {**text.given, **sparse.given},
    )
    if not isinstance(found, Rows):
        leave_out(f"{data} is run through a model, and rows of such a build carry nothing", given.options)
    kept = _Kept(
        options.task_named(task),
        cast(Metric, metric),
        None if n_outputs is None else as_count("--n-outputs", n_outputs),
        None if class_names is None else tuple(options.lines_of(class_names)),
        chosen("--key-dtype", key_dtype or ("float16" if is_text else "float32"), options.DTYPES),
        chosen(
            "--prediction-dtype",
            prediction_dtype or ("log8" if is_text else "float32"),
            (*options.DTYPES, *(LOG_SCALES if is_text or getattr(found, "top_m", False) else ())),
        ),
    )
    other = None if held_out is None else open_data(held_out, image_size=image_size, class_names=_classes_of(found))
    if isinstance(found, TextFile):
        memory = _from_text(path, found, text, kept, sparse, layer or POST_ATTENTION, cast(Side, side))
    elif isinstance(found, Rows):
        if not_needed := [
            name for name, value in (("--model", model), ("--layer", layer), ("--predictions", predictions)) if value
        ]:
            raise InvalidInput(f"{data} holds keys and predictions already; leave {' and '.join(not_needed)} out")
        memory = _from_arrays(path, found, kept, given, _same_kind(found, other, held_out))
    else:
        if model is None:
            raise InvalidInput(f"{data} is a data set of examples; add --model MODULE:NAME, the model to run on it")
        memory = _from_model(
            path,
            found,
            load_model(model),
            kept,
            held_out=_same_kind(found, other, held_out),
            layer=layer,
            side=side,
            pool=as_count("--pool", pool),
            outputs=outputs,
            predictions=None if predictions is None else _npy(predictions),
            batch_size=batch_of(batch_size),
            autocast=autocast,
        )
    with memory:
        _report_built(memory, time.monotonic() - started, as_json)


@dataclass(frozen=True)
class _Kept:
    """What the user says of a memory's rows."""

    task: Task | None
    metric: Metric
    n_outputs: int | None
    class_names: tuple[str, ...] | None
    key_dtype: str
    prediction_dtype: str


@dataclass(frozen=True)
class _Sparse:
    """What the user says of how much to keep of each token; None is the default."""

    top_m: int | None
    keep: float | None
    projection: int | None

    @staticmethod
    def checked(top_m: int | None, keep: float | None, projection: int | None) -> "_Sparse":
        return _Sparse(
            None if top_m is None else as_count("--top-m", top_m),
            None if keep is None else as_fraction("--keep", keep, above_zero=True),
            None if projection is None else as_count("--projection", projection),
        )

    @property
    def given(self) -> dict[str, bool]:
        """The options, and whether each is given."""
        return {f"--{name.replace('_', '-')}": value is not None for name, value in vars(self).items()}


def _report_built(memory: Memory, seconds: float, as_json: bool) -> None:
    layout, source = memory.layout, memory.source
    result = {
        "memory": memory.path,
        "rows": len(memory),
        "dim": layout.dim,
        "n_outputs": layout.n_outputs,
        "task": layout.task,
        "layer": source and source["layer"],
        "bytes": memory.n_bytes,
        "seconds": seconds,
    }
    held_out = "HELD_OUT.txt" if source and source.get("tokenizer") else "HELD_OUT"
    origin = f", from the {source['side']} of {source['layer']!r}" if source else ""
    report(
        result,
        f"{len(memory):,} rows in {memory.path}, {size_text(memory.n_bytes)}",
        f"{layout.task} with {layout.n_outputs:,} outputs, keys of {layout.dim:,} numbers{origin}",
        f"next: resmem tune {memory.path} --data {held_out}" + (" --model MODULE:NAME" if source else ""),
        as_json=as_json,
    )


# ---------------------------------------------------------------------- from a model


def _from_model(
    path: Path,
    dataset: Examples,
    model: Any,
    kept: _Kept,
    *,
    held_out: Examples | None,
    autocast: str | None,
    **choices: Any,
) -> Memory:
    from residual_memory.models.torch import build_memory

    with user_code("running the model on the data", FITTING):
        return build_memory(
            model,
            as_torch_dataset(dataset),
            path,
            task=kept.task,
            n_outputs=kept.n_outputs,
            class_names=kept.class_names or _classes_of(dataset),
            metric=kept.metric,
            key_dtype=kept.key_dtype,
            prediction_dtype=kept.prediction_dtype,
            autocast=autocast_named(autocast),
            held_out=None if held_out is None else as_torch_dataset(held_out),
            **choices,
        )


def _classes_of(found: Any) -> list[str] | None:
    return found.classes if isinstance(found, ImageFolder) else None


def _same_kind(found: Any, other: Any, name: str | None) -> Any:
    if other is not None and (isinstance(other, TextFile) or isinstance(found, Rows) != isinstance(other, Rows)):
        wanted = "arrays" if isinstance(found, Rows) else "a data set of examples"
        raise InvalidInput(f"--held-out {name} is of another kind than --data, expected {wanted}")
    return other


def _npy(path: Path) -> ndarray:
    if not path.is_file():
        raise DataNotFound(f"there is no file {path}{options.similar(path)}")
    return npy_file(path).read()


# ---------------------------------------------------------------------- from text


def _from_text(
    path: Path, file: TextFile, text: TextReading, kept: _Kept, sparse: _Sparse, layer: str, side: Side
) -> Memory:
    model, tokenizer = text.load(file)
    from residual_memory.models.tokens import TokenWatch
    from residual_memory.models.transformers import build_memory

    windows = text.windows(file, TokenWatch(model, layer, side), tokenizer)
    with reading(file):
        return build_memory(
            model,
            windows,
            path,
            layer=layer,
            side=side,
            top_m=sparse.top_m or 8,
            keep=sparse.keep or 1.0,
            projection=sparse.projection,
            n_outputs=kept.n_outputs,
            tokenizer=tokenizer,
            limit=text.limit,
            metric=kept.metric,
            key_dtype=kept.key_dtype,
            prediction_dtype=kept.prediction_dtype,
            batch_size=text.batch_size,
            autocast=text.precision,
        )


# ---------------------------------------------------------------------- from arrays


def _from_arrays(path: Path, rows: Rows, kept: _Kept, given: Given, held_out: Rows | None) -> Memory:
    rows.require("labels", "a memory")
    first = next(rows.blocks(size=1_000), None)
    if first is None:
        raise InvalidInput(f"{rows.name} holds no rows: there is nothing to memorize")
    task, n_outputs = kept.task or task_of(first), kept.n_outputs
    if rows.top_m and rows.manifest is not None:
        n_outputs = n_outputs or rows.manifest.layout.n_outputs
    first = rows.checked(first, task, n_outputs)
    n_outputs = n_outputs or first.whole.shape[1]
    residuals = "top-m" if rows.top_m else "dense"
    layout = Layout(first.keys.shape[1], n_outputs, task, kept.metric, residuals, kept.key_dtype, kept.prediction_dtype)
    top_m = first.predictions.indices.shape[1] if isinstance(first.predictions, TopM) else None
    memory = _opened(path, layout, kept, rows, top_m)
    losses: list[float] = []
    try:
        with progress_bar("building", rows.n_rows, done=min(len(memory), rows.n_rows)) as advance:
            fill(memory, _measured(_observations(rows, memory, given, skip_held=True), layout, losses, advance))
        if losses:
            other = None if held_out is None else _mean_loss(held_out, layout)
            warn_if_in_sample(float(np.mean(losses)), other, 1e-2 if task == "classification" else 0.0)
    except BaseException:
        memory.close()
        raise
    return memory


def _opened(path: Path, layout: Layout, kept: _Kept, rows: Rows, top_m: int | None) -> Memory:
    """A new memory, for which the disk has room, or the one that an earlier run of the command began."""
    if not (path / MANIFEST).exists():
        require_room(path, rows.n_rows * layout.bytes_per_row(top_m))
        return Memory.create(
            path,
            dim=layout.dim,
            n_outputs=layout.n_outputs,
            task=layout.task,
            metric=layout.metric,
            residuals=cast(Literal["dense", "top-m"], layout.residuals),
            class_names=kept.class_names,
            key_dtype=layout.key_dtype,
            prediction_dtype=layout.prediction_dtype,
        )
    memory = Memory.open(path, writable=True)
    try:
        _check_begun(memory, layout, rows)
    except BaseException:
        memory.close()
        raise
    return memory


def _check_begun(memory: Memory, layout: Layout, rows: Rows) -> None:
    """Refuse to go on with a memory that other rows, or another command, began."""
    path, snapshot = memory.path, memory.snapshot
    if memory.source is not None:
        raise FingerprintMismatch(f"{path} holds a memory that was built from a model; name another path")
    for name in vars(layout):
        was, now = getattr(memory.layout, name), getattr(layout, name)
        if was != now:
            raise FingerprintMismatch(
                f"{path} holds a memory with {name} {was!r}, but this is {now!r}; name another path"
            )
    if memory.n_forgotten or snapshot.generation:
        raise InvalidInput(f"{path} holds a memory that was changed since it was built; add rows with: resmem add")
    for block in rows.blocks(size=1_000):
        found = snapshot.rows_of(block.row_ids)
        held = found >= 0
        keys = as_keys(block.keys[held], metric=layout.metric)
        if not np.allclose(keys, snapshot.keys.take(found[held]), rtol=1e-2, atol=1e-6):
            raise FingerprintMismatch(f"{path} holds other rows than {rows.name} under the same ids; name another path")
        break
    if len(memory):
        note(f"going on after {len(memory):,} rows that {path} holds already")


def _observations(
    rows: Rows, memory: Memory, given: Given, *, first: int = 0, next_id: int | None = None, skip_held: bool = False
) -> Iterator[Observations]:
    """The rows, validated, with their ids.

    Parameters
    ----------
    given : what the rows carry, where the source does not say it.
    first : row of the source to begin with.
    next_id : id of that row where the source gives none; None takes row numbers.
    skip_held : leave out rows whose id the memory holds already.
    """
    layout, held = memory.layout, memory.ids
    for raw in rows.blocks(first=first):
        block = rows.checked(raw, layout.task, layout.n_outputs, layout.dim)
        ids = block.row_ids
        if block.ids is None and next_id is not None:
            ids = ids - first + next_id
        fresh = np.ones(len(ids), bool)
        if skip_held and len(held) and held.dtype.kind == ids.dtype.kind:
            fresh = ~np.isin(ids, held)
        if fresh.any():
            some = given.marked(block.taken(fresh))
            labels = cast(ndarray, some.labels)
            yield Observations(ids[fresh], some.keys, labels, some.predictions, some.groups, some.carried)


def _measured(
    batches: Iterator[Observations], layout: Layout, losses: list[float], advance: Any
) -> Iterator[Observations]:
    """The same batches, the base's mean loss on each being noted on the way."""
    for batch in batches:
        losses.append(_loss(batch.predictions, batch.labels, layout))
        yield batch
        advance(len(batch))


def _loss(predictions: ndarray | TopM, labels: ndarray, layout: Layout) -> float:
    if layout.task == "classification":
        return float(-np.log(np.maximum(_chances(predictions, labels, layout.n_outputs), 1e-12)).mean())
    said = cast(ndarray, predictions).astype(np.float64)
    return float(((said - labels.reshape(said.shape)) ** 2).mean())


def _chances(predictions: ndarray | TopM, labels: ndarray, n_outputs: int) -> ndarray:
    """The base's probability of each label; classes that a top-m row does not list share what is left."""
    if not isinstance(predictions, TopM):
        return predictions[np.arange(len(predictions)), labels].astype(np.float64)
    listed = predictions.indices == labels[:, None]
    spread = predictions.rest.astype(np.float64) / max(n_outputs - predictions.indices.shape[1], 1)
    return np.where(listed.any(axis=1), np.where(listed, predictions.probabilities, 0).sum(axis=1), spread)


def _mean_loss(rows: Rows, layout: Layout) -> float:
    rows.require("labels", "--held-out")
    total, n = 0.0, 0
    for raw in rows.blocks():
        block = rows.checked(raw, layout.task, layout.n_outputs, layout.dim)
        total += len(block) * _loss(block.predictions, cast(ndarray, block.labels), layout)
        n += len(block)
    return total / max(n, 1)


# ---------------------------------------------------------------------- add


def add(
    path: MemoryPath,
    data: Data,
    model: Model = None,
    outputs: Outputs = "logits",
    first_row: Annotated[
        int, typer.Option("--first-row", metavar="N", help="Leave out the rows of the data before this one.", min=0)
    ] = 0,
    batch_size: BatchSize = None,
    image_size: ImageSize = None,
    owner: Owner = None,
    expires: Expires = None,
    tag: Tags = None,
    as_json: Json = False,
) -> None:
    """Append examples to a memory: they count from the next prediction on, without training.

    Rows keep the ids of the data; where these have none, the memory gives new ones.
    """
    given = Given.checked(owner, expires, tag)
    with options.open_memory(path, writable=True) as memory:
        rows = rows_for(data, memory, Reading(model, outputs, batch_size, image_size), top_m=True)
        if first_row > rows.n_rows:
            raise InvalidInput(f"--first-row is {first_row:,}, but {data} has {rows.n_rows:,} rows")
        before, next_id = len(memory), memory.snapshot.manifest.next_id
        if "ids" not in rows.columns and memory.snapshot.manifest.id_kind == "string":
            raise InvalidInput(f"the ids of {path} are strings, so the data must give them; add ids to {data}")
        try:
            with progress_bar("adding", rows.n_rows, done=first_row) as advance:
                fill(memory, _watched(_observations(rows, memory, given, first=first_row, next_id=next_id), advance))
        except KeyboardInterrupt:
            added = len(memory) - before
            raise options.Interrupted(
                f"interrupted after {added:,} rows were added; go on with --first-row {first_row + added}"
            ) from None
        except ResidualMemoryError:
            if added := len(memory) - before:
                note(f"{added:,} rows were added before this: leave them out with --first-row {first_row + added}")
            raise
        added = len(memory) - before
        report(
            {
                "memory": path,
                "added": added,
                "rows": len(memory),
                "version": memory.version,
                "first_id": None if "ids" in rows.columns or not added else next_id,
            },
            f"added {added:,} rows; {path} holds {len(memory):,}",
            *([f"they have the ids {next_id} to {next_id + added - 1}"] if added and "ids" not in rows.columns else []),
            as_json=as_json,
        )


def _watched(batches: Iterator[Observations], advance: Any) -> Iterator[Observations]:
    for batch in batches:
        yield batch
        advance(len(batch))
