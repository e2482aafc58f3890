"""What a server without this library's would be: FastAPI, pydantic and numpy, one search a request.

python -m benchmarks.plain_server ARRAYS.npz PORT
"""

import sys
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

K = 50


class Asked(BaseModel):
    """Keys and what the base says of them."""

    keys: list[list[float]]
    predictions: list[list[float]]


def plain_app(keys: np.ndarray, labels: np.ndarray, said: np.ndarray, bandwidth: float) -> FastAPI:
    """The same answers as ours: the mean residual of the 50 nearest rows, weighted by exp(-d / bandwidth)."""
    residuals = np.eye(said.shape[1], dtype=np.float32)[labels] - said
    lengths = (keys**2).sum(axis=1)
    app = FastAPI()

    @app.post("/predict")
    def predict(asked: Asked) -> dict[str, Any]:
        queries, base = np.asarray(asked.keys, np.float32), np.asarray(asked.predictions, np.float32)
        squared = np.maximum(lengths - 2 * queries @ keys.T + (queries**2).sum(axis=1, keepdims=True), 0)
        near = np.argpartition(squared, K, axis=1)[:, :K]
        distances = np.sqrt(np.take_along_axis(squared, near, 1))
        weights = np.exp(-(distances - distances.min(axis=1, keepdims=True)) / bandwidth)
        weights /= weights.sum(axis=1, keepdims=True)
        scores = base + np.einsum("qk,qkc->qc", weights, residuals[near])
        scores = np.maximum(scores, 0.1 * base)
        return {"base": base.tolist(), "corrected": (scores / scores.sum(axis=1, keepdims=True)).tolist()}

    return app


if __name__ == "__main__":
    with np.load(sys.argv[1]) as arrays:
        app = plain_app(arrays["keys"], arrays["labels"], arrays["predictions"], float(arrays["bandwidth"]))
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", access_log=False)
