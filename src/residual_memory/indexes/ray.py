"""Search on many machines: rows cut into shards, an actor of Ray's for each, and their answers merged.

An actor opens its rows itself, builds any other engine's index over them, and answers with the nearest of its rows and
their exact distances. The merged shortlist is scored again like any other, so the answer is that of one index.
"""

import itertools
import platform
import warnings
import weakref
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, UInt8
from numpy import ndarray

from residual_memory.cluster import connected
from residual_memory.errors import (
    CorruptFile,
    InvalidInput,
    PartialAnswer,
    PathNotShared,
    ResidualMemoryError,
    ShardDown,
    StorageFailure,
)
from residual_memory.indexes.base import (
    Candidates,
    Engine,
    Index,
    IndexSpec,
    Pieces,
    Stored,
    Usable,
    nearest,
    numbers_of,
    require,
)
from residual_memory.indexes.distances import KeySource, precision_of
from residual_memory.indexes.footprint import BuildTime, Footprint
from residual_memory.indexes.registry import (
    EXACT,
    EXACT_TAIL,
    build_index,
    check_index,
    engine_named,
    parse_spec,
    resolved,
)

ROWS_PER_SHARD = 64  # fewer are searched without a cluster
TIMEOUT = 30.0  # seconds without an answer after which a shard counts as down
INLINE_BYTES = 100 << 10  # queries that are sent with the call; more go through Ray's store, once for all shards
SAMPLED_ROWS = 256

_CANNOT_LOAD = (PathNotShared, StorageFailure, CorruptFile)  # of a shard that was started again
OPTIONS = {"partial": 0.0, "timeout": TIMEOUT, "threads": 1.0}
RESOURCE = "resource"
A_LITTLE = 0.001  # of it that a shard takes: it says where shards may be, and not how many


