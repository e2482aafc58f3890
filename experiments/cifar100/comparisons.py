"""What else can be done with the same keys, each tuned as ResMem is: on held-out images alone.

`choosing` is the memory of a network that never saw the held-out images, and those images; every option of every method
is chosen there. `final` is another network's memory and the test images; nothing is chosen there.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from numpy import ndarray

from experiments.cifar100.probe import Probe, fit_probe
from experiments.results_file import Row
from residual_memory.correction import ResidualKNN
from residual_memory.evaluation import corrected_predictions
from residual_memory.memory import Memory
from residual_memory.metrics import calibration_error, correctness, log_losses, mean_interval
from residual_memory.residuals import tempered
from residual_memory.tuning import best_temperature, tune
from residual_memory.types import Observations

N_NEIGHBORS = 200
COUNTS = (20, 50, 100, 200)
SCALES = (0.02, 0.03, 0.05, 0.1, 0.2, 0.5)  # of the median distance to the k-th neighbour
MIXES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SHARPNESSES = (2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
STRENGTHS = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
HIDDEN = 512
PROBES: dict[int | None, tuple[dict[str, float], ...]] = {  # to choose from, by the size of the hidden layer
    None: (
        {"rate": 5e-4, "n_epochs": 3, "weight_decay": 0.1},
        {"rate": 2e-3, "n_epochs": 8, "weight_decay": 0.1},
        {"rate": 1e-2, "n_epochs": 16, "weight_decay": 0.1},
    ),
    HIDDEN: ({"weight_decay": 1e-3}, {"weight_decay": 1e-1}),
}
FLOOR = 1e-3  # of the uniform distribution, mixed into votes so that their log-loss is finite

Options = dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """One network and one kind of keys: its memory, and labelled rows that the memory does not hold."""

    memory: Memory
    queries: Observations


@dataclass(frozen=True)
class Searched:
    """What the methods need of one `Seen`, from one search.

    Attributes
    ----------
    base : the network's predictions for the queries.
    labels : of the queries.
    distances, votes : to the nearest rows, and their labels [q k].
    """

    base: Float[ndarray, "q c"]
    labels: Int64[ndarray, " q"]
    distances: Float[ndarray, "q k"]
    votes: Int64[ndarray, "q k"]

    @staticmethod
    def of(seen: Seen) -> "Searched":
        knn = ResidualKNN(seen.memory, n_neighbors=1, bandwidth=1.0, index="auto")
        snapshot, found = knn.search(seen.queries.keys, min(N_NEIGHBORS, len(seen.memory)))
        labels = np.asarray(seen.queries.labels, np.int64)
        return Searched(
            np.asarray(seen.queries.predictions), labels, found.distances, snapshot.targets(found.rows).astype(np.int64)
        )

    def counted(self, weights: Float[ndarray, "q j"]) -> Float[ndarray, "q c"]:
        """The sum of weights for each class among the nearest j."""
        n, n_classes = self.base.shape
        places = np.arange(n)[:, None] * n_classes + self.votes[:, : weights.shape[1]]
        return np.bincount(places.ravel(), weights.ravel(), n * n_classes).reshape(n, n_classes)


Method = Callable[[Searched, Options], Float[ndarray, "q c"]]


def knn_lm(seen: Searched, options: Options) -> Float[ndarray, "q c"]:
    """(1 − λ) p + λ p_kNN, p_kNN from exp(−distance / σ).

    References
    ----------
    Khandelwal et al., "Generalization through memorization: nearest neighbor language models", ICLR 2020.
    """
    return _mixed(seen.base, label_knn(seen, options), options["mix"])


def label_knn(seen: Searched, options: Options) -> Float[ndarray, "q c"]:
    """The neighbours' labels alone, weighted by exp(−distance / σ)."""
    near = seen.distances[:, : options["n_neighbors"]]
    return _normal(seen.counted(np.exp((near[:, :1] - near) / options["bandwidth"])))


def cache(seen: Searched, options: Options) -> Float[ndarray, "q c"]:
    """(1 − λ) p + λ p_mem, p_mem from exp(θ q·k) over keys of length 1; here over the nearest 200, not over all.

    References
    ----------
    Orhan, "A simple cache model for image recognition", NeurIPS 2018.
    """
    gaps = seen.distances[:, :1] ** 2 - seen.distances**2  # 2 (q·k − q·k₁)
    return _mixed(seen.base, _normal(seen.counted(np.exp(options["sharpness"] * gaps / 2))), options["mix"])


def tip_adapter(seen: Searched, options: Options) -> Float[ndarray, "q c"]:
    """softmax(log p + α Σ exp(−β (1 − q·k)) onehot(y)): labels added to the logits, of the nearest 200 here.

    References
    ----------
    Zhang et al., "Tip-Adapter: training-free adaption of CLIP for few-shot classification", ECCV 2022.
    """
    affinity = np.exp(-options["sharpness"] * seen.distances**2 / 2)
    scores = np.log(np.maximum(seen.base, 1e-12)) + options["strength"] * seen.counted(affinity)
    return _normal(np.exp(scores - scores.max(axis=1, keepdims=True)))


