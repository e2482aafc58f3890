"""What is served: a memory, how it is used, and the model that it corrects. Nothing here knows of HTTP."""

import difflib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike

from residual_memory.correction import ById
from residual_memory.errors import DimensionMismatch, InvalidInput, UnknownId
from residual_memory.evaluation import Setting
from residual_memory.explanation import class_label, explain, told_neighbors, told_outputs
from residual_memory.memory import Memory
from residual_memory.surveying import Survey, survey
from residual_memory.validation import as_ids, as_keys, as_predictions, widened

MAX_WEIGHT = 0.1  # of one row: the less a row may weigh, the less answers tell of who is in the memory

Names = Sequence[int | str]
Order = Literal["distance", "share", "answer"]


@dataclass(frozen=True)
class Query:
    """What a client asks about, checked.

    Attributes
    ----------
    keys, predictions : of the base, at temperature 1; None before a model has seen the inputs.
    inputs : a batch for the model.
    own : ids of the rows of the memory that are asked, each without itself.
    """

    keys: Float[ndarray, "q d"] | None = None
    predictions: Float[ndarray, "q c"] | None = None
    inputs: Any = None
    own: Shaped[ndarray, " q"] | None = None

    def __len__(self) -> int:
        return len(self.inputs if self.keys is None else self.keys)


@dataclass(frozen=True)
class Answer:
    """Base and corrected predictions: probabilities, or values."""

    base: Float[ndarray, "q c"]
    corrected: Float[ndarray, "q c"]


Seen = tuple[Float[ndarray, "q d"], Float[ndarray, "q c"]]


class Model(ABC):
    """A model as the server sees it: from what a client sends to keys and predictions."""

    @abstractmethod
    def batch(self, inputs: Sequence[Any]) -> Any:
        """What a client sends, as a batch with a length.

        Raises
        ------
        InvalidInput : if the model cannot take it.
        """

    @abstractmethod
    def observe(self, batches: Sequence[Any]) -> Sequence[Seen]:
        """Keys and base predictions of each batch; those that fit together pass together."""

    @property
    @abstractmethod
    def takes(self) -> Mapping[str, Any]:
        """What it takes, for people: kind, shape or names of columns."""


class Service(ABC):
    """A memory in use. Its methods may be called from several threads.

    Parameters
    ----------
    memory : open for writing, or a view that `refresh` renews.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.writing = threading.Lock()

    # ------------------------------------------------------------------ what every service does alike

    def forget(self, ids: Names | None = None, where: Mapping[Any, Any] | None = None) -> int:
        """Take rows out of use at once, all or none; gives how many."""
        with self.writing:
            return self.memory.forget(None if ids is None else as_ids(list(ids)), where=where)

    def refresh(self) -> bool:
        """See what another process wrote, and have the index ready for it; True if there was something."""
        changed = self.memory.refresh()
        if changed:
            self.prepare()
        return changed

    # ------------------------------------------------------------------ what each does in its way

    @abstractmethod
    def query(
        self,
        keys: ArrayLike | None = None,
        predictions: ArrayLike | None = None,
        inputs: Sequence[Any] | None = None,
        ids: Names | None = None,
    ) -> Query:
        """What a client asks about, checked.

        Raises
        ------
        InvalidInput, DimensionMismatch : if it is not a way of asking, or does not fit the memory.
        UnknownId : if the memory does not hold an id.
        """

    @abstractmethod
    def answers(self, queries: Sequence[Query]) -> list[Answer]:
        """Corrected predictions of several requests."""

    @abstractmethod
    def neighbors(
        self, query: Query, n_neighbors: int | None = None, without: Names = ()
    ) -> list[list[dict[str, Any]]]:
        """The nearest memories of each query with label and distance; and weight, of those that the setting uses."""

    @abstractmethod
    def explain(
        self,
        query: Query,
        *,
        without: Names = (),
        n_neighbors: int = 10,
        n_outputs: int = 5,
        order: Order = "distance",
    ) -> list[dict[str, Any]]:
        """Of each query: base and corrected outputs, and the memories that made the difference.

        Parameters
        ----------
        without : ids that are passed over this once, as if they were forgotten.
        n_neighbors, n_outputs : how many are listed.
        order : of the memories, the nearest first, those with the largest share of the correction, or those whose
            label is the corrected answer.
        """

    @abstractmethod
    def observed(self, query: Query) -> Seen:
        """Keys, and predictions as wide as the memory's outputs."""

    @abstractmethod
    def add(
        self,
        query: Query,
        labels: Sequence[Any] | None,
        ids: Names | None = None,
        groups: Names | None = None,
        **carried: Any,
    ) -> Shaped[ndarray, " b"]:
        """Append examples; they are durable, and used, when it returns.

        Parameters
        ----------
        labels : class indices or names, or values; None where the input itself holds them.
        ids, groups, carried : as in `Memory.append`.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Make the index fit the memory as it is now."""

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """How the memory is used: setting, index, cap on weights, what the model takes."""

    @abstractmethod
    def name_of(self, label: int) -> str:
        """A class, for people."""

    @abstractmethod
    def context(self, name: int | str, label: Any, snippet: str) -> dict[str, str] | None:
        """The token of a row, and the text before and after it; None where there is none."""

    @abstractmethod
    def survey(self, progress: Callable[[float], None]) -> Survey | None:
        """What the memory says of its own rows; None where it is of values, or of a text."""