class RayEngine(Engine):
    """``ray:SHARDS`` or ``ray:SHARDS:SPEC``, where the spec is another engine's; options that are not ours are its."""

    def check(self, spec: IndexSpec, width: int) -> None:
        require("ray", "ray")
        _, inner = _read(spec)
        _how(spec)
        check_index(_written(inner), width)

    def required_rows(self, spec: IndexSpec) -> int:
        return ROWS_PER_SHARD * _read(spec)[0]

    def footprint(self, spec: IndexSpec, width: int, n_rows: int) -> Footprint:
        """Of all shards together, on whatever nodes they lie."""
        each = [engine_named(one.engine).footprint(one, width, n) for one, n in _shards(spec, width, n_rows)]
        return Footprint(sum(one.ram for one in each), 0, sum(one.building for one in each))

    def build_time(self, spec: IndexSpec, width: int, n_rows: int) -> BuildTime:
        """Of the longest shard, with a core of its own."""
        one, n = _shards(spec, width, n_rows)[0]
        return engine_named(one.engine).build_time(one, width, n)

    def build(self, spec: IndexSpec, keys: KeySource, first: int, n_rows: int, like: Index | None = None) -> Index:
        n_shards, inner = _read(spec)
        if isinstance(like, Sharded):
            if n_rows < EXACT_TAIL:
                return build_index(EXACT, keys, first, n_rows)
            n_shards = min(n_shards, -(-n_rows * n_shards // like.n_rows))  # as long as those of the earlier rows
        return Sharded(keys, first, n_rows, n_shards, inner, _how(spec))

    def saved_name(self, spec: IndexSpec) -> None:
        return None

    def load(self, spec: IndexSpec, keys: KeySource, first: int, n_rows: int, stored: Stored) -> Index:
        raise InvalidInput("of a search by Ray nothing is saved")


def _shards(spec: IndexSpec, width: int, n_rows: int) -> list[tuple[IndexSpec, int]]:
    """The spec and the number of rows of each shard, the longest first."""
    n_shards, inner = _read(spec)
    sizes = sorted(map(len, _ranges(n_rows, n_shards)), reverse=True)
    return [(resolved(inner, width, n), n) for n in sizes]


@dataclass(frozen=True)
class How:
    """Options of the search.

    Attributes
    ----------
    partial : answer from the shards that are there, with a warning and a mark; else a missing one is an error.
    timeout : seconds after which a shard that does not answer is missing.
    threads : that each shard searches with.
    resource : a resource of Ray's that the machines of shards have; None takes any machine.
    """

    partial: bool
    timeout: float
    threads: int
    resource: str | None


@dataclass(frozen=True)
class _Down:
    """A shard that did not answer, and why."""

    number: int
    why: str


class Shard:
    """Some rows and their index: what runs in an actor. It is made again where its process or machine dies.

    Parameters
    ----------
    opener : gives the keys, or a reference to what does, in a list.
    digest : of some of the keys: on another machine there may be another file of that name.
    spec : of the index.
    """

    def __init__(self, opener: Any, digest: int, spec: IndexSpec) -> None:
        self._opener, self._digest, self._spec = opener, digest, spec
        self._index: Index | None = None
        with suppress(ResidualMemoryError):  # an actor that fails here is never made again: whoever asks is told
            self._load()

    def ready(self) -> tuple[str, bool]:
        """What searches here, and whether it promises to miss nothing."""
        index = self._load()
        return index.description, index.candidates(self._keys.take(np.zeros(1, np.int64)), 1).bounds is not None

    def nearest(
        self, queries: Float[ndarray, "q d"], n_neighbors: int, usable: UInt8[ndarray, " bytes"] | None = None
    ) -> tuple[Float[ndarray, "q s"], Int64[ndarray, "q s"]]:
        """Distances and rows, as `indexes.base.nearest` gives them; rows count from the shard's first.

        Parameters
        ----------
        usable : rows that count, one bit each; None: all of them.
        """
        index, n_rows = self._load(), len(self._keys)
        alive = None if usable is None else Usable(np.unpackbits(usable, count=n_rows).astype(bool))
        found = nearest([index], self._keys, queries, min(n_neighbors, n_rows), usable=alive)
        return found.distances, found.rows

    def _load(self) -> Index:
        if self._index is None:
            opener = self._opener
            if isinstance(opener, list):
                import ray

                opener = ray.get(opener[0])
            keys: KeySource = opener()
            if digest_of(keys, 0, len(keys)) != self._digest:
                raise PathNotShared(
                    f"the files that {platform.node()} finds under the memory's path are others; "
                    "put the memory on a file system that all machines of the cluster share"
                )
            self._keys = keys
            self._index = build_index(self._spec, self._keys, 0, len(self._keys))
        return self._index


class Sharded(Index):
    """Rows on the actors of a Ray cluster.

    Actors whose process or machine dies are started again by Ray, and load their rows again. They end when nobody
    refers to the index any more.

    Parameters
    ----------
    n_shards : actors.
    spec : of the index that each builds.
    how : options of the search.

    Raises
    ------
    PathNotShared : if an actor does not see the files of the keys.
    ShardDown : if an actor dies while it builds.
    """

    def __init__(self, keys: KeySource, first: int, n_rows: int, n_shards: int, spec: IndexSpec, how: How) -> None:
        self.first, self.n_rows, self._how = first, n_rows, how
        self._ray = connected("index engine 'ray'")
        self._session = _session(self._ray)
        if how.resource is not None and how.resource not in self._ray.cluster_resources():
            raise InvalidInput(
                f"no machine of the cluster has the resource {how.resource!r}; "
                f"start one with ray start --resources='{{\"{how.resource}\": 1}}'"
            )
        self._ranges = _ranges(n_rows, n_shards)
        self._name = f"ray:{n_shards}" + ("" if spec == EXACT else f":{_written(replace(spec, options={}))}")
        precision = np.finfo(precision_of(keys))
        self._slack = 4 * float(np.sqrt(keys.width) * precision.eps)  # machines may round sums of squares differently
        self._changing = Lock()
        self._n_partial = 0
        self._masks: tuple[Usable | None, Sequence[Any]] = (None, [])
        places = [(first + rows.start, len(rows)) for rows in self._ranges]
        self._given = [(_sent(self._ray, keys.opener(*place)), digest_of(keys, *place), spec) for place in places]
        self._actors = [self._started(number) for number in range(len(self._ranges))]
        self._ends = weakref.finalize(self, _end, self._ray, self._session, self._actors)
        self._ends.atexit = False  # Ray ends the actors of a process that ends
        try:
            told = self._ask(lambda _, actor: actor.ready.remote(), building=True)
        except BaseException:
            self._ends()
            raise
        self._inner = ", ".join(dict.fromkeys(description for description, _ in told))
        self._promises = all(promises for _, promises in told)

    def candidates(self, queries: Float[ndarray, "q d"], n_neighbors: int, usable: Usable | None = None) -> Candidates:
        k = min(n_neighbors, self.n_rows)
        if not len(queries):
            return Candidates(np.zeros((0, k), np.int64), np.zeros(0) if self._promises else None)
        sent = queries if queries.nbytes <= INLINE_BYTES else self._ray.put(queries)
        masks = self._mask(usable)
        answers = self._ask(lambda number, actor: actor.nearest.remote(sent, k, masks[number]))
        down = [answer for answer in answers if isinstance(answer, _Down)]
        if down:
            self._tell(down)
        return self._merged(answers, k)

    @property
    def saved_as(self) -> None:
        return None

    def saved(self) -> Pieces:
        return {}

    def measured(self) -> None:
        return None

    @property
    def description(self) -> str:
        return f"ray {len(self._ranges)} shards, {self._inner}"

    def _started(self, number: int) -> Any:
        """An actor for a shard, on whichever machine has room."""
        threads = self._how.threads  # one is Ray's own choice, for which a process may be waiting
        own = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}}} if threads > 1 else {}
        where = {self._how.resource: A_LITTLE} if self._how.resource else {}
        actor = self._ray.remote(Shard).options(
            num_cpus=0, resources=where, max_restarts=-1, max_task_retries=0, scheduling_strategy="SPREAD", **own
        )
        return actor.remote(*self._given[number])

    def _ask(self, call: Callable[[int, Any], Any], *, building: bool = False) -> list[Any]:
        """What each shard answers; a `_Down` of one that does not.

        Parameters
        ----------
        call : calls a method of an actor.
        building : wait as long as it takes, and raise what goes wrong.
        """
        ray = self._ray
        if _session(ray) != self._session:
            raise ShardDown("Ray was shut down after the index was built; make the regressor again")
        with self._changing:
            actors = list(self._actors)
        called = [call(number, actor) for number, actor in enumerate(actors)]
        ray.wait(called, num_returns=len(called), timeout=None if building else self._how.timeout)
        answers = [self._answer(number, actors[number], answer, building) for number, answer in enumerate(called)]
        if building and (down := [answer for answer in answers if isinstance(answer, _Down)]):
            raise ShardDown(self._described(down))
        return answers

    def _answer(self, number: int, actor: Any, called: Any, building: bool) -> Any:
        """What one shard answers, or that it does not."""
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(called, timeout=0)
        except exceptions.RayTaskError as error:
            if not isinstance(error.cause, ResidualMemoryError):
                raise
            if building or not isinstance(error.cause, _CANNOT_LOAD):
                raise error.cause from None
            why = str(error.cause)
        except exceptions.RayError as error:
            error.__traceback__ = None  # whose frames would keep this index, and so the actors, alive
            if isinstance(error, exceptions.GetTimeoutError):
                return _Down(number, f"it has said nothing for {self._how.timeout:g} seconds")
            why = "its process died, and is being started again"
            if isinstance(error, exceptions.ActorDiedError):
                self._replace(number, actor)
        return _Down(number, why)

    def _replace(self, number: int, dead: Any) -> None:
        """Start an actor in the place of one that Ray has given up."""
        with self._changing:
            if self._actors[number] is dead:
                self._actors[number] = self._started(number)

    def _tell(self, down: Sequence[_Down]) -> None:
        """Say that shards are missing, as an error or as a warning."""
        what = self._described(down)
        if not self._how.partial or len(down) == len(self._ranges):
            raise ShardDown(what)
        with self._changing:
            self._n_partial += 1
        # A warning is shown once for each text, and no partial answer is to be silent.
        warnings.warn(f"partial answer {self._n_partial}: {what}", PartialAnswer, stacklevel=2)

    def _described(self, down: Sequence[_Down]) -> str:
        rows = self._ranges[down[0].number]
        where = f"rows {self.first + rows.start:,} to {self.first + rows.stop:,}"
        more = f" (and {len(down) - 1} more)" if len(down) > 1 else ""
        hint = "" if self._how.partial else f", or take what the others know with {self._name + '?partial=1'!r}"
        return (
            f"shard {down[0].number + 1} of {len(self._ranges)}, {where}, does not answer{more}: {down[0].why}; "
            f"ask again in some seconds{hint}"
        )

    def _mask(self, usable: Usable | None) -> Sequence[Any]:
        """Which rows of each shard count, one bit each; sent once for each version of the memory."""
        if usable is None:
            return [None] * len(self._ranges)
        with self._changing:
            if self._masks[0] is not usable:
                mine = usable.rows[self.first : self.first + self.n_rows]
                sent = [self._ray.put(np.packbits(mine[rows.start : rows.stop])) for rows in self._ranges]
                self._masks = usable, sent
            return self._masks[1]

    def _merged(self, answers: Sequence[Any], k: int) -> Candidates:
        """The nearest rows of all shards that answered, and a distance that none which was left out is below."""
        there = [
            (answer, rows) for answer, rows in zip(answers, self._ranges, strict=True) if not isinstance(answer, _Down)
        ]
        distances = np.concatenate([answer[0] for answer, _ in there], axis=1)
        listed = np.concatenate(
            [np.where(answer[1] >= 0, answer[1] + (self.first + rows.start), -1) for answer, rows in there], axis=1
        )
        ends = [answer[0][:, -1] for answer, rows in there if answer[0].shape[1] < len(rows)]
        bounds = np.min([np.full(len(distances), np.inf), *ends], axis=0)
        if distances.shape[1] < k:  # of those that answered all rows are listed
            listed = np.pad(listed, ((0, 0), (0, k - distances.shape[1])), constant_values=-1)
        elif distances.shape[1] > k:
            order = np.argpartition(distances, k, axis=1)
            bounds = np.minimum(bounds, np.take_along_axis(distances, order[:, k : k + 1], 1)[:, 0])
            listed = np.take_along_axis(listed, order[:, :k], 1)
        promised = bounds**2 * (1 - self._slack) if self._promises else None
        return Candidates(listed, promised, complete=len(there) == len(answers))


