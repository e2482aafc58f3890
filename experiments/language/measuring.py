"""Every method on the same tokens in one pass: base, ResMem, kNN-LM and the memory alone, from one search."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from experiments.results_file import Row
from residual_memory.correction import ResidualKNN, label_average, residual_average, to_probabilities
from residual_memory.kernels import kernel_named
from residual_memory.language import (
    HeldOutTokens,
    LanguageSetting,
    TokenScores,
    fit_token_gate,
    gate_features,
    tune_tokens,
)
from residual_memory.memory import Snapshot
from residual_memory.models.tokens import TokenBatch
from residual_memory.models.transformers import (
    ResMemForCausalLM,
    Seen,
    corrected_probabilities,
    held_out_tokens,
    likeliest_label,
)
from residual_memory.sparse import Recalled

DENSE_ROWS = 256  # tokens that are looked up together in a memory of whole predictions


@dataclass(frozen=True)
class Method:
    """A way to use what was found.

    Attributes
    ----------
    setting : k, kernel, bandwidth, and how much to trust it.
    interpolates : kNN-LM: (1 − λ) base + λ memory, the neighbours' own predictions left out.
    """

    setting: LanguageSetting
    interpolates: bool = False

    def amount(self, seen: Seen, recalled: Recalled, weights: Float[ndarray, "q k"]) -> Float[ndarray, " q"]:
        """The shrinkage of each token."""
        if self.setting.gate is None:
            return np.full(len(weights), self.setting.shrinkage)
        cues = {**seen.cues, "agrees": seen.cues["agrees"][:, : weights.shape[1]]}
        return self.setting.gate(gate_features(recalled.distances, weights, **cues))


def chosen_methods(
    lm: ResMemForCausalLM, held_out: Iterable[Any], *, n_neighbors: tuple[int, ...], limit: int
) -> dict[str, Method]:
    """ResMem and kNN-LM, each with one lambda and with a gate, chosen by log-loss on the same held-out tokens."""
    tokens = held_out_tokens(lm, held_out, max(n_neighbors), limit=limit)
    return methods_of(tokens, n_neighbors)


def methods_of(tokens: HeldOutTokens, n_neighbors: tuple[int, ...]) -> dict[str, Method]:
    """The same from what was collected."""
    tuned = tune_tokens(tokens, n_neighbors=n_neighbors)
    return {
        "resmem": Method(tuned.best),
        "resmem-constant": Method(tuned.constant),
        "knn-lm": Method(tuned.knn_lm, interpolates=True),
        "knn-lm-gated": Method(gated_interpolation(tokens, tuned.knn_lm), interpolates=True),
    }


def gated_interpolation(tokens: HeldOutTokens, setting: LanguageSetting) -> LanguageSetting:
    """KNN-LM with the same gate as ours in place of one lambda: what the gate alone is worth."""
    k = setting.n_neighbors
    weights = kernel_named(setting.kernel)(tokens.distances[:, :k], float(setting.bandwidth))
    added = (weights * tokens.hit[:, :k]).sum(axis=1) - tokens.probability * weights.sum(axis=1)
    return replace(setting, gate=fit_token_gate(tokens.features(weights), tokens.probability, added))


def measured(
    lm: ResMemForCausalLM, text: Iterable[Any], methods: Mapping[str, Method], *, limit: int
) -> dict[str, TokenScores]:
    """The scores of every method on the first `limit` tokens of a text."""
    wide = max(method.setting.n_neighbors for method in methods.values())
    lm = lm.with_setting(replace(lm.setting, n_neighbors=wide, gate=None, search_below=1.0))
    parts: dict[str, list[TokenScores]] = {name: [] for name in methods}
    with torch.inference_mode():
        for batch in lm.watch.batches(text, limit=limit):
            for here in lm.blocks(len(batch)):
                some = batch.part(here)
                seen = lm.seen(some.logits, some.keys, always=True)
                assert seen is not None
                rows = torch.arange(len(some))
                labels = some.labels
                base_loss, base_hit = -seen.base[rows, labels].log(), seen.base.argmax(1) == labels
                for name, method in methods.items():
                    k = method.setting.n_neighbors
                    recalled = nearest_alone(seen.recalled, k, labels_only=method.interpolates)
                    kernel = kernel_named(method.setting.kernel)
                    weights = kernel(recalled.distances, float(method.setting.bandwidth))
                    amount = method.amount(seen, recalled, weights)
                    scores = corrected_probabilities(seen.base, recalled, weights, amount)
                    parts[name].append(
                        TokenScores(
                            labels.numpy(),
                            some.documents,
                            some.offsets,
                            base_loss.numpy(),
                            -scores[rows, labels].log().numpy(),
                            base_hit.numpy(),
                            likeliest_label(recalled, weights) == labels.numpy(),
                            (scores.argmax(1) == labels).numpy(),
                            np.ones(len(some), bool),
                        )
                    )
    return {name: TokenScores.joined(scores) for name, scores in parts.items()}


def dense_tokens(lm: ResMemForCausalLM, text: Iterable[Any], k: int, *, limit: int) -> HeldOutTokens:
    """What settings are chosen by, from a memory of whole predictions."""
    parts = []
    for looked in _looked_up(lm, text, k, limit):
        labels, base = looked.batch.labels.numpy(), looked.base
        hit = (looked.labels == labels[:, None]).astype(np.float32)
        said = looked.snapshot.column("predictions").take(looked.rows)
        told = np.take_along_axis(said, labels[:, None, None], axis=2)[:, :, 0].astype(np.float32)
        probability = base[torch.arange(len(labels)), looked.batch.labels].numpy()
        parts.append(
            HeldOutTokens(
                looked.distances,
                hit,
                hit - told,
                probability=probability,
                documents=looked.batch.documents,
                **looked.cues,
            )
        )
    return HeldOutTokens.joined(parts)


def dense_scores(lm: ResMemForCausalLM, text: Iterable[Any], setting: LanguageSetting, *, limit: int) -> TokenScores:
    """Every token under one setting, with whole residuals: the reference that lists of classes are compared with."""
    parts = []
    for looked in _looked_up(lm, text, setting.n_neighbors, limit):
        labels, base = looked.batch.labels.numpy(), looked.base.numpy()
        weights = kernel_named(setting.kernel)(looked.distances, float(setting.bandwidth))
        gate = setting.gate
        features = gate_features(looked.distances, weights, **looked.cues)
        amount = np.full(len(labels), setting.shrinkage) if gate is None else gate(features)
        residual = residual_average(looked.snapshot, looked.rows, weights, 1.0)
        scores = to_probabilities(base + amount[:, None].astype(np.float32) * residual, base)
        rows = np.arange(len(labels))
        votes = label_average(looked.snapshot, looked.rows, weights[:, None, :])[:, 0]
        parts.append(
            TokenScores(
                labels,
                looked.batch.documents,
                looked.batch.offsets,
                -np.log(base[rows, labels]),
                -np.log(scores[rows, labels]),
                base.argmax(axis=1) == labels,
                votes.argmax(axis=1) == labels,
                scores.argmax(axis=1) == labels,
                np.ones(len(labels), bool),
            )
        )
    return TokenScores.joined(parts)


@dataclass(frozen=True)
class _LookedUp:
    """Some tokens and the rows of a dense memory that are nearest to them."""

    batch: TokenBatch
    base: torch.Tensor
    snapshot: Snapshot
    rows: ndarray
    distances: ndarray
    labels: ndarray
    cues: dict[str, ndarray]


def _looked_up(lm: ResMemForCausalLM, text: Iterable[Any], k: int, limit: int) -> Iterator[_LookedUp]:
    knn = ResidualKNN(lm.memories[0], n_neighbors=k, bandwidth=1.0, index="exact")
    with torch.inference_mode():
        for whole in lm.watch.batches(text, limit=limit):
            for start in range(0, len(whole), DENSE_ROWS):
                batch = whole.part(slice(start, start + DENSE_ROWS))
                snapshot, found = knn.search(batch.keys.numpy(), k)
                base, labels = batch.logits.softmax(1), snapshot.targets(found.rows)
                first = torch.from_numpy(labels[:, :1].astype(np.int64))
                cues = {
                    "agrees": labels == labels[:, :1],
                    "confidence": base.amax(1).numpy(),
                    "entropy": -(base * base.clamp_min(1e-30).log()).sum(1).numpy(),
                    "nearest": base.gather(1, first)[:, 0].numpy(),
                }
                yield _LookedUp(batch, base, snapshot, found.rows, found.distances, labels, cues)


def nearest_alone(recalled: Recalled, k: int, *, labels_only: bool) -> Recalled:
    """The k nearest of the neighbours; `labels_only` forgets what the base said of them.

    A row that lists no class and leaves all its mass to the rest says what the query's own prediction says, and then
    the correction is kNN-LM's (oracle I).
    """
    columns = {name: getattr(recalled, name)[:, :k] for name in Recalled.__dataclass_fields__}
    if labels_only:
        nothing = np.zeros((*columns["labels"].shape, 0))
        columns |= {
            "indices": nothing.astype(np.int32),
            "probabilities": nothing.astype(np.float32),
            "rest": np.ones_like(columns["rest"]),
        }
    return Recalled(**columns)


def rows_of(
    scores: Mapping[str, TokenScores], methods: Mapping[str, Method], counts: ndarray | None, **more: Any
) -> dict[str, Row]:
    """A row of the result file for every method, in each the best kNN-LM's perplexity beside its own."""
    rows: dict[str, Row] = {}
    rival = float(np.exp(scores["knn-lm"].corrected_loss.mean())) if "knn-lm" in scores else None
    for name, some in scores.items():
        setting = methods[name].setting
        rows[name] = {
            "method": name,
            "metric": "accuracy",
            **some.summary(),
            **({} if rival is None else {"perplexity_knn_lm": rival}),
            "n_neighbors": setting.n_neighbors,
            "bandwidth": setting.bandwidth,
            "kernel": setting.kernel,
            "shrinkage": None if setting.gate else setting.shrinkage,
            **more,
        }
        if counts is not None:
            rows[name]["by_frequency"] = some.by_frequency(counts)
    return rows
