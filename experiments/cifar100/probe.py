"""A linear classifier refitted on a memory's keys: what the keys hold without any memory."""

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from numpy import ndarray
from torch.nn import functional

WEIGHT_DECAYS = (1e-6, 1e-5, 1e-4, 1e-3)
STEPS = 60


def fit_probe(
    keys: Shaped[ndarray, "n d"], labels: Int64[ndarray, " n"], queries: Shaped[ndarray, "q d"]
) -> tuple[Float[ndarray, "q c"], float]:
    """Logits of a logistic regression for the queries, and the weight decay that a tenth of the rows chose."""
    centre, scale = keys.mean(0, dtype=np.float64), keys.std(0, dtype=np.float64) + 1e-6
    rows = torch.from_numpy(((keys - centre) / scale).astype(np.float32))
    targets = torch.from_numpy(np.asarray(labels, np.int64))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    kept, left = order[len(order) // 10 :], order[: len(order) // 10]
    hits = {}
    for decay in WEIGHT_DECAYS:
        weight, bias = _fit(rows[kept], targets[kept], decay)
        hits[decay] = float(((rows[left] @ weight + bias).argmax(1) == targets[left]).float().mean())
    best = max(hits, key=lambda decay: hits[decay])
    weight, bias = _fit(rows, targets, best)
    asked = torch.from_numpy(((queries - centre) / scale).astype(np.float32))
    return (asked @ weight + bias).numpy(), best


def _fit(rows: torch.Tensor, targets: torch.Tensor, decay: float) -> tuple[torch.Tensor, torch.Tensor]:
    n_classes = int(targets.max()) + 1
    weight = torch.zeros(rows.shape[1], n_classes, requires_grad=True)
    bias = torch.zeros(n_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(rows @ weight + bias, targets) + decay * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
