"""A build on many machines: Ray Data has each worker observe ranges of rows, and their memories become one."""

import functools
import inspect
import json
import logging
import os
import platform
import re
import secrets
import shutil
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from residual_memory import errors
from residual_memory.cluster import connected
from residual_memory.errors import InvalidInput, PathNotShared, ResidualMemoryError, ResidualMemoryWarning, WorkerLost
from residual_memory.memory import Memory, require_empty
from residual_memory.memory.format import MANIFEST
from residual_memory.memory.storage import Directory
from residual_memory.models.base import Source
from residual_memory.models.building import is_text
from residual_memory.models.parts import (
    PART_NAME,
    folder_of,
    join_parts,
    make_part,
    place_of,
    planned,
    unfinished_in,
    whole_parts,
)
from residual_memory.progress import progress_bar
from residual_memory.validation import as_count

PARTS_A_WORKER = 4  # so that a worker that is killed loses little, and fast ones take more
MOST_DEATHS = 4  # workers that may die over one range before it is given up

_MARK = "build-"
_FACTORIES = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial, type)


def build_memory_on_ray(
    model: Any,
    dataset: Any,
    path: str | os.PathLike[str],
    *,
    workers: int,
    parts: int | None = None,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    verbose: bool = True,
    **options: Any,
) -> Memory:
    """Build the memory of a torch model on the workers of a Ray cluster; the rows are those of `build_memory`.

    The rows are cut into ranges. Each worker observes one range after the other and writes a memory of it in a folder
    beside `path`, ``NAME.parts``; when all are whole they become one memory, without a copy of a row, and the folder is
    removed. A range whose worker died is observed again, and none is there twice. A build that was interrupted goes on
    with the parts that are whole when it is called again with the same arguments; a finished one is opened.

    Parameters
    ----------
    model, dataset : as in `build_memory`; or functions without arguments that make them, which are called on each
        worker (and that of the data set here too): right where they are too large to be sent, or live on a GPU.
    path : a directory that all workers see under this name: on several machines, of a shared file system.
    workers : processes that observe.
    parts : ranges that the rows are cut into; None takes 4 for each worker. They are a multiple of `batch_size` long.
    num_cpus, num_gpus : of each worker. Where it has a GPU the model is moved there.
    verbose : show progress on stderr.
    options : of `build_memory` for torch models.

    Returns
    -------
    The memory, open for writing.

    Raises
    ------
    MissingExtra : if Ray is not installed.
    InvalidInput : if the data are text, or as in `build_memory`.
    PathNotShared : if a worker does not see the folder of the parts.
    WorkerLost : if worker after worker dies over the same rows.
    FingerprintMismatch : if `path`, or a part that is there already, is of another model, layer or data set.
    MemoryLocked : if another process is building the same memory.

    References
    ----------
    Moritz et al., "Ray: a distributed framework for emerging AI applications", OSDI 2018.
    """
    ray = connected("a build on Ray")
    workers, target = as_count("workers", workers), Path(path).absolute()
    n_parts = workers * PARTS_A_WORKER if parts is None else as_count("parts", parts)
    items = made(dataset)
    if is_text(items):
        raise InvalidInput("the data set is text, which is read in order; build its memory with build_memory")
    given = _checked(options)
    n_rows = len(items) * (1 + len(given["copies"]))
    if not n_rows:
        raise InvalidInput("the data set is empty: there is nothing to memorize")
    folder = folder_of(target)
    home = Directory(folder)
    home.make()
    home.lock()
    try:
        for left in [*unfinished_in(folder, PART_NAME), *unfinished_in(target.parent, re.escape(target.name))]:
            shutil.rmtree(left, ignore_errors=True)
        if (target / MANIFEST).exists():
            return _finished(target, made(model), items, options)
        require_empty(target)
        ranges = planned(folder, n_rows, n_parts, as_count("batch_size", given["batch_size"]))
        job = Job(model, dataset, options, folder, mark(home), num_gpus > 0)
        resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        _observe(ray, job, ranges, workers, resources, verbose)
        return join_parts([place_of(folder, rows) for rows in ranges], target)
    finally:
        if (target / MANIFEST).exists() or not whole_parts(folder):
            shutil.rmtree(folder, ignore_errors=True)
        home.unlock()


@dataclass(frozen=True)
class Job:
    """What every worker is told.

    Attributes
    ----------
    model, dataset : or functions that make them.
    options : of `build_memory`.
    folder : of the parts.
    mark : a file in it, by which a worker knows that it sees the same folder.
    on_gpu : move the model to the GPU.
    """

    model: Any
    dataset: Any
    options: Mapping[str, Any]
    folder: Path
    mark: str
    on_gpu: bool