class ArrayService(Service):
    """A memory whose queries are keys with predictions, or inputs of a model that gives both.

    Parameters
    ----------
    memory : as in `Service`.
    model : None where clients send keys and predictions.
    setting : by default the one that tuning saved with the memory.
    index, max_weight : as in `ResidualKNN`.
    """

    def __init__(
        self,
        memory: Memory,
        model: Model | None = None,
        *,
        setting: Setting | None = None,
        index: str = "auto",
        max_weight: float = MAX_WEIGHT,
    ) -> None:
        super().__init__(memory)
        self.model = model
        self.setting = setting or Setting.from_dict(memory.setting or {})
        self.knn = self.setting.knn(memory, index=index, max_weight=max_weight)

    def query(
        self,
        keys: ArrayLike | None = None,
        predictions: ArrayLike | None = None,
        inputs: Sequence[Any] | None = None,
        ids: Names | None = None,
    ) -> Query:
        given = {"keys": keys, "predictions": predictions, "inputs": inputs, "ids": ids}
        named = sorted(name for name, value in given.items() if value is not None)
        if named == ["inputs"] and inputs is not None:
            if self.model is None:
                raise InvalidInput("no model is served that could read inputs; send keys and predictions")
            return Query(inputs=self.model.batch(inputs))
        if named == ["ids"] and ids is not None:
            return own_rows(self.memory, ids)
        if named != ["keys", "predictions"]:
            raise InvalidInput(
                f"the queries are {' and '.join(named) or 'missing'}, expected keys and predictions, or inputs, or ids"
            )
        layout = self.memory.layout
        wide = "float64" in (layout.key_dtype, layout.prediction_dtype)
        dtype = np.float64 if wide else np.float32
        queries = as_keys(_floats("keys", keys, dtype), layout.dim)
        said = as_predictions(_floats("predictions", predictions, dtype), layout.task, layout.n_outputs)
        assert isinstance(said, ndarray)
        if len(said) != len(queries):
            raise DimensionMismatch(f"there are {len(said):,} predictions for {len(queries):,} keys, expected as many")
        return Query(queries, said)

    def answers(self, queries: Sequence[Query]) -> list[Answer]:
        """By one search for all but those about the memory's own rows."""
        seen = self._observed(queries)
        found: dict[int, ndarray] = {}
        shared = [place for place, query in enumerate(queries) if query.own is None]
        if shared:
            keys, said = (np.concatenate([seen[place][part] for place in shared]) for part in (0, 1))
            corrected = self.setting.predict(self.knn, keys, said)
            ends = np.cumsum([len(queries[place]) for place in shared])
            found |= zip(shared, np.split(corrected, ends[:-1]), strict=True)
        for place, query in enumerate(queries):
            if query.own is not None:
                found[place] = self.setting.predict(self.knn, *seen[place], exclude=excluded(query, ()))
        return [Answer(said, found[place]) for place, (_, said) in enumerate(seen)]

    def neighbors(
        self, query: Query, n_neighbors: int | None = None, without: Names = ()
    ) -> list[list[dict[str, Any]]]:
        keys, _ = self.observed(query)
        found = self.knn.neighbors(keys, excluded(query, without), n_neighbors=n_neighbors)
        return [told_neighbors(self.memory, found, row) for row in range(len(query))]

    def explain(
        self,
        query: Query,
        *,
        without: Names = (),
        n_neighbors: int = 10,
        n_outputs: int = 5,
        order: Order = "distance",
    ) -> list[dict[str, Any]]:
        keys, said = self.observed(query)
        exclude, setting = excluded(query, without), self.setting
        corrected = setting.predict(self.knn, keys, said, exclude)
        found = explain(
            self.knn,
            keys,
            setting.tempered(said, self.memory.layout.task),
            shrinkage=setting.shrinkage,
            residual_share=setting.residual_share,
            exclude=exclude,
        )
        entries = []
        for row in range(len(query)):
            outputs = told_outputs(self.memory, said[row], corrected[row], n_outputs)
            listed = told_neighbors(self.memory, found, row, [entry["output"] for entry in outputs])
            entries.append({"outputs": outputs, **first(listed, n_neighbors, order, int(corrected[row].argmax()))})
        return entries

    def observed(self, query: Query) -> Seen:
        return self._observed([query])[0]

    def add(
        self,
        query: Query,
        labels: Sequence[Any] | None,
        ids: Names | None = None,
        groups: Names | None = None,
        **carried: Any,
    ) -> Shaped[ndarray, " b"]:
        if labels is None:
            raise InvalidInput("there are no labels, expected one an example")
        keys, said = self.observed(query)
        with self.writing:
            return self.memory.append(keys, self._labels(labels), said, ids, groups, **carried)

    def prepare(self) -> None:
        self.knn.prepare()

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "setting": self.setting.to_dict(),
            "max_weight": self.knn.max_weight,
            "index": self.knn.description,
            "inputs": None if self.model is None else self.model.takes,
            "surveyed": self.memory.layout.task == "classification",
        }

    def name_of(self, label: int) -> str:
        return class_label(self.memory, label)

    def context(self, name: int | str, label: Any, snippet: str) -> dict[str, str] | None:
        return None

    def survey(self, progress: Callable[[float], None]) -> Survey | None:
        if self.memory.layout.task == "regression" or not len(self.memory):
            return None
        return survey(self.knn, self.setting, progress=progress)

    # ------------------------------------------------------------------ inside

    def _observed(self, queries: Sequence[Query]) -> list[Seen]:
        """Keys and predictions of each, these as wide as the memory's outputs."""
        unseen = [query.inputs for query in queries if query.keys is None]
        observed = iter(self.model.observe(unseen)) if self.model is not None and unseen else iter(())
        pairs = [next(observed) if query.keys is None else (query.keys, query.predictions) for query in queries]
        n_outputs = None if self.memory.layout.task == "regression" else self.memory.layout.n_outputs
        return [(keys, widened(np.asarray(said), n_outputs, name="predictions")) for keys, said in pairs]

    def _labels(self, labels: Sequence[Any]) -> Sequence[Any]:
        """Class indices, of names where these were given."""
        names = self.memory.class_names
        if not any(isinstance(label, str) for label in labels):
            return labels
        if names is None:
            raise InvalidInput("a label is a string, but the memory's classes have no names; give class indices")
        known = {name: place for place, name in enumerate(names)}
        if unknown := [label for label in labels if isinstance(label, str) and label not in known]:
            close = difflib.get_close_matches(unknown[0], names, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InvalidInput(f"there is no class {unknown[0]!r} in the memory{hint}")
        return [known[label] if isinstance(label, str) else label for label in labels]


def first(listed: list[dict[str, Any]], n: int, order: Order, answer: int) -> dict[str, Any]:
    """The first memories of a list in order of distance, and what the others amount to."""
    if order != "distance":
        listed = sorted(listed, key=lambda entry: (order == "answer" and entry["label"] != answer, -entry["share"]))
    rest = listed[n:]
    return {"neighbors": listed[:n], "n_more": len(rest), "share_of_more": sum(entry["share"] for entry in rest)}


def own_rows(memory: Memory, names: Names) -> Query:
    """Rows of the memory as queries.

    Raises
    ------
    UnknownId : if the memory does not hold one.
    """
    snapshot, ids = memory.snapshot, as_ids(list(names))
    rows = snapshot.rows_of(ids)
    if (rows < 0).any():
        unknown = ids[rows < 0]
        raise UnknownId(
            f"the memory does not hold {len(unknown):,} of the {len(ids):,} ids, for example {unknown[0]!r}"
        )
    keys = np.asarray(snapshot.keys.take(rows))
    return Query(keys.astype(np.float32) if keys.dtype == np.float16 else keys, snapshot.predictions(rows), own=ids)


def excluded(query: Query, without: Names) -> ById | None:
    """What each query passes over: itself, and what is left out this once."""
    columns = [] if query.own is None else [query.own]
    columns += [np.full(len(query), name) for name in as_ids(list(without))] if without else []
    return ById(np.stack(columns, axis=1)) if columns else None


def _floats(name: str, values: ArrayLike | None, dtype: type[np.floating]) -> ndarray:
    """A table of numbers.

    Raises
    ------
    InvalidInput : if rows differ in length, or something in it is no number.
    """
    try:
        with np.errstate(over="ignore"):  # infinite numbers are refused behind this
            return np.asarray(values, dtype)
    except (ValueError, TypeError, OverflowError):
        raise InvalidInput(f"{name} are no table of numbers; send as many in each row") from None
