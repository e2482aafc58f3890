"""What flows through the three seams: observations of a model, neighbours of a query, compressed predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float, Int, Int64, Shaped
from numpy import ndarray

Task = Literal["classification", "regression"]
Metric = Literal["euclidean", "cosine"]


@dataclass(frozen=True)
class Observations:
    """What a model showed on a batch of labelled examples: the first seam.

    Attributes
    ----------
    ids : int64 or strings, one per example.
    keys : intermediate-layer vectors.
    labels : class indices, or target values.
    predictions : the base's probabilities, or predicted values.
    groups : optional, for example the document of a token.
    carried : optional, what each row carries beside the numbers: owners, expires, tags and snippets as
        `Memory.append` takes them.
    """

    ids: Shaped[ndarray, " b"]
    keys: Float[ndarray, "b d"]
    labels: Shaped[ndarray, "b ..."]
    predictions: "Float[ndarray, 'b c'] | TopM"
    groups: Shaped[ndarray, " b"] | None = None
    carried: Mapping[str, Sequence[Any] | ndarray] | None = None

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Neighbors:
    """The nearest rows of a memory: the second seam.

    Attributes
    ----------
    distances : Euclidean, ascending; +inf marks a missing neighbour.
    rows : positions in the memory; −1 marks a missing neighbour.
    complete : whether all rows were searched; False of a distributed index some parts of which did not answer.
    """

    distances: Float[ndarray, "q k"]
    rows: Int64[ndarray, "q k"]
    complete: bool = True

    def first(self, k: int) -> "Neighbors":
        """The k nearest alone."""
        return Neighbors(self.distances[:, :k], self.rows[:, :k], self.complete)

    @property
    def farthest(self) -> Float[ndarray, " q"]:
        """Distance to the last of them; +inf where there are fewer."""
        return self.distances[:, -1]


@dataclass(frozen=True)
class TopM:
    """The m largest base probabilities of each example and the mass of all the others.

    A memory takes them as [b m]; what it gives back has the shape of the rows that were asked for.

    Attributes
    ----------
    indices : classes, in any order.
    probabilities : the base's probability of each.
    rest : 1 − the sum of `probabilities`.
    """

    indices: Int[ndarray, "*b m"]
    probabilities: Float[ndarray, "*b m"]
    rest: Float[ndarray, "*b"]

    def __len__(self) -> int:
        return len(self.indices)
