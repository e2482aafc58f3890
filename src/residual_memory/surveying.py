"""A memory's own rows, each asked without itself: where the memory gains and errs, and which labels look wrong."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int64, Shaped
from numpy import ndarray

from residual_memory.correction import ById, ResidualKNN
from residual_memory.display import html_table
from residual_memory.errors import InvalidInput
from residual_memory.evaluation import Setting
from residual_memory.validation import as_count

ROWS = 20_000
BLOCK_VALUES = 1 << 22  # predictions that are held at a time
SMALLEST = 1e-12


@dataclass(frozen=True)
class Survey:
    """What is said of some rows of a classification, before and after the correction.

    The base was trained on these rows, so it is surer of them than of others: figures on them tell about rows, not how
    good the memory is.

    Attributes
    ----------
    ids, labels : of the rows.
    said, corrected : the likeliest class, of base and correction.
    said_confidence, corrected_confidence : its probability.
    said_label, corrected_label : the probability of the row's own label.
    suggestion : what base and neighbours together say instead of the label.
    agreement : the weight of the neighbours with the row's own label.
    """

    ids: Shaped[ndarray, " s"]
    labels: Int64[ndarray, " s"]
    said: Int64[ndarray, " s"]
    corrected: Int64[ndarray, " s"]
    said_confidence: Float[ndarray, " s"]
    corrected_confidence: Float[ndarray, " s"]
    said_label: Float[ndarray, " s"]
    corrected_label: Float[ndarray, " s"]
    suggestion: Int64[ndarray, " s"]
    agreement: Float[ndarray, " s"]

    def __len__(self) -> int:
        return len(self.labels)

    def _repr_html_(self) -> str:
        put_wrong = (self.said == self.labels) & (self.corrected != self.labels)
        told = {
            "put right": self.put_right,
            "put wrong": put_wrong,
            "label in doubt": self.doubt > 0.5,
        }
        rows = [(name, f"{rows.sum():,}") for name, rows in told.items()]
        return html_table(f"{len(self):,} rows of a memory, each asked without itself", rows, ("", "rows"))

    @property
    def gain(self) -> Float[ndarray, " s"]:
        """How much likelier the correction makes the label, in nats."""
        return np.log(np.maximum(self.corrected_label, SMALLEST)) - np.log(np.maximum(self.said_label, SMALLEST))

    @property
    def put_right(self) -> Bool[ndarray, " s"]:
        """Rows that the base has wrong and the correction right."""
        return (self.said != self.labels) & (self.corrected == self.labels)

    @property
    def doubt(self) -> Float[ndarray, " s"]:
        """How little base and neighbours believe the label, from 0 to 1.

        References
        ----------
        Northcutt et al., "Confident learning: estimating uncertainty in dataset labels", JAIR 2021, whose
        self-confidence it takes the mean of with the neighbours'.
        """
        return 1 - (self.said_label + self.agreement) / 2


def survey(
    knn: ResidualKNN,
    setting: Setting,
    *,
    n_rows: int = ROWS,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Survey:
    """Ask a memory about its own rows, each without itself.

    Parameters
    ----------
    knn : of the memory.
    setting : how the memory is used.
    n_rows : of a larger memory a sample of so many.
    seed : of the sample.
    progress : called with the part that is done.

    Raises
    ------
    InvalidInput : if the memory is of a regression, or is empty.
    """
    layout, snapshot = knn.memory.layout, knn.memory.snapshot
    if layout.task == "regression":
        raise InvalidInput(
            "the memory is of a regression, but a survey is of classes; ResMemRegressor.label_issues is not"
        )
    alive = np.flatnonzero(snapshot.alive)
    if not len(alive):
        raise InvalidInput("the memory is empty: there is no row to ask about")
    limit = as_count("n_rows", n_rows)
    if len(alive) > limit:
        alive = np.sort(np.random.default_rng(seed).choice(alive, limit, replace=False))
    parts = []
    for rows in _blocks(alive, layout.n_outputs):
        parts.append(_asked(knn, setting, rows))
        if progress is not None:
            progress(sum(len(part["labels"]) for part in parts) / len(alive))
    return Survey(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _asked(knn: ResidualKNN, setting: Setting, rows: Int64[ndarray, " b"]) -> dict[str, ndarray]:
    snapshot = knn.memory.snapshot
    keys, said, labels = snapshot.keys.take(rows), snapshot.predictions(rows), snapshot.targets(rows).astype(np.int64)
    ids = snapshot.id_column.take(rows)
    found = knn.look_up(keys, ById(ids), labels=True)
    assert found.labels is not None
    corrected = setting.valid(said, found)
    near = np.clip(found.labels, 0, 1)
    places = np.arange(len(rows))
    return {
        "ids": ids,
        "labels": labels,
        "said": said.argmax(axis=1),
        "corrected": corrected.argmax(axis=1),
        "said_confidence": said.max(axis=1),
        "corrected_confidence": corrected.max(axis=1),
        "said_label": said[places, labels],
        "corrected_label": corrected[places, labels],
        "suggestion": (said + near).argmax(axis=1),
        "agreement": near[places, labels],
    }


def _blocks(rows: Int64[ndarray, " s"], n_outputs: int) -> Iterator[Int64[ndarray, " b"]]:
    step = max(1, min(2000, BLOCK_VALUES // n_outputs))
    return (rows[start : start + step] for start in range(0, len(rows), step))
