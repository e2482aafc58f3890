"""A map of a memory: a place in the plane for each row, near rows near each other.

Some rows, the landmarks, are laid out by t-SNE where scikit-learn is installed, by two principal components where it is
not; every other row lies between the landmarks that are nearest to it.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int64
from numpy import ndarray

from residual_memory.indexes.base import nearest
from residual_memory.indexes.registry import build_index, parse_spec
from residual_memory.memory import Column, Snapshot

POINTS = 200_000  # that are shown of a larger memory
LANDMARKS, BETWEEN, COMPONENTS, BLOCK = 3_000, 3, 50, 8192
SPREAD = 0.5  # of the room around the nearest landmark, by which rows are moved so that none hides another


@dataclass(frozen=True)
class Atlas:
    """Places of rows.

    Attributes
    ----------
    generation : of the snapshot, in which the row numbers hold.
    rows : of the snapshot, ascending.
    places : from 0 to 1 in both directions.
    method : how landmarks were laid out.
    """

    generation: int
    rows: Int64[ndarray, " p"]
    places: Float32[ndarray, "p 2"]
    method: str


def atlas(snapshot: Snapshot, *, n_points: int = POINTS, progress: Callable[[float], None] | None = None) -> Atlas:
    """Lay out the rows of a snapshot, or a sample of them; the same rows lie at the same places each time."""
    random = np.random.default_rng(0)
    rows = np.flatnonzero(snapshot.alive)
    if len(rows) > n_points:
        rows = np.sort(random.choice(rows, n_points, replace=False))
    if len(rows) < 3:
        return Atlas(snapshot.generation, rows, np.full((len(rows), 2), 0.5, np.float32), "none")
    chosen = np.sort(random.choice(rows, min(LANDMARKS, len(rows)), replace=False))
    keys = np.ascontiguousarray(snapshot.keys.take(chosen), np.float32)
    laid, method = _laid_out(keys)
    landmarks = Column([keys], keys[:0])
    part = build_index(parse_spec("exact"), landmarks, 0, len(keys))
    room = _room(laid)
    places = np.empty((len(rows), 2), np.float32)
    for start in range(0, len(rows), BLOCK):
        here = rows[start : start + BLOCK]
        queries = np.ascontiguousarray(snapshot.keys.take(here), np.float32)
        found = nearest([part], landmarks, queries, min(BETWEEN, len(keys)))
        weights = 1 / (found.distances**4 + 1e-12)
        weights /= weights.sum(axis=1, keepdims=True)
        moved = random.normal(size=(len(here), 2)) * SPREAD * room[found.rows[:, :1]]
        places[start : start + BLOCK] = np.einsum("qk,qkc->qc", weights, laid[found.rows]) + moved
        if progress is not None:
            progress((start + len(here)) / len(rows))
    low, high = places.min(axis=0), places.max(axis=0)
    return Atlas(snapshot.generation, rows, (places - low) / np.maximum(high - low, 1e-9).max(), method)


def _room(laid: Float[ndarray, "l 2"]) -> Float[ndarray, " l"]:
    """How far each landmark is from its third neighbour on the map."""
    part = min(BETWEEN, len(laid) - 1)
    blocks = np.array_split(laid, max(1, len(laid) // 500))
    gaps = [np.linalg.norm(block[:, None] - laid, axis=2) for block in blocks]
    return np.concatenate([np.partition(gap, part, axis=1)[:, part] for gap in gaps])


def _laid_out(keys: Float32[ndarray, "l d"]) -> tuple[Float[ndarray, "l 2"], str]:
    components = _components(keys, min(COMPONENTS, *keys.shape))
    if importlib.util.find_spec("sklearn") is None or len(keys) < 10:
        return np.pad(components[:, :2], ((0, 0), (0, max(0, 2 - components.shape[1])))), "principal components"
    from sklearn.manifold import TSNE

    perplexity = min(30, (len(keys) - 1) // 3)
    return TSNE(perplexity=perplexity, init="random", random_state=0, n_jobs=1).fit_transform(components), "t-SNE"


def _components(keys: Float32[ndarray, "l d"], n: int) -> Float32[ndarray, "l n"]:
    """The first principal components."""
    centred = keys - keys.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    return centred @ directions[:n].T
