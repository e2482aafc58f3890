"""Test images that have a near-duplicate among the training images: found by search, drawn for the eye.

A pair is proposed by its thumbnails (8 x 8, as they are and mirrored) and judged at full size: both images are turned
into edges, which a common background does not share, and moved by up to two pixels; the correlation of what overlaps
must reach `THRESHOLD`.

Barz and Denzler ("Do we train on test data?", 2020) found duplicates of about a tenth of the test images by network
features and by eye; edges and pixels find the literal ones among them.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64, UInt8
from numpy import ndarray

from residual_memory.demo.cifar100 import Cifar100
from residual_memory.figures import gallery
from residual_memory.indexes.base import nearest
from residual_memory.indexes.registry import build_index, parse_spec
from residual_memory.memory import Column

PROPOSED = 10
MOVED = (-2, -1, 0, 1, 2)
THRESHOLD = 0.4


@dataclass(frozen=True)
class Duplicates:
    """Pairs above the threshold, surest first.

    Attributes
    ----------
    rows, partners : test image and its training image.
    correlations : of their edges.
    """

    rows: Int64[ndarray, " p"]
    partners: Int64[ndarray, " p"]
    correlations: Float[ndarray, " p"]


def near_duplicates(train: Cifar100, test: Cifar100, threshold: float = THRESHOLD) -> Duplicates:
    """The best training partner of each test image, where it is good enough."""
    thumbnails = thumbnails_of(train.images)
    source = Column([thumbnails], thumbnails[:0])
    index = build_index(parse_spec("exact"), source, 0, len(train))
    best, partners = np.full(len(test), -1.0), np.full(len(test), -1)
    for mirrored in (False, True):
        images = test.images[..., ::-1] if mirrored else test.images
        found = nearest((index,), source, thumbnails_of(images), PROPOSED)
        for place in range(PROPOSED):
            rows = found.rows[:, place]
            correlations = edge_correlations(images, train.images[rows])
            better = correlations > best
            best[better], partners[better] = correlations[better], rows[better]
    rows = np.flatnonzero(best >= threshold)
    rows = rows[np.argsort(-best[rows], kind="stable")]
    return Duplicates(rows, partners[rows], best[rows])


def thumbnails_of(images: UInt8[ndarray, "n 3 32 32"]) -> Float[ndarray, "n 192"]:
    """8 x 8 means of each channel, without the image's own brightness and contrast."""
    small = images.reshape(-1, 3, 8, 4, 8, 4).mean((3, 5)).reshape(len(images), -1).astype(np.float32)
    small -= small.mean(axis=1, keepdims=True)
    return small / np.maximum(np.linalg.norm(small, axis=1, keepdims=True), 1e-6)


def edge_correlations(images: UInt8[ndarray, "n 3 32 32"], others: UInt8[ndarray, "n 3 32 32"]) -> Float[ndarray, " n"]:
    """Largest correlation of two images' edges over small shifts."""
    ours, theirs = _edges(images), _edges(others)
    inner = _unit(ours[:, :, 2:-2, 2:-2])
    best = np.full(len(images), -1.0)
    size = ours.shape[-1]
    for down, right in product(MOVED, MOVED):
        window = theirs[:, :, 2 + down : size - 2 + down, 2 + right : size - 2 + right]
        best = np.maximum(best, np.einsum("nd,nd->n", inner, _unit(window)))
    return best


def draw_pairs(found: Duplicates, train: Cifar100, test: Cifar100, path: Path, columns: int = 8) -> None:
    """Pairs at the sure end, in the middle and at the threshold, one above the other."""
    third = len(found.rows) // 2
    chosen = [*range(columns), *range(third, third + columns), *range(len(found.rows) - columns, len(found.rows))]
    rows = []
    for start in range(0, len(chosen), columns):
        some = chosen[start : start + columns]
        rows.append([(test.images[found.rows[i]], f"test {found.correlations[i]:.2f}") for i in some])
        rows.append([(train.images[found.partners[i]], "training") for i in some])
    path.parent.mkdir(parents=True, exist_ok=True)
    gallery(rows).savefig(path, dpi=60)


def _edges(images: UInt8[ndarray, "n 3 h w"]) -> Float[ndarray, "n 1 g v"]:
    grey = images.mean(axis=1, dtype=np.float32)[:, None]
    middle = grey[:, :, 1:-1, 1:-1]
    around = grey[:, :, :-2, 1:-1] + grey[:, :, 2:, 1:-1] + grey[:, :, 1:-1, :-2] + grey[:, :, 1:-1, 2:]
    return 4 * middle - around


def _unit(windows: Float[ndarray, "n 1 h w"]) -> Float[ndarray, "n d"]:
    flat = windows.reshape(len(windows), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
