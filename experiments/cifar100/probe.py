"""A classifier refitted on a memory's keys: what the keys hold without any memory."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional

BATCH, DROPOUT = 512, 0.3


@dataclass(frozen=True)
class Probe:
    """A fitted classifier and the scale of its inputs."""

    network: nn.Module
    centre: Tensor
    scale: Tensor

    @property
    def n_parameters(self) -> int:
        return sum(value.numel() for value in self.network.parameters())

    def __call__(self, keys: Shaped[ndarray, "q d"]) -> Float[ndarray, "q c"]:
        """Probabilities of each query."""
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            parts = [
                self.network((torch.from_numpy(np.asarray(part, np.float32)) - self.centre) / self.scale)
                for part in np.array_split(keys, max(1, len(keys) // 4096))
            ]
        return torch.cat(parts).float().softmax(1).numpy()


def fit_probe(
    keys: Shaped[ndarray, "n d"],
    labels: Int[ndarray, " n"],
    n_classes: int,
    *,
    hidden: int | None = None,
    weight_decay: float = 0.0,
    rate: float = 2e-3,
    n_epochs: int = 8,
) -> Probe:
    """Fit a linear classifier, or one hidden layer with dropout, by AdamW with a one-cycle schedule.

    Parameters
    ----------
    keys, labels : rows of a memory.
    hidden : units of the hidden layer; None is linear.
    weight_decay : of AdamW.
    rate : largest learning rate.
    n_epochs : passes over the rows.
    """
    torch.manual_seed(0)
    sample = torch.from_numpy(np.asarray(keys[:: max(1, len(keys) // 10_000)], np.float32))
    centre, scale = sample.mean(0), sample.std(0) + 1e-6
    rows, targets = torch.from_numpy(np.asarray(keys)), torch.from_numpy(np.asarray(labels, np.int64))
    d = keys.shape[1]
    network: nn.Module = nn.Linear(d, n_classes)
    if hidden is not None:
        network = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(hidden, n_classes))
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=weight_decay)
    n_steps = n_epochs * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=n_steps)
    for _ in range(n_epochs):
        for places in torch.randperm(len(rows)).split(BATCH):  # type: ignore[no-untyped-call]
            with torch.autocast("cpu", torch.bfloat16):
                logits = network((rows[places].float() - centre) / scale)
            loss = functional.cross_entropy(logits.float(), targets[places])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return Probe(network.eval(), centre, scale)
