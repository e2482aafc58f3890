"""Probabilities on a log scale: one or two bytes each, with the same relative error for large and small ones."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt
from numpy import ndarray

WITHIN_CELL = 0.499  # of a step from a code's own value: still that code, whatever rounding adds
BLOCK = 1 << 16  # codes looked up at once: their temporaries stay in the processor's cache


@dataclass(frozen=True)
class LogScale:
    """Codes of −log p in equal steps, and one of their own, the largest, for exactly 0.

    A code alone is right within `relative_error`. Decoding scales each row to sum to 1 again, which adds at most as
    much and keeps the order. Every value is scaled alike: were the largest to absorb what is missing, a row without a
    large one could turn over.

    Attributes
    ----------
    dtype : of the codes.
    reach : probabilities go down to e^−reach; smaller ones count as that.
    """

    dtype: np.dtype[Any]
    reach: float

    @property
    def zero(self) -> int:
        """The code of probability 0."""
        return int(np.iinfo(self.dtype).max)

    @property
    def step(self) -> float:
        """Between the logarithms of two codes."""
        return self.reach / (self.zero - 1)

    @property
    def relative_error(self) -> float:
        """Of a probability within reach, before its row is scaled."""
        return float(np.expm1(self.step / 2))

    def encoded(self, probabilities: Float[ndarray, "..."]) -> UInt[ndarray, "..."]:
        """The nearest code of each."""
        with np.errstate(divide="ignore"):
            steps = np.rint(np.log(probabilities, dtype=np.float64) / -self.step)
        return np.where(probabilities == 0, self.zero, np.clip(steps, 0, self.zero - 1)).astype(self.dtype)

    def decoded(
        self, listed: UInt[ndarray, "... m"], rest: UInt[ndarray, "..."]
    ) -> tuple[Float32[ndarray, "... m"], Float32[ndarray, "..."]]:
        """Probabilities and rest of rows of codes; each row sums to 1."""
        probabilities, left = self._looked_up(listed), self._looked_up(rest)
        totals = np.einsum("...m->...", probabilities) + left
        scale = 1 / np.maximum(totals, np.finfo(np.float32).tiny)  # all zero only in a damaged row
        probabilities *= scale[..., None]
        return probabilities, left * scale

    def portable(
        self, listed: UInt[ndarray, "... m"], rest: UInt[ndarray, "..."]
    ) -> tuple[Float32[ndarray, "... m"], Float32[ndarray, "..."]]:
        """As `decoded`, but a value that scaling carried beyond its code stays there: encoded again, all are the same.

        A row that was stored sums to 1 as nearly as the rows that a memory takes.
        """
        probabilities, left = self.decoded(listed, rest)
        return self._within_code(probabilities, listed), self._within_code(left, rest)

    @cached_property
    def _table(self) -> Float32[ndarray, " codes"]:
        values = np.exp(-self.step * np.arange(self.zero + 1)).astype(np.float32)
        values[self.zero] = 0
        return values

    def _within_code(self, values: Float32[ndarray, "..."], codes: UInt[ndarray, "..."]) -> Float32[ndarray, "..."]:
        centre, reach = self._looked_up(codes), np.float32(np.exp(WITHIN_CELL * self.step))
        return np.clip(values, centre / reach, centre * reach)

    def _looked_up(self, codes: UInt[ndarray, "..."]) -> Float32[ndarray, "..."]:
        flat = codes.reshape(-1)
        values = np.empty(len(flat), np.float32)
        for start in range(0, len(flat), BLOCK):
            here = slice(start, start + BLOCK)
            np.take(self._table, flat[here], out=values[here], mode="clip")  # no code is outside; the default copies
        return values.reshape(codes.shape)


LOG_SCALES = {"log8": LogScale(np.dtype(np.uint8), 16.0), "log16": LogScale(np.dtype(np.uint16), 32.0)}
