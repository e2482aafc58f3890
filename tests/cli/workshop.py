"""What the tests of the command line share: running it, and small data in every form."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from residual_memory.cli.main import main

NET = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

print("the user's own print")

def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.ReLU(), nn.Linear(16, 3))

def examples(n, seed):
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=random)
    images = torch.rand(n, 3, 8, 8, generator=random) * 0.5
    images[torch.arange(n), labels] += 0.4
    return TensorDataset(images, labels)

model = make_model()
train = examples(150, 1)

def held_out():
    return examples(80, 2)

def broken():
    return 1 / 0

class Unlabelled:
    def __init__(self):
        self.images = held_out().tensors[0]
    def __len__(self):
        return len(self.images)
    def __getitem__(self, index):
        return self.images[index]

misshapen = TensorDataset(torch.randn(10, 7), torch.zeros(10, dtype=torch.long))

class Stopping(torch.utils.data.Dataset):
    stopped = False
    def __len__(self):
        return len(train)
    def __getitem__(self, index):
        if index == 100 and not Stopping.stopped:
            Stopping.stopped = True
            raise KeyboardInterrupt
        return train[index]
"""


@dataclass(frozen=True)
class Ran:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def resmem(*words: object) -> Ran:
    """Run a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return Ran(code, out.getvalue(), err.getvalue())


def done(*words: object) -> Ran:
    """Run a command line that must succeed."""
    ran = resmem(*words)
    assert ran.code == 0, ran.err
    return ran


Columns = dict[str, ndarray]


def columns(n: int = 400, seed: int = 3, *, d: int = 6, c: int = 4) -> Columns:
    """Clusters whose class the base gets wrong half of the time: a memory helps."""
    fixed, random = np.random.default_rng(0), np.random.default_rng(seed)
    centres, classes = 3 * fixed.normal(size=(20, d)), fixed.integers(0, c, 20)
    cluster = random.integers(0, 20, n)
    labels = classes[cluster]
    predictions = np.full((n, c), 0.8 / c, np.float32)
    predictions[np.arange(n), (labels + cluster % 2) % c] += 0.2
    keys = (centres[cluster] + 0.3 * random.normal(size=(n, d))).astype(np.float32)
    return {"keys": keys, "labels": labels, "predictions": predictions}


def noise(n: int = 400, seed: int = 3, *, d: int = 6, c: int = 4) -> Columns:
    """Labels that no key tells anything of: no memory helps."""
    random = np.random.default_rng(seed)
    return {
        "keys": random.normal(size=(n, d)).astype(np.float32),
        "labels": random.integers(0, c, n),
        "predictions": np.full((n, c), 1 / c, np.float32) + np.eye(c, dtype=np.float32)[0] * 0.1 - 0.1 / c,
    }


def regression(n: int = 400, seed: int = 3, *, outputs: int | None = None) -> Columns:
    """Values of which the base knows the trend alone; without `outputs` they have one axis."""
    random = np.random.default_rng(seed)
    keys = random.uniform(-1, 1, size=(n, 2)).astype(np.float32)
    wanted = keys[:, 0] + np.sin(3 * keys[:, 1])
    shape = (n,) if outputs is None else (n, outputs)
    spread = np.broadcast_to(wanted.reshape(n, *[1] * (len(shape) - 1)), shape)
    said = np.broadcast_to(keys[:, 0].reshape(n, *[1] * (len(shape) - 1)), shape)
    return {"keys": keys, "labels": spread.astype(np.float32), "predictions": said.astype(np.float32)}


def as_npz(path: Path, data: Columns) -> Path:
    np.savez(path, **data)  # type: ignore[arg-type]
    return path


def as_folder(path: Path, data: Columns) -> Path:
    path.mkdir()
    for name, values in data.items():
        np.save(path / f"{name}.npy", values)
    return path


def as_parquet(path: Path, data: Columns, *, row_group_size: int = 150) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = {"labels": "label", "ids": "id", "groups": "group"}
    made = {names.get(name, name): pa.array(values.tolist()) for name, values in data.items()}
    pq.write_table(pa.table(made), path, row_group_size=row_group_size)
    return path


def as_images(
    path: Path, n: int, seed: int, classes: tuple[str, ...] = ("cat", "dog", "owl"), *, side: int = 8
) -> Path:
    """One strong colour a class, in class subfolders."""
    from PIL import Image

    random = np.random.default_rng(seed)
    for name in classes:
        (path / name).mkdir(parents=True)
        for number in range(n):
            pixels = random.integers(0, 120, (side, side, 3))
            pixels[..., len(name.encode()) % 3 if name not in _COLOURS else _COLOURS[name]] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(path / name / f"{number:03}.png")
    return path


_COLOURS = {"cat": 0, "dog": 1, "owl": 2}
