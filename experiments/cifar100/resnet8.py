"""ResNet-8 on CIFAR-100: the paper's table, finer keys, linear probes, and the gain without near-duplicates.

Every setting is chosen on the 5,000 held-out training images with the network of the other 45,000; the networks that
were trained on all 50,000 images use it on the test images.
"""

import json
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64
from numpy import ndarray
from safetensors.torch import load_file

from experiments.cifar100.duplicates import draw_pairs, near_duplicates
from experiments.cifar100.probe import fit_probe
from experiments.results_file import ResultFile, Row
from residual_memory.demo.assets import (
    ASSETS,
    N_TRAIN,
    SHIPPED_KEYS,
    ShippedKeys,
    shipped_keys,
    shipped_network,
    write_keys,
)
from residual_memory.demo.cifar100 import Cifar100, find_cifar100, read_cifar100, user_cache
from residual_memory.demo.images import Images
from residual_memory.demo.networks import CifarResNet, channels_last
from residual_memory.demo.report import roses_figure
from residual_memory.demo.run import FINE, PLAIN, Measured, find_roses, measure, tuned_setting
from residual_memory.evaluation import Setting, evaluate
from residual_memory.memory import Memory
from residual_memory.metrics import correctness, mean_interval
from residual_memory.models.base import KeyChoice
from residual_memory.models.torch import build_memory, observe
from residual_memory.tuning import TuningResult
from residual_memory.types import Observations

NAME = "cifar100-resnet8"
MIDDLE = KeyChoice("tuned 2x2", "stage3", "output", 2, "cosine")
CHOICES = (PLAIN, MIDDLE, FINE)
SEEDS = (0, 1, 2)
PAPER = Setting(n_neighbors=53, bandwidth=0.7, temperature=1.4, shrinkage=1.0)  # as recalled, not tuned by us
NETWORKS = user_cache() / "networks"
PICTURES = Path(__file__).parents[2] / "docs" / "images"


