"""Finding rows by id, segment by segment: nothing is joined, and what is learned of a segment serves later versions."""

import itertools
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int64, Shaped
from numpy import ndarray


class SegmentIds:
    """The ids of one segment. They are sorted when they are first looked up, and not at all where they ascend.

    Parameters
    ----------
    ids : of the segment's rows, in row order; an id may stand twice once its first row is forgotten.
    """

    def __init__(self, ids: Shaped[ndarray, " n"]) -> None:
        self.ids = np.asarray(ids)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def ascending(self) -> bool:
        """Whether each id is above the one before it."""
        return bool((self.ids[1:] > self.ids[:-1]).all())

    @cached_property
    def _sorted(self) -> tuple[ndarray, ndarray | None]:
        """Ids in order, and the row of each; None where it is the place."""
        if self.ascending:
            return self.ids, None
        order = np.argsort(self.ids, kind="stable")
        return self.ids[order], order

    def find(self, ids: Shaped[ndarray, " b"], alive: Bool[ndarray, " n"]) -> Int64[ndarray, " b"]:
        """The row of each id that is alive; −1 where there is none."""
        known, order = self._sorted
        found = np.full(len(ids), -1)
        if not len(known):
            return found
        within = np.flatnonzero((ids >= known[0]) & (ids <= known[-1]))
        wanted = ids[within]
        places = np.searchsorted(known, wanted.astype(known.dtype))  # as wide as these: no copy of them is made
        while len(within):
            held = places < len(known)
            held[held] = known[places[held]] == wanted[held]
            within, wanted, places = within[held], wanted[held], places[held]
            rows = places if order is None else order[places]
            here = alive[rows]
            found[within[here]] = rows[here]
            within, wanted, places = within[~here], wanted[~here], places[~here] + 1
        return found


def all_ascending(segments: Sequence[SegmentIds]) -> bool:
    """Whether ids ascend within and over all segments."""
    filled = [segment for segment in segments if len(segment)]
    if not all(segment.ascending for segment in filled):
        return False
    return all(first.ids[-1] < then.ids[0] for first, then in itertools.pairwise(filled))


def find_rows(
    segments: Sequence[SegmentIds], alive: Bool[ndarray, " n"], ids: Shaped[ndarray, " b"]
) -> Int64[ndarray, " b"]:
    """The row of each id over all segments, by their order; −1 where none is alive."""
    rows = np.full(len(ids), -1)
    start = 0
    for segment, end in zip(segments, np.cumsum([len(segment) for segment in segments]).tolist(), strict=True):
        found = segment.find(ids, alive[start:end])
        rows = np.where(found >= 0, found + start, rows)
        start = end
    return rows