def _read(spec: IndexSpec) -> tuple[int, IndexSpec]:
    """How many shards, and the spec of each, with the options that are not ours."""
    shards, _, inner = spec.build.partition(":")
    if not shards.isdecimal() or int(shards) < 1:
        raise InvalidInput(
            f"index {_written(replace(spec, options={}))!r} does not say how many shards there are; "
            "write ray:8, or ray:8:SPEC with the index of each, for example ray:8:faiss:IVF1024,PQ64x4fs"
        )
    parsed = parse_spec(inner or "exact")
    if parsed.engine == "ray" or parsed.options:
        raise InvalidInput(f"the index of each shard is {inner!r}, expected another engine; options go to the end")
    others = {name: value for name, value in spec.options.items() if name not in (*OPTIONS, RESOURCE)}
    return int(shards), IndexSpec(parsed.engine, parsed.build, others)


def _how(spec: IndexSpec) -> How:
    given = numbers_of({name: value for name, value in spec.options.items() if name in OPTIONS})
    found = {**OPTIONS, **given}
    if found["partial"] not in (0, 1):
        raise InvalidInput(f"index option partial is {found['partial']:g}, expected 0 or 1")
    if not 0 < found["timeout"] < float("inf"):
        raise InvalidInput(f"index option timeout is {found['timeout']:g}, expected seconds above 0")
    if found["threads"] < 1 or not found["threads"].is_integer():
        raise InvalidInput(f"index option threads is {found['threads']:g}, expected a whole number above 0")
    return How(bool(found["partial"]), found["timeout"], int(found["threads"]), spec.options.get(RESOURCE))


