"""CIFAR-100: every network of ours with its memory, beside what else a user could do.

Every setting is chosen on the 5,000 held-out training images with a network that never saw them. The final ResNet-8,
trained on all 50,000 images, uses the settings of the one trained on 45,000; the wider and deeper networks are trained
on those 45,000 alone and half as long, so they choose their own.
"""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cifar100 import sample_size
from experiments.cifar100.comparisons import Seen, compare, methods
from experiments.cifar100.duplicates import Duplicates, draw_pairs, near_duplicates
from experiments.cifar100.measuring import (
    Chosen,
    choose,
    compared,
    cost,
    figures,
    opened,
    predicted,
    see,
    see_held_out,
    without,
)
from experiments.cifar100.networks import trained, weights_file
from experiments.cifar100.samples import SAMPLES
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
from residual_memory.demo.cifar100 import Cifar100
from residual_memory.demo.networks import CifarNetwork, CifarResNet
from residual_memory.demo.report import roses_figure
from residual_memory.demo.run import BEST, FINE, PLAIN, Measured, find_roses
from residual_memory.evaluation import Setting, evaluate
from residual_memory.memory import Memory
from residual_memory.metrics import correctness
from residual_memory.models.base import KeyChoice

NAME = "cifar100"
CHOICES = (PLAIN, FINE, BEST)
SEEDS = (0, 1, 2)
FAMILY = ("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "mobilenetv2", "resnet8-wide")
FULL_STEPS, SHORT_STEPS = 15_600, 7_800
PAPER = Setting(n_neighbors=53, bandwidth=0.7, temperature=1.4, shrinkage=1.0)  # as recalled, not tuned by us
PICTURES = Path(__file__).parents[2] / "docs" / "images"


def run(*, quick: bool, fresh: bool) -> None:
    """Measure every row that the result file does not hold yet, and print the table."""
    data = "CIFAR-100, official test split (10,000); settings from 5,000 held-out training images"
    train, test, results = opened(NAME, data, quick=quick, fresh=fresh)
    table = _Table(results, train, test)
    for choice in (PLAIN,) if quick else CHOICES:
        table.resnet8(choice, (0,) if quick else SEEDS)
    if not quick:
        table.beside_others()
        table.family()
        draw_pairs(table.repeated, train, test, PICTURES / "near-duplicates.png")
    print(results.table())


@dataclass(frozen=True)
class _Table:
    """The rows of the table, measured in turn."""

    results: ResultFile
    train: Cifar100
    test: Cifar100
    chosen: dict[str, Chosen] = field(default_factory=dict)
    seen: dict[str, Seen] = field(default_factory=dict)

    @cached_property
    def repeated(self) -> Duplicates:
        """Test images that have a near-duplicate among the training images."""
        return near_duplicates(self.train, self.test)

    def resnet8(self, choice: KeyChoice, seeds: tuple[int, ...]) -> None:
        """The ResNet-8 of all images, seed by seed; the row named after the choice comes last and marks them done."""
        name = f"resnet8 {choice.name}"
        for seed in seeds:
            if self.results.holds(name, seed) or not _is_there(seed):
                continue
            chosen, seen = self._chosen(choice), self._seen(choice, seed)
            said = predicted(seen, chosen)
            rows = self.repeated.rows
            self.results.row(f"{name} without near-duplicates", seed, lambda: without(rows, seen, said))  # noqa: B023
            if choice is PLAIN:
                self.results.row("resnet8 plain, the paper's k, σ and T", seed, lambda: _paper(seen))  # noqa: B023
            if choice is not PLAIN and seed == 0:
                self.results.row(f"{name}, without the gate", seed, lambda: _additive(seen, chosen))  # noqa: B023
            if seed == 0 and len(self.train) == N_TRAIN:
                self._ship(seen, chosen, choice)
            self.results.row(name, seed, lambda: figures(seen, chosen, said))  # noqa: B023

    def beside_others(self) -> None:
        """Everything else that can be done with the same keys, seed 0."""
        for choice in (PLAIN, BEST):
            prefix = f"resnet8 keys of '{choice.name}'"
            if all(self.results.holds(f"{prefix}: {method}", 0) for method in methods(choice.metric)):
                continue
            known = self.chosen.get(choice.name)
            rows = SAMPLES["90%"](self.train)
            choosing = known.seen if known else see_held_out(_choosing(), self.train, rows, choice)
            for method, measure in compare(choosing, self._seen(choice, 0)):
                self.results.row(f"{prefix}: {method}", 0, lambda: {"method": method, **measure()})  # noqa: B023

    def family(self) -> None:
        """Every network that was trained on the 45,000 images, plain and tuned; then each in place of a memory."""
        rows = SAMPLES["90%"](self.train)
        base = None
        for name in FAMILY:
            if not weights_file(name, "90%", SHORT_STEPS, 0).exists():
                print(f"{name}: not trained on the 45,000 images, so not measured; see experiments/runs/cifar100.sh")
                continue
            network = trained(name, "90%", SHORT_STEPS)
            for choice in (PLAIN, BEST):
                setting = f"{name} of 45,000 images, {choice.name}"
                if not self.results.holds(setting, 0):
                    if name == "resnet8" and (known := sample_size.measured("90%", choice)):
                        self.results.row(setting, 0, lambda: {**known, **cost(network), "steps": SHORT_STEPS})  # noqa: B023
                        continue
                    chosen = choose(network, self.train, rows, choice)
                    seen = see(network, self.train, rows, self.test, choice)
                    row = {**figures(seen, chosen, predicted(seen, chosen)), **cost(network), "steps": SHORT_STEPS}
                    self.results.row(setting, 0, lambda: row)  # noqa: B023
            if base is None:
                base = network
            else:
                self._instead(base, network, f"{name} in place of a memory", "other-network")
        if base is not None:
            longer = shipped_network("resnet8-45000")
            self._instead(base, longer, "resnet8 trained 1.8 times as long in place of a memory", "longer-training")

    def _instead(self, base: CifarNetwork, other: CifarNetwork, setting: str, method: str) -> None:
        """Another network against the first of the family, on the same test images."""

        def measure() -> Row:
            seen = [see(network, self.train, np.arange(1), self.test, PLAIN) for network in (base, other)]
            hits = [correctness(np.asarray(part.queries.predictions), part.queries.labels) for part in seen]
            costs = [cost(network) for network in (base, other)]
            extra = {
                "extra_bytes": 4 * (costs[1]["parameters"] - costs[0]["parameters"]),
                "extra_multiply_adds": costs[1]["multiply_adds"] - costs[0]["multiply_adds"],
            }
            return {"method": method, **compared(*hits), **extra}

        self.results.row(setting, 0, measure)

    def _chosen(self, choice: KeyChoice) -> Chosen:
        if choice.name not in self.chosen:
            rows = SAMPLES["90%"](self.train)
            self.chosen[choice.name] = choose(_choosing(), self.train, rows, choice)
        return self.chosen[choice.name]

    def _seen(self, choice: KeyChoice, seed: int) -> Seen:
        """The final memory and the test images; those of seed 0 are kept for the comparisons."""
        if seed == 0 and choice.name in self.seen:
            return self.seen[choice.name]
        seen = see(_resnet8(seed), self.train, np.arange(len(self.train)), self.test, choice)
        if seed == 0 and choice is not FINE:
            self.seen[choice.name] = seen
        return seen

    def _ship(self, seen: Seen, chosen: Chosen, choice: KeyChoice) -> None:
        """Write what the package and its pages ship: settings, the 8-bit keys of the pooled layer, the roses."""
        path = ASSETS / "settings.json"
        settings: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        tuning = chosen.tuning
        settings[choice.name] = {
            "best": chosen.setting.to_dict(),
            "best_memory_only": tuning.best_memory_only.to_dict(),
        }
        path.write_text(json.dumps(settings, indent=1) + "\n")
        if choice is FINE:
            said = predicted(seen, chosen)
            measured = Measured(choice.name, chosen.setting, tuning, said, None)
            roses = find_roses(seen.memory, seen.queries, measured, self.train)
            roses_figure(roses, self.train, self.test).savefig(PICTURES / "roses.png", dpi=80)
        if choice is PLAIN:
            keys = np.concatenate([seen.memory.snapshot.keys.take(np.arange(N_TRAIN)), seen.queries.keys])
            labels = np.concatenate([self.train.labels, np.asarray(seen.queries.labels)])
            network = _resnet8(0)
            head = {name: value.detach().numpy() for name, value in network.head.named_parameters()}
            write_keys(SHIPPED_KEYS, ShippedKeys(keys, labels, head["weight"], head["bias"], self.train.class_names))
            self.results.row("resnet8 plain from the shipped 8-bit keys", 0, lambda: _shipped(chosen))


def _choosing() -> CifarResNet:
    """The ResNet-8 that never saw the held-out images."""
    return shipped_network("resnet8-45000")


def _resnet8(seed: int) -> CifarResNet:
    """The shipped network for seed 0; experiments/runs/cifar100.sh trains the others."""
    if seed == 0:
        return shipped_network("resnet8-50000")
    network = trained("resnet8", "100%", FULL_STEPS, seed)
    assert isinstance(network, CifarResNet)
    return network


def _is_there(seed: int) -> bool:
    return seed == 0 or weights_file("resnet8", "100%", FULL_STEPS, seed).exists()


def _paper(seen: Seen) -> Row:
    queries = seen.queries
    measured = evaluate(seen.memory, queries.keys, queries.labels, np.asarray(queries.predictions), PAPER)
    return {"method": "resmem", **measured.to_dict(), "chosen": PAPER.to_dict()}


def _additive(seen: Seen, chosen: Chosen) -> Row:
    """The setting before it got a gate: base + λ Σ w r, whose probabilities are made valid by a floor."""
    queries, setting = seen.queries, chosen.tuning.best
    said, labels = np.asarray(queries.predictions), queries.labels
    measured = [
        evaluate(seen.memory, queries.keys, labels, said, setting, metric=metric) for metric in ("accuracy", "log_loss")
    ]
    losses = {"log_loss_base": measured[1].base.value, "log_loss_corrected": measured[1].corrected.value}
    return {"method": "resmem", **measured[0].to_dict(), **losses, "chosen": setting.to_dict()}


def _shipped(chosen: Chosen) -> Row:
    """What the shipped 8-bit keys give: the table of the demo where there are no images."""
    shipped = shipped_keys()
    predictions = shipped.predictions()
    memory = Memory.create(dim=shipped.keys.shape[1], n_outputs=len(shipped.class_names))
    memory.append(shipped.keys[:N_TRAIN], shipped.labels[:N_TRAIN], predictions[:N_TRAIN])
    rows = slice(N_TRAIN, None)
    measured = evaluate(
        memory,
        shipped.keys[rows],
        shipped.labels[rows],
        predictions[rows],
        chosen.setting,
        memory_only=chosen.tuning.best_memory_only,
    )
    return {"method": "resmem", **measured.to_dict(), "file_bytes": SHIPPED_KEYS.stat().st_size}
