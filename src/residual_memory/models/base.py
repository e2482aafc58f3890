"""What every framework shares: where keys come from, and the memory that is filled from a stream of observations."""

import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Literal

import numpy as np

from residual_memory.errors import FingerprintMismatch, InSampleResiduals, InvalidInput
from residual_memory.memory import Memory
from residual_memory.memory.attributes import NEVER
from residual_memory.memory.format import MANIFEST
from residual_memory.memory.segments import SEGMENT_BYTES
from residual_memory.types import Metric, Observations, TopM

Side = Literal["input", "output"]


@dataclass(frozen=True)
class KeyChoice:
    """Where the keys of a memory come from, and which weightings of the neighbours to choose from.

    Attributes
    ----------
    name : of the choice, in tables.
    layer, side, pool, metric, key_dtype, copies : as in `build_memory`.
    kernels : as in `tune`.
    """

    name: str
    layer: str | None = None
    side: Side = "input"
    pool: int = 1
    metric: Metric = "euclidean"
    key_dtype: str = "float32"
    copies: tuple[Callable[[Any], Any], ...] = ()
    kernels: tuple[str, ...] = ("exponential",)

    @property
    def options(self) -> dict[str, Any]:
        """As arguments of `build_memory`."""
        names = ("layer", "side", "pool", "metric", "key_dtype", "copies")
        return {name: getattr(self, name) for name in names}


COMMIT_SECONDS = 30.0  # an interrupted build loses no more than this


@dataclass(frozen=True)
class Source:
    """Where a memory's rows come from; kept in its manifest and compared when it is used.

    Attributes
    ----------
    model : class and digest of the base model.
    layer : dotted name of the layer, or the name of the function that gives keys.
    side : of the layer.
    pool : cells a side that feature maps are averaged to.
    data : what is known of the data set.
    complete : whether the build went through.
    tokenizer : digest of the tokenizer that made the tokens, where it was given.
    projection : a matrix [d p] that turns what the layer gives into keys, float32 in base64; None leaves it as it is.
    """

    model: Mapping[str, Any]
    layer: str
    side: Side
    pool: int
    data: Mapping[str, Any]
    complete: bool = False
    tokenizer: str | None = None
    projection: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Source":
        return Source(**values)

    @property
    def of_text(self) -> bool:
        """Whether the rows are tokens, of a language model."""
        return "keep" in self.data

    @property
    def part(self) -> tuple[int, int, int] | None:
        """First row, end, and how many rows the whole has, of a part; None of a whole memory."""
        found = self.data.get("part")
        return None if found is None else (int(found[0]), int(found[1]), int(found[2]))

    @property
    def whole(self) -> "Source":
        """That of the whole which this is a part of."""
        return replace(self, data={name: value for name, value in self.data.items() if name != "part"})

    def check(self, found: "Source", where: str, *, data: bool) -> None:
        """Refuse a model, layer or (when building) data set that the memory was not built with.

        Raises
        ------
        FingerprintMismatch : naming what differs.
        """
        names = ["model", "layer", "side", "pool", *(["data"] if data else [])]
        for name in names:
            was, now = getattr(self, name), getattr(found, name)
            if was != now:
                raise FingerprintMismatch(
                    f"the memory {where} was built with {name} {was!r}, but this is {now!r}; "
                    "use the model, layer and data that it was built with, or build a new memory"
                )