class Worker:
    """Makes the parts that it is told to; what goes wrong is said in its answer.

    Parameters
    ----------
    job : gives what there is to do: of what it holds all workers of a machine share one copy.
    """

    def __init__(self, job: Callable[[], Job]) -> None:
        self._job = job()
        self._dataset, self._model = made(self._job.dataset), made(self._job.model)
        if self._job.on_gpu:
            self._model = self._model.to("cuda")

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        ranges = [range(*ends) for ends in zip(batch["first"].tolist(), batch["end"].tolist(), strict=True)]
        return {"rows": [len(rows) for rows in ranges], "said": [json.dumps(self._made(rows)) for rows in ranges]}

    def _made(self, rows: range) -> "_Said":
        """What there was to say: the error, if one was raised, and the warnings, by the names of their classes."""
        error: tuple[str, str] | None = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ResidualMemoryWarning)
            try:
                self._make(rows)
            except ResidualMemoryError as raised:
                where = f"rows {rows.start:,} to {rows.stop:,}, on {platform.node()}"
                error = (type(raised).__name__, f"{where}: {raised}")
        ours = [warning for warning in caught if issubclass(warning.category, ResidualMemoryWarning)]
        return {"error": error, "warnings": [(warning.category.__name__, str(warning.message)) for warning in ours]}

    def _make(self, rows: range) -> None:
        from residual_memory.models import torch

        job = self._job
        if not (job.folder / job.mark).exists():
            raise PathNotShared(
                f"this worker does not see {job.folder}, in which the parts are written; "
                "name a path on a file system that all machines of the cluster share"
            )
        begun = len(unfinished_in(job.folder, place_of(job.folder, rows).name))
        if begun >= MOST_DEATHS:
            raise WorkerLost(
                f"{begun} workers died over these rows; look at Ray's log, and give each more memory (fewer workers on "
                "a machine) or fewer rows at a time (batch_size)"
            )
        options = {**job.options, "part": rows, "verbose": False}
        if rows.start:
            options["held_out"] = None  # the first part tells whether residuals mean anything
        make_part(job.folder, rows, lambda place: torch.build_memory(self._model, self._dataset, place, **options))


class _Said(TypedDict):
    error: tuple[str, str] | None
    warnings: list[tuple[str, str]]


def _observe(
    ray: Any, job: Job, ranges: Sequence[range], workers: int, resources: Mapping[str, float], verbose: bool
) -> None:
    """Have all parts there.

    Raises
    ------
    ResidualMemoryError : of the kind that the first worker which failed met.
    """
    n_rows = sum(map(len, ranges))
    with _quiet_data() as data, progress_bar("building", n_rows, shown=verbose) as advance:
        told = data.from_items(
            [{"first": rows.start, "end": rows.stop} for rows in ranges], override_num_blocks=len(ranges)
        ).map_batches(
            Worker,
            batch_size=1,
            compute=data.ActorPoolStrategy(size=min(workers, len(ranges))),
            fn_constructor_args=(functools.partial(ray.get, ray.put(job)),),
            **resources,
        )
        for row in told.iter_rows():
            said: _Said = json.loads(row["said"])
            for kind, message in said["warnings"]:
                warnings.warn(message, getattr(errors, kind), stacklevel=3)
            if said["error"] is not None:
                raise raised(*said["error"])
            advance(row["rows"])


@contextmanager
def _quiet_data() -> Iterator[Any]:
    """The module `ray.data`, which says nothing of its own while the context lasts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its own defaults
        from ray import data

        context = data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    loggers = [logging.getLogger(name) for name in ("ray.data", "ray")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with data.DataContext.current(context):
            yield data
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def raised(kind: str, message: str) -> ResidualMemoryError:
    """An error of a worker's, to be raised here."""
    try:
        return getattr(errors, kind)(message)
    except TypeError:  # it is made of something else than its message
        return ResidualMemoryError(message)


def made(value: Any) -> Any:
    """A model or data set; where a function is given, what it makes."""
    return value() if isinstance(value, _FACTORIES) else value


def _checked(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """All options of `build_memory`, those that are not given too.

    Raises
    ------
    InvalidInput : if one is unknown.
    """
    from residual_memory.models import torch

    known = inspect.signature(torch.build_memory).parameters
    if unknown := set(options) - (set(known) - {"model", "dataset", "path", "part", "verbose"}):
        raise InvalidInput(f"build_memory_on_ray has no option {min(unknown)!r}")
    defaults = {name: parameter.default for name, parameter in known.items()}
    return {**defaults, **options}


def mark(home: Directory) -> str:
    """A file in the folder of the parts that no folder of the same name on another machine has."""
    for name in home.names():
        if name.startswith(_MARK):
            home.remove(name)
    mark = _MARK + secrets.token_hex(8)
    home.put(mark, b"")
    return mark


def _finished(path: Path, model: Any, dataset: Any, options: Mapping[str, Any]) -> Memory:
    """The memory that is there, if it is whole and of these."""
    from residual_memory.models import torch

    source = Memory.open(path).source
    if source is not None and not Source.from_dict(source).complete:
        raise InvalidInput(
            f"{path} holds a build that one process began; finish it with build_memory, or name another path"
        )
    return torch.build_memory(model, dataset, path, **options, verbose=False)
