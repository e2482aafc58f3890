"""What the library costs: building over the bare forward pass, correcting over predicting, exact search over faiss.

Two things that are compared are timed in turns in one process, and their medians divided, so that a busy machine slows
both alike.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from experiments.results_file import stamped
from residual_memory.correction import ResidualKNN
from residual_memory.demo.assets import N_TRAIN, shipped_keys, shipped_network
from residual_memory.demo.cifar100 import N_IMAGES
from residual_memory.demo.networks import CifarResNet, channels_last
from residual_memory.evaluation import Setting
from residual_memory.memory import Memory
from residual_memory.models.torch import ResMemModule, build_memory

RESULTS = Path(__file__).parent / "results" / "core.json"
TURNS = 7
BATCH = 1_000
STREAMED_ROWS, STREAMED_DIM, STREAMED_OUTPUTS = 1_000_000, 256, 10

Row = dict[str, Any]


def run() -> None:
    """Measure everything, write the result file and print it."""
    rows = [building(), *correcting(), searching(), *streaming()]
    RESULTS.parent.mkdir(exist_ok=True)
    head = stamped("core", "make bench", "CIFAR-100 keys of the shipped ResNet-8; random images and keys")
    content = {**head, "rows": rows}
    RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    for row in rows:
        print(f"{row['setting']}: {row['ratio']:.3f} of {row['against']} (goal {row['goal']:g})")


def building() -> Row:
    """A build on disk over the bare forward pass through the same loader."""
    network = shipped_network("resnet8-50000")
    images = torch.rand(10_000, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    dataset = TensorDataset(images, torch.arange(10_000) % 100)

    def bare() -> None:
        with torch.inference_mode():
            for batch, _ in DataLoader(dataset, 256):
                network(batch)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            build_memory(network, dataset, Path(folder) / "memory", layer="head", verbose=False).close()

    return row_of("build of 10,000 images on disk, ResNet-8", "bare forward pass", 1.15, *in_turns(ours, bare))


def correcting() -> list[Row]:
    """Corrected over base predictions, exact search over the 50,000 shipped keys."""
    shipped = shipped_keys()
    memory = Memory.create(dim=64, n_outputs=100)
    memory.append(shipped.keys[:N_TRAIN], shipped.labels[:N_TRAIN], shipped.predictions()[:N_TRAIN])
    images = torch.rand(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    setting = Setting(n_neighbors=50, bandwidth=0.6, temperature=1.4)
    rows = []
    for depth, goal in ((8, 1.6), (56, 1.1)):
        network = shipped_network("resnet8-50000") if depth == 8 else channels_last(CifarResNet(depth).eval())
        module = ResMemModule(network, memory, setting=setting, layer="head", index="exact")

        def base(network: CifarResNet = network) -> Tensor:
            with torch.inference_mode():
                return network(images).log_softmax(1)

        def ours(module: ResMemModule = module) -> Tensor:
            return module(images)

        name = f"corrected prediction, ResNet-{depth}, batch {BATCH:,}, exact over 50,000 keys"
        rows.append(row_of(name, "base prediction", goal, *in_turns(ours, base)))
    return rows


def searching() -> Row:
    """Exact search with ties by id over plain faiss Flat, which promises neither order nor full precision."""
    shipped = shipped_keys()
    keys, queries = shipped.keys[:N_TRAIN], shipped.keys[N_TRAIN:]
    memory = Memory.create(dim=64, n_outputs=100)
    memory.append(keys, shipped.labels[:N_TRAIN], shipped.predictions()[:N_TRAIN])
    knn = ResidualKNN(memory, n_neighbors=50, bandwidth=1.0, index="exact:faiss")
    flat = faiss.IndexFlatL2(64)
    flat.add(keys)
    times = in_turns(lambda: knn.search(queries, 50), lambda: flat.search(queries, 50), turns=31)
    return row_of(f"exact search, {N_IMAGES['test']:,} queries, 50,000 x 64, k = 50", "faiss Flat", 1.1, *times)


def streaming() -> list[Row]:
    """Peak memory and size of a build of a million keys that lie on disk."""
    with tempfile.TemporaryDirectory() as folder:
        _write_arrays(Path(folder) / "data")
        target = Path(folder) / "memory"
        command = [sys.executable, "-m", "benchmarks.peak", str(target), "--data", str(Path(folder) / "data")]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        measured = json.loads(answer.stdout.splitlines()[-1])
        with Memory.open(target) as memory:
            per_row = memory.n_bytes / len(memory)
            estimated = memory.layout.bytes_per_row()
    size = f"{STREAMED_ROWS:,} x {STREAMED_DIM} float32, {STREAMED_OUTPUTS} outputs"
    peak = row_of(f"peak memory of a streamed build, {size}", "600 MB", 1.0, measured["peak_bytes"], 600e6)
    bytes_ = row_of(f"bytes a row on disk, {size}", "resmem estimate", 1.1, per_row, estimated)
    return [peak | {"unit": "bytes", "build_seconds": measured["seconds"]}, bytes_ | {"unit": "bytes"}]


def _write_arrays(folder: Path) -> None:
    """Keys, labels and predictions as .npy files, written in blocks."""
    folder.mkdir()
    random = np.random.default_rng(0)
    shapes = {"keys": (STREAMED_ROWS, STREAMED_DIM), "predictions": (STREAMED_ROWS, STREAMED_OUTPUTS)}
    for name, shape in shapes.items():
        file = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, shape)
        for start in range(0, shape[0], 50_000):
            block = random.random((50_000, shape[1]), np.float32)
            file[start : start + 50_000] = block / block.sum(1, keepdims=True) if name == "predictions" else block
        file.flush()
    np.save(folder / "labels.npy", random.integers(0, STREAMED_OUTPUTS, STREAMED_ROWS))


def in_turns(ours: Callable[[], object], theirs: Callable[[], object], turns: int = TURNS) -> tuple[float, float]:
    """Median seconds of two things that are run in turns, after one turn to warm up."""
    seconds: list[tuple[float, float]] = []
    for _ in range(turns + 1):
        first = time.perf_counter()
        ours()
        second = time.perf_counter()
        theirs()
        seconds.append((second - first, time.perf_counter() - second))
    own, other = zip(*seconds[1:], strict=True)
    return statistics.median(own), statistics.median(other)


def row_of(setting: str, against: str, goal: float, ours: float, theirs: float) -> Row:
    """A row of a result file: ours over theirs, to be at most the goal."""
    return {
        "setting": setting,
        "ratio": ours / theirs,
        "against": against,
        "goal": goal,
        "ours": ours,
        "theirs": theirs,
        "unit": "seconds",
    }
