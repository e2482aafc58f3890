"""Small tables and estimators of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy import ndarray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LinearRegression


@dataclass(frozen=True)
class Split:
    """Training and test rows."""

    X: ndarray
    y: ndarray
    X_test: ndarray
    y_test: ndarray


def places(n: int = 600, seed: int = 0) -> Split:
    """A plane with a bump that no line can follow: the memory has something to remember."""
    random = np.random.default_rng(seed)
    X = random.uniform(-2, 2, size=(n + 200, 2))
    y = X[:, 0] + 2 * np.exp(-4 * ((X - 0.5) ** 2).sum(axis=1)) + random.normal(0, 0.05, len(X))
    return Split(X[:n], y[:n], X[n:], y[n:])


def board(n: int = 600, seed: int = 0) -> Split:
    """Squares of a chess board, which are no matter of lines."""
    random = np.random.default_rng(seed)
    X = random.uniform(0, 3, size=(n + 200, 2))
    y = (np.floor(X[:, 0]) + np.floor(X[:, 1])).astype(int) % 2
    return Split(X[:n], y[:n], X[n:], y[n:])


def frame(n: int = 120, seed: int = 0) -> tuple[pd.DataFrame, ndarray]:
    """Numbers, text, categories and gaps, and a target that depends on the text."""
    random = np.random.default_rng(seed)
    towns = random.choice(["Bern", "Basel", "Chur"], n)
    rooms = random.integers(1, 6, n).astype(float)
    rooms[::17] = np.nan
    sizes = random.lognormal(4, 1, n)
    X = pd.DataFrame(
        {"town": towns, "rooms": rooms, "size": sizes, "kind": pd.Categorical(random.choice(["flat", "house"], n))}
    )
    return X, np.where(towns == "Bern", 3.0, 1.0) + 0.1 * random.normal(size=n)


class Counting(LinearRegression):
    """Counts how often it is fitted."""

    fits = 0

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "Counting":
        Counting.fits += 1
        super().fit(X, y, sample_weight)
        return self


class Rote(ClassifierMixin, BaseEstimator):
    """Knows the rows that it was fitted on by heart, and guesses others: what must not leak."""

    def fit(self, X: Any, y: Any) -> "Rote":
        self.classes_ = np.unique(y)
        self._known = {row.tobytes(): label for row, label in zip(np.asarray(X), y, strict=True)}
        return self

    def predict_proba(self, X: Any) -> ndarray:
        said = np.full((len(X), len(self.classes_)), 1 / len(self.classes_))
        for place, row in enumerate(np.asarray(X)):
            if row.tobytes() in self._known:
                said[place] = 0.0
                said[place, np.searchsorted(self.classes_, self._known[row.tobytes()])] = 1.0
        return said


class Told(ClassifierMixin, BaseEstimator):
    """Says of two classes what stands in the last column: the probability of the second."""

    def fit(self, X: Any, y: Any) -> "Told":
        self.classes_ = np.unique(y)
        return self

    def predict_proba(self, X: Any) -> ndarray:
        return np.column_stack([1 - X[:, -1], X[:, -1]])