def compare(choosing: Seen, final: Seen) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Name and measurement of each method; the searches are made when the first is measured."""
    chosen_on, measured_on = Searched.of(choosing), Searched.of(final)
    widths = [
        {"n_neighbors": k, "bandwidth": scale * float(np.median(chosen_on.distances[:, k - 1]))}
        for k, scale in product((k for k in COUNTS if k <= chosen_on.distances.shape[1]), SCALES)
    ]
    grids: list[tuple[str, Method, list[Options]]] = [
        ("label-knn", label_knn, widths),
        ("knn-lm", knn_lm, [{**width, "mix": mix} for width, mix in product(widths, MIXES)]),
    ]
    if final.memory.layout.metric == "cosine":
        sharp = [{"sharpness": value} for value in SHARPNESSES]
        grids.append(("cache", cache, [{**value, "mix": mix} for value, mix in product(sharp, MIXES)]))
        grids.append(("tip-adapter", tip_adapter, [{**value, "strength": s} for value, s in product(sharp, STRENGTHS)]))
    temperature = best_temperature(chosen_on.base, chosen_on.labels)
    searching = _search_cost(final.memory)

    def by_grid(method: Method, grid: list[Options]) -> Callable[[], Row]:
        def measure() -> Row:
            options = chosen(method, chosen_on, grid)
            return _row(measured_on, method(measured_on, options), temperature, options, searching)

        return measure

    for name, method, grid in grids:
        yield name, by_grid(method, grid)
    yield (
        "temperature-scaling",
        lambda: _row(
            measured_on, tempered(measured_on.base, temperature), temperature, {"temperature": temperature}, (0, 0)
        ),
    )
    yield "linear-probe", lambda: _probed(choosing, final, measured_on, None, temperature)
    yield "mlp-probe", lambda: _probed(choosing, final, measured_on, HIDDEN, temperature)
    yield "resmem-exponential", lambda: _resmem(choosing, final, measured_on, temperature, searching)


def methods(metric: str) -> tuple[str, ...]:
    """The names that `compare` gives; two need keys of length 1."""
    unit = ("cache", "tip-adapter") if metric == "cosine" else ()
    return ("label-knn", "knn-lm", *unit, "temperature-scaling", "linear-probe", "mlp-probe", "resmem-exponential")


def chosen(method: Method, seen: Searched, grid: Iterable[Options]) -> Options:
    """The options with the most hits on these queries; the first of equals."""
    return max(grid, key=lambda options: correctness(method(seen, options), seen.labels).mean())


def _resmem(choosing: Seen, final: Seen, on: Searched, temperature: float, searching: tuple[int, int]) -> Row:
    """Base + λ Σ w r with the paper's kernel, additive, on the same keys."""
    held_out = choosing.queries
    best = tune(
        choosing.memory, held_out.keys, held_out.labels, np.asarray(held_out.predictions), n_neighbors=COUNTS
    ).best
    said = corrected_predictions(final.memory, final.queries.keys, on.base, best)
    return _row(on, np.maximum(said.corrected, 0.1 * said.base), temperature, best.to_dict(), searching)


def _probed(choosing: Seen, final: Seen, on: Searched, hidden: int | None, temperature: float) -> Row:
    held_out = choosing.queries
    hits = [
        correctness(_fitted(choosing.memory, hidden, options)(_placed(choosing)), held_out.labels).mean()
        for options in PROBES[hidden]
    ]
    best = PROBES[hidden][int(np.argmax(hits))]
    probe = _fitted(final.memory, hidden, best)
    cost = 4 * probe.n_parameters, probe.n_parameters
    return _row(on, probe(_placed(final)), temperature, {**best, "hidden": hidden}, cost)


def _fitted(memory: Memory, hidden: int | None, options: Options) -> Probe:
    rows = np.arange(len(memory))
    snapshot = memory.snapshot
    labels = snapshot.targets(rows)
    return fit_probe(snapshot.keys.take(rows), labels, memory.layout.n_outputs, hidden=hidden, **options)


def _placed(seen: Seen) -> Float[ndarray, "q d"]:
    """The queries' keys as the memory holds keys."""
    keys = np.asarray(seen.queries.keys)
    if seen.memory.layout.metric == "cosine":
        return keys / np.linalg.norm(keys, axis=1, keepdims=True)
    return keys


def _row(
    seen: Searched, scores: Float[ndarray, "q c"], temperature: float, options: Options, cost: tuple[int, int]
) -> Row:
    """A row of the result file, against the base on the same queries."""
    ways = {
        "base": seen.base,
        "temperature_scaled": tempered(seen.base, temperature),
        "corrected": _mixed(_normal(scores), np.full_like(scores, 1 / scores.shape[1]), FLOOR),
    }
    hits = {name: correctness(said, seen.labels) for name, said in ways.items()}
    gain = mean_interval(hits["corrected"] - hits["base"])
    return {
        "metric": "accuracy",
        "base": float(hits["base"].mean()),
        "corrected": float(hits["corrected"].mean()),
        "gain": gain.value,
        "gain_low": gain.low,
        "gain_high": gain.high,
        "n_test": len(seen.labels),
        **{f"log_loss_{name}": float(log_losses(said, seen.labels).mean()) for name, said in ways.items()},
        **{f"ece_{name}": calibration_error(said, seen.labels) for name, said in ways.items()},
        "chosen": options,
        "extra_bytes": cost[0],
        "extra_multiply_adds": cost[1],
    }


def _search_cost(memory: Memory) -> tuple[int, int]:
    """Bytes of the memory, and n d multiply-adds of an exact search."""
    return len(memory) * memory.layout.bytes_per_row(), len(memory) * memory.layout.dim


def _mixed(base: Float[ndarray, "q c"], other: Float[ndarray, "q c"], share: float) -> Float[ndarray, "q c"]:
    return (1 - share) * base + share * other


def _normal(counts: Float[ndarray, "q c"]) -> Float[ndarray, "q c"]:
    return counts / counts.sum(axis=1, keepdims=True)
