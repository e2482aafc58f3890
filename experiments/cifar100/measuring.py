"""Choose a setting on held-out images with one network, measure it on the test images with another."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import nn

from experiments.cifar100.comparisons import Seen
from experiments.results_file import ResultFile, Row
from residual_memory.correction import to_probabilities
from residual_memory.demo.cifar100 import Cifar100, find_cifar100, held_out_split, read_cifar100
from residual_memory.demo.images import Images
from residual_memory.demo.networks import CifarNetwork, CifarResNet
from residual_memory.demo.run import BEST, KRIGING_NEIGHBORS, N_NEIGHBORS, PLAIN
from residual_memory.evaluation import HeldOut, Predicted, Setting, corrected_predictions, summarize
from residual_memory.memory import Memory
from residual_memory.metrics import calibration_error, correctness, log_losses, mean_interval
from residual_memory.models.base import KeyChoice
from residual_memory.models.torch import build_memory, observe
from residual_memory.residuals import tempered
from residual_memory.tuning import TuningResult, best_temperature, tune, tune_gate

TRAIN_SAMPLE = 2_000  # memory rows asked for what the method says of its own training images


@dataclass(frozen=True)
class Chosen:
    """What held-out images chose.

    Attributes
    ----------
    seen : the memory of the network that never saw the held-out images, and those images.
    tuning : the additive setting, cross-fitted figures.
    setting : to use: with a gate, where that was asked for and helps.
    held_out_gain : of `setting`, cross-fitted.
    temperature : of the base alone, by log-loss.
    """

    seen: Seen
    tuning: TuningResult
    setting: Setting
    held_out_gain: float
    temperature: float


def opened(name: str, data: str, *, quick: bool, fresh: bool) -> tuple[Cifar100, Cifar100, ResultFile]:
    """Training and test images, and the result file of a recipe; if quick, a slice of them and a file elsewhere."""
    folder = find_cifar100()
    if folder is None:
        raise SystemExit("CIFAR-100 was not found; run `make data`, or set RESMEM_DATA")
    train, test = read_cifar100(folder, "train"), read_cifar100(folder, "test")
    command = f"python -m experiments {name}"
    if not quick:
        return train, test, ResultFile(name, command, data, fresh=fresh)
    elsewhere = Path(tempfile.mkdtemp())
    return train.first(5_000), test.first(1_000), ResultFile(name, command, data, fresh=fresh, folder=elsewhere)


def keys_for(network: CifarNetwork, choice: KeyChoice = BEST) -> KeyChoice:
    """The same keys in a deeper network: its last block has another name."""
    if not isinstance(network, CifarResNet) or choice.layer is None:
        return choice
    last = len(network.stage3) - 1
    return replace(choice, layer=choice.layer.replace("stage3.0.", f"stage3.{last}."))


def choose(network: CifarNetwork, train: Cifar100, rows: Int64[ndarray, " n"], choice: KeyChoice) -> Chosen:
    """Tune on the held-out images with a network trained on `rows`, which are not among them."""
    seen = see_held_out(network, train, rows, choice)
    memory, queries = seen.memory, seen.queries
    said = np.asarray(queries.predictions)
    rows_seen = (memory, queries.keys, queries.labels, said)
    plain = choice.name == PLAIN.name
    found = tune(
        *rows_seen,
        n_neighbors=N_NEIGHBORS if choice.kernels == ("exponential",) else KRIGING_NEIGHBORS,
        shrinkages=(1.0,) if plain else None,
        kernel=choice.kernels,
    )
    setting, gain = found.best, found.gain.value
    if setting.shrinkage and not plain:
        gated = tune_gate(*rows_seen, setting)
        if gated.helps:
            setting, gain = gated.best, gated.gain.value
    temperature = best_temperature(said, queries.labels)
    return Chosen(seen, found, setting, gain, temperature)


def see_held_out(network: CifarNetwork, train: Cifar100, rows: Int64[ndarray, " n"], choice: KeyChoice) -> Seen:
    """The memory of these training images, and the held-out images."""
    memory = build_memory(network, Images(train, rows), None, **keys_for(network, choice).options)
    return Seen(memory, observe(network, Images(train, held_out_split(len(train))[1]), memory))


def see(network: CifarNetwork, train: Cifar100, rows: Int64[ndarray, " n"], test: Cifar100, choice: KeyChoice) -> Seen:
    """The final memory, and the test images."""
    memory = build_memory(network, Images(train, rows), None, **keys_for(network, choice).options)
    return Seen(memory, observe(network, Images(test), memory))


def predicted(seen: Seen, chosen: Chosen) -> Predicted:
    """What base, memory alone and both say of the queries."""
    rows = HeldOut.checked(seen.memory, seen.queries.keys, seen.queries.labels, _said(seen), "accuracy")
    return corrected_predictions(
        seen.memory, rows.keys, rows.predictions, chosen.setting, memory_only=chosen.tuning.best_memory_only
    )


def figures(seen: Seen, chosen: Chosen, said: Predicted) -> Row:
    """Accuracy, log-loss and calibration error of the three methods on the queries, and accuracy on training images."""
    labels = seen.queries.labels
    evaluation = summarize(
        "accuracy",
        base=1 - correctness(said.base, labels),
        memory_only=1 - correctness(said.memory_only, labels),
        corrected=1 - correctness(said.corrected, labels),
    )
    ways = {
        "base": _said(seen),
        "temperature_scaled": tempered(_said(seen), chosen.temperature),
        "corrected": said.corrected if said.gated else to_probabilities(said.corrected, said.base),
    }
    losses = {name: log_losses(probabilities, labels) for name, probabilities in ways.items()}
    better = mean_interval(losses["temperature_scaled"] - losses["corrected"])
    return {
        "method": "resmem",
        **evaluation.to_dict(),
        **{f"log_loss_{name}": float(values.mean()) for name, values in losses.items()},
        "log_loss_gain_low": better.low,
        "log_loss_gain_high": better.high,
        **{f"ece_{name}": calibration_error(probabilities, labels) for name, probabilities in ways.items()},
        **_on_training_images(seen.memory, chosen.setting),
        "held_out_gain": chosen.held_out_gain,
        "held_out_gain_additive": chosen.tuning.gain.value,
        "verdict": evaluation.verdict,
        "chosen": chosen.setting.to_dict(),
        "memory_rows": len(seen.memory),
    }


def without(rows: Int64[ndarray, " p"], seen: Seen, said: Predicted) -> Row:
    """The same predictions, measured on the other rows alone."""
    kept = np.setdiff1d(np.arange(len(seen.queries)), rows)
    labels = np.asarray(seen.queries.labels)[kept]
    alone = correctness(said.memory_only[kept], labels)
    base, corrected = (correctness(part[kept], labels) for part in (said.base, said.corrected))
    return {"method": "resmem", **compared(base, corrected), "memory_only": float(alone.mean())}


def compared(base: Float[ndarray, " q"], other: Float[ndarray, " q"]) -> Row:
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


def cost(network: nn.Module) -> dict[str, int]:
    """Parameters, and multiply-adds of convolutions and linear layers for one 32 x 32 image."""
    counts: list[int] = []

    def count(module: nn.Module, _inputs: Any, result: torch.Tensor) -> None:
        weight = module.weight
        places = result[0, 0].numel() if result.ndim == 4 else 1
        counts.append(int(weight.numel()) * places)  # type: ignore[operator]

    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.inference_mode():
        network.eval()(torch.zeros(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    return {"parameters": sum(value.numel() for value in network.parameters()), "multiply_adds": sum(counts)}


def _said(seen: Seen) -> Float[ndarray, "q c"]:
    return np.asarray(seen.queries.predictions)


def _on_training_images(memory: Memory, setting: Setting) -> Row:
    """Accuracy on what the base was trained on; the corrected figure finds the image itself in the memory."""
    snapshot = memory.snapshot
    groups = snapshot.all_groups
    originals = np.arange(len(memory)) if groups is None else np.flatnonzero(snapshot.all_ids == groups)
    labels, said = snapshot.targets(originals), snapshot.predictions(originals)
    sample = np.random.default_rng(0).choice(len(originals), min(TRAIN_SAMPLE, len(originals)), replace=False)
    keys = snapshot.keys.take(originals[sample]).astype(np.float32)
    corrected = setting.predict(setting.knn(memory, index="auto"), keys, said[sample])
    return {
        "train_base": float(correctness(said, labels).mean()),
        "train_corrected": float(correctness(corrected, labels[sample]).mean()),
        "n_train": len(originals),
    }
