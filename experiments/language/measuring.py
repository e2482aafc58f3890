"""Every method on the same tokens in one pass: base, ResMem, kNN-LM and the memory alone, from one search."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from experiments.results_file import Row
from residual_memory.correction import ResidualKNN, label_average, residual_average, to_probabilities
from residual_memory.kernels import kernel_named
from residual_memory.language import (
    RESIDUAL_SHARES,
    HeldOutTokens,
    LanguageSetting,
    TokenScores,
    tune_tokens,
)
from residual_memory.memory import Snapshot
from residual_memory.models.tokens import TokenBatch
from residual_memory.models.transformers import ResMemForCausalLM, Seen, held_out_tokens, token_scores
from residual_memory.models.vocabulary import Said
from residual_memory.sparse import Recalled

DENSE_ROWS = 256  # tokens that are looked up together in a memory of whole predictions
PAPER, KNN_LM = (1.0,), (0.0,)  # residual shares of the two published methods


def chosen_methods(
    lm: ResMemForCausalLM, held_out: Iterable[Any], *, n_neighbors: tuple[int, ...], limit: int
) -> dict[str, LanguageSetting]:
    """Every method, each chosen by log-loss on the same held-out tokens."""
    tokens = held_out_tokens(lm, held_out, max(n_neighbors), limit=limit)
    return methods_of(tokens, n_neighbors)


def methods_of(tokens: HeldOutTokens, n_neighbors: tuple[int, ...]) -> dict[str, LanguageSetting]:
    """The same from what was collected.

    "resmem" is what the library chooses; the others are it with one lambda, with the whole residuals of the paper (and
    one lambda), and kNN-LM with one lambda and with the gate.
    """
    ours, paper, rival = (
        tune_tokens(tokens, n_neighbors=n_neighbors, residual_shares=shares)
        for shares in (RESIDUAL_SHARES, PAPER, KNN_LM)
    )
    return {
        "resmem": ours.best,
        "resmem-constant": ours.constant,
        "resmem-whole": paper.best,
        "resmem-whole-constant": paper.constant,
        "knn-lm": rival.constant,
        "knn-lm-gated": rival.best,
    }


def used(seen: Seen, setting: LanguageSetting) -> Seen:
    """What was found by one search, used in another way: by fewer neighbours, another kernel, another trust."""
    k = setting.n_neighbors
    recalled = Recalled(**{name: getattr(seen.recalled, name)[:, :k] for name in Recalled.__dataclass_fields__})
    weights = kernel_named(setting.kernel)(recalled.distances, float(setting.bandwidth))
    cues = {**seen.cues, "agrees": seen.cues["agrees"][:, :k]}
    amount = setting.amount(recalled.distances, weights, cues)
    share = setting.residual_share
    return replace(seen, recalled=recalled, weights=weights, amount=amount, share=share, cues=cues)


def measured(
    lm: ResMemForCausalLM, text: Iterable[Any], methods: Mapping[str, LanguageSetting], *, limit: int
) -> dict[str, TokenScores]:
    """The scores of every method on the first `limit` tokens of a text."""
    wide = max(setting.n_neighbors for setting in methods.values())
    lm = lm.with_setting(replace(lm.setting, n_neighbors=wide, gate=None, search_below=1.0))
    parts: dict[str, list[TokenScores]] = {name: [] for name in methods}
    with torch.inference_mode():
        for batch in lm.watch.batches(text, limit=limit):
            for here in lm.blocks(len(batch)):
                some = batch.part(here)
                said = Said.of(some.logits)
                seen = lm.seen(some.logits, some.keys, said, always=True)
                assert seen is not None
                for name, setting in methods.items():
                    parts[name].append(token_scores(some, said, used(seen, setting)))
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
        amount = setting.amount(looked.distances, weights, looked.cues)
        recalled = label_average(looked.snapshot, looked.rows, weights[:, None, :])[:, 0]
        share, taken = setting.residual_share, base * weights.sum(axis=1, keepdims=True)
        residual = share * residual_average(looked.snapshot, looked.rows, weights, 1.0)
        residual += (1 - share) * (recalled - taken)
        scores = to_probabilities(base + amount[:, None].astype(np.float32) * residual, base)
        rows = np.arange(len(labels))
        parts.append(
            TokenScores(
                labels,
                looked.batch.documents,
                looked.batch.offsets,
                -np.log(base[rows, labels]),
                -np.log(scores[rows, labels]),
                base.argmax(axis=1) == labels,
                recalled.argmax(axis=1) == labels,
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
                base, labels = batch.logits.float().softmax(1), snapshot.targets(found.rows)
                first = torch.from_numpy(labels[:, :1].astype(np.int64))
                cues = {
                    "agrees": labels == labels[:, :1],
                    "confidence": base.amax(1).numpy(),
                    "entropy": -(base * base.clamp_min(1e-30).log()).sum(1).numpy(),
                    "nearest": base.gather(1, first)[:, 0].numpy(),
                }
                yield _LookedUp(batch, base, snapshot, found.rows, found.distances, labels, cues)


def rows_of(
    scores: Mapping[str, TokenScores], methods: Mapping[str, LanguageSetting], counts: ndarray | None, **more: Any
) -> dict[str, Row]:
    """A row of the result file for every method, in each the best kNN-LM's perplexity beside its own."""
    rows: dict[str, Row] = {}
    rival = float(np.exp(scores["knn-lm"].corrected_loss.mean())) if "knn-lm" in scores else None
    for name, some in scores.items():
        setting = methods[name]
        rows[name] = {
            "method": name,
            "metric": "accuracy",
            **some.summary(),
            **({} if rival is None else {"perplexity_knn_lm": rival}),
            "n_neighbors": setting.n_neighbors,
            "bandwidth": setting.bandwidth,
            "kernel": setting.kernel,
            "shrinkage": None if setting.gate else setting.shrinkage,
            "residual_share": setting.residual_share,
            **more,
        }
        if counts is not None and name == "resmem":
            rows[name]["by_frequency"] = some.by_frequency(counts)
    return rows