class Builder:
    """Fills a memory from observations, committing often enough that an interruption costs little.

    A context manager: what is buffered is committed on the way out, after Ctrl-C too.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._waiting: list[Observations] = []
        self._bytes = 0
        self._committed = time.monotonic()

    def __enter__(self) -> "Builder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.commit()

    def add(self, observations: Observations) -> None:
        """Take a batch; durable at the latest when the builder is left."""
        self._waiting.append(observations)
        self._bytes += len(observations) * self._memory.layout.bytes_per_row(_width(observations))
        self._bytes += sum(map(len, (observations.carried or {}).get("snippets", ())))
        if self._bytes >= SEGMENT_BYTES // 2 or time.monotonic() - self._committed > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Append what is buffered."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        self._memory.append(
            np.concatenate([batch.keys for batch in waiting]),
            np.concatenate([batch.labels for batch in waiting]),
            joined_predictions([batch.predictions for batch in waiting]),
            ids=np.concatenate([batch.ids for batch in waiting]),
            groups=_joined_groups(waiting),
            **_joined_carried(waiting),
        )
        self._bytes, self._committed = 0, time.monotonic()


def fill(memory: Memory, batches: Iterable[Observations]) -> None:
    """Append a stream of observations to a memory, in segments of a good size."""
    with Builder(memory) as builder:
        for batch in batches:
            builder.add(batch)


def warn_if_in_sample(train_loss: float, held_out_loss: float | None, floor: float) -> None:
    """Say so when residuals on the training data are too small to teach a memory anything.

    Parameters
    ----------
    train_loss, held_out_loss : mean losses of the base, in one unit; None where no held-out data were given.
    floor : a loss that counts as "knows it by heart".
    """
    advice = "pass out-of-fold predictions, or build the memory on data that the base was not trained on"
    if held_out_loss is not None and train_loss < held_out_loss / 2:
        warnings.warn(
            f"the base's loss is {train_loss:.4g} on the memory's data and {held_out_loss:.4g} on held-out data, so "
            f"its residuals there say little about new data; {advice}",
            InSampleResiduals,
            stacklevel=4,
        )
    elif train_loss < floor:
        warnings.warn(
            f"the base's loss on the memory's data is {train_loss:.4g}: it knows them by heart, and there is hardly a "
            f"residual to memorize; {advice}",
            InSampleResiduals,
            stacklevel=4,
        )


def _width(observations: Observations) -> int | None:
    return observations.predictions.indices.shape[1] if isinstance(observations.predictions, TopM) else None


def joined_predictions(predictions: list[Any]) -> Any:
    """Those of several batches as one."""
    if isinstance(predictions[0], TopM):
        columns = ("indices", "probabilities", "rest")
        return TopM(*(np.concatenate([getattr(batch, name) for batch in predictions]) for name in columns))
    return np.concatenate(predictions)


def _joined_groups(batches: list[Observations]) -> Any:
    groups = [batch.groups for batch in batches if batch.groups is not None]
    return np.concatenate(groups) if groups else None


_NOTHING: dict[str, Any] = {"owners": "", "expires": NEVER, "tags": (), "snippets": ""}


def _joined_carried(batches: list[Observations]) -> dict[str, list[Any]]:
    """What the rows of all carry; nothing where a batch does not say."""
    carried = [(len(batch), batch.carried or {}) for batch in batches]
    names = [name for name in _NOTHING if any(name in some for _, some in carried)]
    return {name: [value for n, some in carried for value in some.get(name, [_NOTHING[name]] * n)] for name in names}


def opened(path: str | os.PathLike[str] | None, source: Source, **options: Any) -> Memory:
    """A new memory, or the one that an earlier call began."""
    if path is None or not os.path.exists(os.path.join(path, MANIFEST)):
        return Memory.create(path, source=source.to_dict(), **options)
    memory = Memory.open(path, writable=True)
    try:
        if memory.source is None:
            raise InvalidInput(f"{path} holds a memory that was not built from a model; name another path")
        Source.from_dict(memory.source).check(source, place_of_memory(memory), data=True)
        for name, wanted in options.items():
            held = getattr(memory.layout, name, wanted)
            if held != wanted:
                raise FingerprintMismatch(
                    f"the memory {place_of_memory(memory)} was built with {name} {held!r}, but this is {wanted!r}; "
                    "build with the same, or name another path"
                )
    except BaseException:
        memory.close()
        raise
    return memory


def part_of_rows(part: range, n_rows: int) -> list[int]:
    """A part as a source says it: its first row, its end, and how many rows there are.

    Raises
    ------
    InvalidInput : if it is no range of the rows.
    """
    if part.step != 1 or not 0 <= part.start < part.stop <= n_rows:
        raise InvalidInput(f"part is {part}, expected range(first, end) within the {n_rows:,} rows")
    return [part.start, part.stop, n_rows]


def place_of_memory(memory: Memory) -> str:
    """Where a memory is, for messages."""
    return "in RAM" if memory.path is None else f"at {memory.path}"