def run(*, quick: bool, fresh: bool) -> None:
    """Measure every row that the result file does not hold yet, and print the table."""
    folder = find_cifar100()
    if folder is None:
        raise SystemExit("CIFAR-100 was not found; run `make data`, or set RESMEM_DATA")
    train, test = read_cifar100(folder, "train"), read_cifar100(folder, "test")
    if quick:
        train, test = train.first(5_000), test.first(1_000)
    data = "CIFAR-100, official test split (10,000); settings from 5,000 held-out training images"
    results = ResultFile(NAME, f"python -m experiments {NAME}", data, fresh=fresh, **_quick_folder(quick))
    repeated = near_duplicates(train, test)
    settings = {}
    for choice in (PLAIN,) if quick else CHOICES:
        chosen = tuned_setting(shipped_network("resnet8-45000"), train, choice, progress=True)
        settings[choice.name] = {"best": chosen.best.to_dict(), "best_memory_only": chosen.best_memory_only.to_dict()}
        for seed in (0,) if quick else SEEDS:
            if not results.holds(f"resnet8 {choice.name}", seed):
                seen = _Seen.by(_network(seed), choice, chosen, train, test)
                _measure(results, seen, choice, chosen, seed, repeated.rows)
                if seed == 0 and not quick:
                    _ship(seen, choice)
        if choice is PLAIN and not quick:
            results.row("resnet8 plain from the shipped 8-bit keys", 0, partial(_shipped, chosen))
    if not quick:
        draw_pairs(repeated, train, test, PICTURES / "near-duplicates.png")
        (ASSETS / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    print(results.table())


@dataclass(frozen=True)
class _Seen:
    """One network, its memory, and what both say of the test images."""

    network: CifarResNet
    memory: Memory
    rows: Observations
    measured: Measured
    train: Cifar100
    test: Cifar100

    @staticmethod
    def by(network: CifarResNet, choice: KeyChoice, chosen: TuningResult, train: Cifar100, test: Cifar100) -> "_Seen":
        memory = build_memory(network, Images(train), None, **choice.options)
        rows = observe(network, Images(test), memory)
        measured = measure(memory, rows, chosen.best, choice.name, chosen.best_memory_only)
        return _Seen(network, memory, rows, measured, train, test)


def _measure(
    results: ResultFile,
    seen: _Seen,
    choice: KeyChoice,
    chosen: TuningResult,
    seed: int,
    repeated: Int64[ndarray, " p"],
) -> None:
    """All rows of one key choice and one network; the row named after the choice comes last and marks them done."""
    name = f"resnet8 {choice.name}"
    results.row(f"{name} without near-duplicates", seed, lambda: _without(seen.measured, seen.rows, repeated))
    if choice is PLAIN:
        results.row("resnet8 plain, the paper's k, σ and T", seed, lambda: _paper(seen.memory, seen.rows))
    if seed == 0:
        results.row(f"resnet8 linear probe on {choice.name} keys", seed, lambda: _probe(seen.memory, seen.rows))
    held_out = {"held_out_gain": chosen.gain.value, "chosen": chosen.best.to_dict()}
    results.row(name, seed, lambda: _row("resmem", {**seen.measured.evaluation.to_dict(), **held_out}))


def _quick_folder(quick: bool) -> dict[str, Path]:
    return {"folder": Path(tempfile.mkdtemp())} if quick else {}


def _network(seed: int) -> CifarResNet:
    """The shipped network for seed 0; the others are trained by experiments/runs/cifar100-resnet8.sh."""
    if seed == 0:
        return shipped_network("resnet8-50000")
    network = CifarResNet(8)
    network.load_state_dict(load_file(NETWORKS / f"resnet8-50000-seed{seed}.safetensors"))
    return channels_last(network.eval())


def _row(method: str, figures: Row) -> Row:
    return {"method": method, **figures}


def _without(measured: Measured, seen: Observations, repeated: Int64[ndarray, " p"]) -> Row:
    """The same predictions, measured on the test images that have no near-duplicate in the memory."""
    kept = np.setdiff1d(np.arange(len(seen)), repeated)
    labels = np.asarray(seen.labels)[kept]
    alone = correctness(measured.said.memory_only[kept], labels)
    base, corrected = (correctness(said[kept], labels) for said in (measured.said.base, measured.said.corrected))
    return _row("resmem", {**_compared(base, corrected), "memory_only": float(alone.mean())})


def _compared(base: Float[ndarray, " q"], other: Float[ndarray, " q"]) -> Row:
    """Accuracies of two methods on the same rows, and the paired gain."""
    gain = mean_interval(other - base)
    return {
        "metric": "accuracy",
        "base": float(base.mean()),
        "corrected": float(other.mean()),
        "gain": gain.value,
        "gain_low": gain.low,
        "gain_high": gain.high,
        "n_test": len(base),
    }


def _paper(memory: Memory, seen: Observations) -> Row:
    figures = evaluate(memory, seen.keys, seen.labels, np.asarray(seen.predictions), PAPER)
    return _row("resmem", {**figures.to_dict(), "chosen": PAPER.to_dict()})


def _probe(memory: Memory, seen: Observations) -> Row:
    """A linear classifier refitted on the memory's own keys: the fair neighbour of finer keys."""
    rows = np.arange(len(memory))
    snapshot = memory.snapshot
    scores, weight_decay = fit_probe(snapshot.keys.take(rows), snapshot.targets(rows), _queries(memory, seen))
    labels = np.asarray(seen.labels)
    base, probe = correctness(np.asarray(seen.predictions), labels), correctness(scores, labels)
    return _row("linear-probe", {**_compared(base, probe), "weight_decay": weight_decay})


def _queries(memory: Memory, seen: Observations) -> Float[ndarray, "q d"]:
    keys = np.asarray(seen.keys)
    return keys / np.linalg.norm(keys, axis=1, keepdims=True) if memory.layout.metric == "cosine" else keys


def _ship(seen: _Seen, choice: KeyChoice) -> None:
    """Write what the package and its pages ship: the 8-bit keys of the pooled layer, the roses of the finest."""
    if choice is FINE:
        roses = find_roses(seen.memory, seen.rows, seen.measured, seen.train)
        roses_figure(roses, seen.train, seen.test).savefig(PICTURES / "roses.png", dpi=80)
    if choice is PLAIN:
        keys = np.concatenate([seen.memory.snapshot.keys.take(np.arange(N_TRAIN)), seen.rows.keys])
        labels = np.concatenate([seen.train.labels, np.asarray(seen.rows.labels)])
        head = {name: value.detach().numpy() for name, value in seen.network.head.named_parameters()}
        write_keys(SHIPPED_KEYS, ShippedKeys(keys, labels, head["weight"], head["bias"], seen.train.class_names))


def _shipped(chosen: TuningResult) -> Row:
    """What the shipped 8-bit keys give: the table of the demo where there are no images."""
    shipped = shipped_keys()
    predictions = shipped.predictions()
    memory = Memory.create(dim=shipped.keys.shape[1], n_outputs=len(shipped.class_names))
    memory.append(shipped.keys[:N_TRAIN], shipped.labels[:N_TRAIN], predictions[:N_TRAIN])
    rows = slice(N_TRAIN, None)
    figures = evaluate(
        memory,
        shipped.keys[rows],
        shipped.labels[rows],
        predictions[rows],
        chosen.best,
        memory_only=chosen.best_memory_only,
    )
    return _row("resmem", {**figures.to_dict(), "file_bytes": SHIPPED_KEYS.stat().st_size})
