"""Small networks, the data that they are watched on, and their keys worked out without a hook."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn
from torch.utils.data import Dataset

from residual_memory.demo.networks import CifarResNet
from residual_memory.memory import Memory


class Examples(Dataset[Any]):
    """Pairs (x, y) that count how often they are read, and may fail at one of them."""

    def __init__(self, inputs: Any, labels: Tensor, *, fails_at: int | None = None) -> None:
        self.inputs, self.labels, self.fails_at = inputs, labels, fails_at
        self.error: BaseException = KeyboardInterrupt()
        self.seconds_each = 0.0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Any, Tensor]:
        if row == self.fails_at:
            raise self.error
        time.sleep(self.seconds_each)
        if isinstance(self.inputs, dict):
            return {name: values[row] for name, values in self.inputs.items()}, self.labels[row]
        if isinstance(self.inputs, tuple):
            return tuple(values[row] for values in self.inputs), self.labels[row]
        return self.inputs[row], self.labels[row]


class Mlp(nn.Module):
    """Two layers with names, dropout and a batch norm: everything that differs between training and use."""

    def __init__(self, n_in: int = 4, n_outputs: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n_in, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(6, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class ConvNet(nn.Module):
    """Feature maps [b 5 8 8], their mean, and a head."""

    def __init__(self, n_outputs: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU())
        self.head = nn.Linear(5, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def keys_of(model: nn.Module, x: Tensor) -> Tensor:
    """The input of the head, by calling the parts one after another."""
    model.eval()
    with torch.inference_mode():
        if isinstance(model, Mlp):
            return model.body(x)
        if isinstance(model, ConvNet):
            return model.features(x).mean((2, 3))
        assert isinstance(model, CifarResNet)
        x = torch.relu(model.norm(model.conv((x - model.mean) / model.deviation)))
        return model.stage3(model.stage2(model.stage1(x))).mean((2, 3))


def outputs_of(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    with torch.inference_mode():
        return model(x)


def mlp_data(n: int = 20, n_outputs: int = 3, seed: int = 0) -> Examples:
    random = torch.Generator().manual_seed(seed)
    return Examples(torch.randn(n, 4, generator=random), torch.arange(n) % n_outputs)


def image_data(n: int = 10, n_outputs: int = 3, seed: int = 0) -> Examples:
    random = torch.Generator().manual_seed(seed)
    return Examples(torch.rand(n, 3, 8, 8, generator=random), torch.arange(n) % n_outputs)


def target_data(n: int = 20, n_outputs: int = 1, seed: int = 0) -> Examples:
    random = torch.Generator().manual_seed(seed)
    shape = (n,) if n_outputs == 1 else (n, n_outputs)
    return Examples(torch.randn(n, 4, generator=random), torch.randn(shape, generator=random))


def batches_seen(model: nn.Module) -> list[int]:
    """A list to which the size of every batch that goes through the model is added from now on."""
    seen: list[int] = []
    model.register_forward_hook(lambda _module, inputs, _outputs: seen.append(len(inputs[0])))
    return seen


def trained_a_little(model: nn.Module, x: Tensor) -> nn.Module:
    """Running statistics that are not those of a fresh network, so that train and eval mode differ."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    return model


Case = tuple[Callable[[], nn.Module], Callable[[], Examples]]
CLASSIFIERS: dict[str, Case] = {
    "mlp": (Mlp, mlp_data),
    "conv": (ConvNet, image_data),
    "resnet": (lambda: CifarResNet(8, 3), image_data),
}
REGRESSORS: dict[str, Case] = {
    "one output": (lambda: Mlp(n_outputs=1), target_data),
    "several outputs": (lambda: Mlp(n_outputs=2), lambda: target_data(n_outputs=2)),
}


def rows_of(memory: Memory, name: str) -> ndarray:
    """One column, row by row."""
    snapshot = memory.snapshot
    return snapshot.column(name).take(np.arange(snapshot.n_rows))


def same_rows(first: Memory, second: Memory, atol: float = 0.0) -> None:
    """Assert that two memories hold the same rows in the same order."""
    np.testing.assert_array_equal(first.ids, second.ids)
    np.testing.assert_array_equal(rows_of(first, "labels"), rows_of(second, "labels"))
    for name in ("keys", "predictions"):
        np.testing.assert_allclose(rows_of(first, name), rows_of(second, name), rtol=0, atol=atol)
