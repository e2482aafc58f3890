"""CIFAR-100 as a torch data set."""

import torch
from jaxtyping import Int64
from numpy import arange, ndarray
from torch import Tensor
from torch.utils.data import Dataset

from residual_memory.demo.cifar100 import Cifar100


class Images(Dataset[tuple[Tensor, int]]):
    """Items (image [3 32 32] in [0, 1], fine label), all or some of a split.

    Parameters
    ----------
    data : the split.
    rows : which of its images, in which order; None is all.
    """

    def __init__(self, data: Cifar100, rows: Int64[ndarray, " r"] | None = None) -> None:
        self.classes = data.class_names
        self._data = data
        self._rows = arange(len(data)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        row = self._rows[item]
        return torch.from_numpy(self._data.images[row]).float().div_(255), int(self._data.labels[row])