def _written(spec: IndexSpec) -> str:
    options = "&".join(f"{name}={value}" for name, value in spec.options.items())
    return spec.engine + (f":{spec.build}" if spec.build else "") + (f"?{options}" if options else "")


def _ranges(n_rows: int, n_shards: int) -> list[range]:
    """The rows of each shard, as even as can be; none is empty."""
    cuts = np.linspace(0, n_rows, min(n_shards, n_rows) + 1).astype(int).tolist()
    return [range(first, end) for first, end in itertools.pairwise(cuts)]


def digest_of(keys: KeySource, first: int, n_rows: int) -> int:
    """Of keys that lie evenly over the rows."""
    rows = first + np.unique(np.linspace(0, n_rows - 1, min(SAMPLED_ROWS, n_rows)).astype(np.int64))
    some = keys.take(rows)
    return zlib.crc32(f"{some.dtype} {n_rows} {some.shape}".encode() + np.ascontiguousarray(some).tobytes())


def _sent(ray: Any, opener: Callable[[], KeySource]) -> Any:
    """What goes with an actor: the opener itself, or where it holds the keys a reference to it in a list."""
    buffers: list[Any] = []
    ray.cloudpickle.dumps(opener, protocol=5, buffer_callback=buffers.append)
    size = sum(buffer.raw().nbytes for buffer in buffers)
    return opener if size <= INLINE_BYTES else [ray.put(opener)]


def _session(ray: Any) -> str | None:
    """What tells one connection to Ray from the next; None without one."""
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    return f"{context.gcs_address} {context.get_job_id()}"


def _end(ray: Any, session: str | None, actors: Sequence[Any]) -> None:
    if _session(ray) == session:
        for actor in actors:
            with suppress(ray.exceptions.RayError):  # of an actor that is dead
                ray.kill(actor, no_restart=True)
