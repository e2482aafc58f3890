"""The method in plain numpy, one line a step: what everything is compared with."""

import numpy as np
from numpy import ndarray

from residual_memory.testing.problems import neighbors as neighbors

KERNELS = {
    "exponential": lambda d, s: np.exp(-d / s),
    "gaussian": lambda d, s: np.exp(-(d**2) / (2 * s**2)),
    "inverse": lambda d, s: 1 / np.maximum(d, s),
    "uniform": lambda d, s: np.ones_like(d),
}


def weights(distances: ndarray, bandwidth: float, kernel: str = "exponential") -> ndarray:
    """Kernel weights [q k] that sum to 1."""
    raw = KERNELS[kernel](distances.astype(np.float64), bandwidth)
    return raw / raw.sum(axis=1, keepdims=True)


def kriging(query: ndarray, keys: ndarray, bandwidth: float, nugget: float) -> ndarray:
    """Weights [k] of simple kriging, (K + nugget I)⁻¹ k, of these keys for one query."""
    between = np.sqrt(((keys[:, None] - keys[None]) ** 2).sum(axis=2))
    towards = np.sqrt(((keys - query) ** 2).sum(axis=1))
    return np.linalg.inv(np.exp(-between / bandwidth) + nugget * np.eye(len(keys))) @ np.exp(-towards / bandwidth)


def tempered(predictions: ndarray, temperature: float) -> ndarray:
    """softmax(logits / T), from probabilities that may hold zeros."""
    powers = predictions.astype(np.float64) ** (1 / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def residuals(labels: ndarray, predictions: ndarray, temperature: float = 1.0) -> ndarray:
    """onehot(y) − softmax(logits / T) [n c] for class indices, y − f(x) for values."""
    if labels.dtype.kind == "f":
        return labels - predictions
    return np.eye(predictions.shape[1])[labels] - tempered(predictions, temperature)


def correction(keys: ndarray, rest: ndarray, queries: ndarray, k: int, bandwidth: float, kernel: str) -> ndarray:
    """Σ w r [q c] over the k nearest keys, whose residuals are `rest` [n c]."""
    distances, rows = neighbors(keys, queries, k)
    return np.einsum("qk,qkc->qc", weights(distances, bandwidth, kernel), rest[rows])


def completed(indices: ndarray, probabilities: ndarray, rest: float, said: ndarray) -> ndarray:
    """A top-m row as a whole distribution [c]: what it does not list shares the rest in proportion to `said` [c]."""
    others = np.ones(len(said), bool)
    others[indices] = False
    whole = np.zeros(len(said))
    whole[indices] = probabilities
    whole[others] = rest * said[others] / said[others].sum() if said[others].sum() > 0 else 0
    return whole / whole.sum()
