"""Which memories moved a prediction, and by how much."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike

from residual_memory.correction import Exclude, Found, ResidualKNN, correct
from residual_memory.display import html_table
from residual_memory.memory import Memory
from residual_memory.validation import as_positive, as_values

QUERIES_SHOWN, NEIGHBORS_SHOWN = 3, 10  # in a notebook


@dataclass(frozen=True)
class Explanation:
    """The correction of each query, split among the memories that made it.

    Attributes
    ----------
    ids, distances, weights : of the neighbours [q k], nearest first; weight 0 where there is none.
    contributions : what each adds to each output [q k c]; the sum over k is the correction.
    corrected : the corrected scores [q c].
    """

    ids: Shaped[ndarray, "q k"]
    distances: Float[ndarray, "q k"]
    weights: Float[ndarray, "q k"]
    contributions: Float[ndarray, "q k c"]
    corrected: Float[ndarray, "q c"]

    @property
    def shares(self) -> Float[ndarray, "q k"]:
        """Of all that was moved in any output, each neighbour's part; 0 where nothing was moved."""
        moved = np.abs(self.contributions).sum(axis=2)
        total = moved.sum(axis=1, keepdims=True)
        return moved / np.where(total > 0, total, 1.0)

    def _repr_html_(self) -> str:
        n, k = self.ids.shape
        tables = []
        for query in range(min(n, QUERIES_SHOWN)):
            present = np.flatnonzero(np.isfinite(self.distances[query]))
            rows = [
                (
                    self.ids[query, place],
                    f"{self.distances[query, place]:.4g}",
                    f"{100 * self.weights[query, place]:.1f} %",
                    f"{100 * self.shares[query, place]:.1f} %",
                )
                for place in present[:NEIGHBORS_SHOWN]
            ]
            caption = f"query {query} of {n:,}: the nearest {len(rows)} of {len(present):,} neighbours"
            tables.append(html_table(caption, rows, ("id", "distance", "weight", "share of the correction")))
        return "".join(tables) or html_table(f"no query, {k} neighbours each", [])


def explain(
    knn: ResidualKNN,
    keys: ArrayLike,
    predictions: ArrayLike,
    *,
    shrinkage: float = 1.0,
    residual_share: float = 1.0,
    exclude: Exclude = None,
) -> Explanation:
    """Split corrections among the memories that made them.

    Parameters
    ----------
    knn : the regressor that corrects.
    keys : queries [q d].
    predictions : base probabilities (tempered as the knn's) or values [q c].
    shrinkage : as in `correct`.
    residual_share : as in `Averages.correction`.
    exclude : as in `ResidualKNN.__call__`.

    Raises
    ------
    InvalidInput, DimensionMismatch : if keys or predictions do not fit the memory.
    """
    amount = as_positive("shrinkage", shrinkage) if shrinkage else 0.0
    said = None if residual_share == 1 else as_values(predictions, name="predictions")
    found, parts = knn.contributions(keys, exclude, predictions=said, residual_share=residual_share)
    parts = parts * np.asarray(amount, parts.dtype)
    return Explanation(
        found.ids,
        found.distances,
        found.weights,
        parts,
        correct(predictions, parts.sum(axis=1)).reshape(parts[:, 0].shape),
    )


# ---------------------------------------------------------------------- for people


def class_label(memory: Memory, label: int) -> str:
    """A class's name, or its number."""
    return memory.class_names[label] if memory.class_names else str(label)


def told_outputs(
    memory: Memory, base: Float[ndarray, " c"], corrected: Float[ndarray, " c"], n_outputs: int
) -> list[dict[str, Any]]:
    """The classes that matter before or after a correction, the likeliest first; every target of a regression."""
    if memory.layout.task == "regression":
        order = np.arange(len(base))
    else:
        order = np.argsort(-np.maximum(base, corrected), kind="stable")[:n_outputs]
        order = order[np.argsort(-corrected[order], kind="stable")]
    return [
        {
            "output": int(place),
            "name": class_label(memory, int(place)) if memory.layout.task == "classification" else str(place),
            "base": float(base[place]),
            "corrected": float(corrected[place]),
        }
        for place in order
    ]


def told_neighbors(
    memory: Memory, found: "Explanation | Found", query: int = 0, outputs: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """The neighbours of one query that there are, with their labels.

    Parameters
    ----------
    found : of some queries; from an `Explanation` each also has its share of all that was moved, and what it `adds` to
        each of the `outputs`.
    query : which of them.
    """
    snapshot = memory.snapshot
    present = np.flatnonzero(np.isfinite(found.distances[query]))
    ids = found.ids[query, present]
    rows = snapshot.rows_of(ids)
    present, ids, rows = present[rows >= 0], ids[rows >= 0], rows[rows >= 0]  # others were forgotten meanwhile
    classes = memory.layout.task == "classification"
    entries: list[dict[str, Any]] = [
        {
            "id": name,
            "label": label,
            "name": class_label(memory, label) if classes else None,
            "distance": float(found.distances[query, place]),
            "weight": float(found.weights[query, place]),
        }
        for place, name, label in zip(present, ids.tolist(), snapshot.targets(rows).tolist(), strict=True)
    ]
    if isinstance(found, Explanation):
        shares = found.shares[query]
        for place, entry in zip(present, entries, strict=True):
            entry["share"] = float(shares[place])
            if len(outputs):
                entry["adds"] = found.contributions[query, place, list(outputs)].tolist()
    return entries
