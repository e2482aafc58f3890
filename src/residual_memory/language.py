"""Language models with a memory, as numbers a token: how far to trust the memory, chosen and measured.

Nothing here is as wide as the vocabulary. Models are in `models.transformers`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64, Shaped
from numpy import ndarray

from residual_memory.display import html_table
from residual_memory.errors import InvalidInput
from residual_memory.kernels import kernel_named
from residual_memory.metrics import Estimate, mean_interval
from residual_memory.validation import as_count, as_fraction, as_positive

FLOOR = 0.1  # of a base probability: what no correction can take away, as in `to_probabilities`
N_FEATURES = 7
PENALTY = 1e-4  # of the gate's weights
SMALLEST = 1e-12  # of a number whose logarithm is taken
SHRINKAGES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
BANDWIDTHS = (0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
RESIDUAL_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class TokenGate:
    """How far to trust the memory at each token: a shrinkage between 0 and 1 from what base and neighbours look like.

    A logistic function of the base's confidence and entropy, the distances to the first and the last neighbour, how
    much of the weight agrees with the nearest neighbour, how spread the weights are, and what the base gives the
    nearest neighbour's label; with their squares and products.

    Attributes
    ----------
    weights : of the constant, the features, and their products in pairs.
    centres, scales : of the features, on the tokens that the gate was fitted on.
    """

    weights: tuple[float, ...]
    centres: tuple[float, ...]
    scales: tuple[float, ...]

    def __call__(self, features: Float[ndarray, "q 7"]) -> Float[ndarray, " q"]:
        """The shrinkage of each token."""
        expanded = _expanded(features, np.array(self.centres), np.array(self.scales))
        return _logistic(expanded @ np.array(self.weights))

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "TokenGate":
        """Read back what `asdict` gave.

        Raises
        ------
        InvalidInput : if a list is missing or has another length.
        """
        try:
            gate = TokenGate(*(tuple(map(float, values[name])) for name in ("weights", "centres", "scales")))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"a token gate has weights, centres and scales: {error!r}") from None
        found = len(gate.weights), len(gate.centres), len(gate.scales)
        if found != (N_WEIGHTS, N_FEATURES, N_FEATURES):
            raise InvalidInput(f"the lists of a token gate have lengths {found}, expected {N_WEIGHTS}, 7 and 7")
        return gate


N_WEIGHTS = 1 + N_FEATURES + N_FEATURES * (N_FEATURES + 1) // 2


@dataclass(frozen=True)
class LanguageSetting:
    """How the memory of a language model is used: what tuning chooses and prediction needs.

    Attributes
    ----------
    n_neighbors, bandwidth, kernel : as in `ResidualKNN`; not kriging.
    shrinkage : lambda, where there is no gate; 0 is the base alone.
    gate : a shrinkage that depends on the token.
    search_below : the base's largest probability from which on nothing is searched and the base stands; 1 searches
        always.
    residual_share : how much of the neighbours' own predictions counts. At 1 the memory adds their residuals (ResMem);
        at 0 the query's own prediction takes the place of theirs, which is the interpolation of kNN-LM.
    """

    n_neighbors: int = 64
    bandwidth: float | str = "auto"
    kernel: str = "exponential"
    shrinkage: float = 0.25
    gate: TokenGate | None = None
    search_below: float = 1.0
    residual_share: float = 1.0

    def __post_init__(self) -> None:
        as_count("n_neighbors", self.n_neighbors)
        if self.bandwidth != "auto":
            as_positive("bandwidth", self.bandwidth)
        kernel_named(self.kernel)
        as_fraction("shrinkage", self.shrinkage)
        as_fraction("search_below", self.search_below)
        as_fraction("residual_share", self.residual_share)

    def amount(
        self, distances: Float[ndarray, "q k"], weights: Float[ndarray, "q k"], cues: Mapping[str, ndarray]
    ) -> Float[ndarray, " q"]:
        """The shrinkage of each token; 0 where there is no neighbour.

        Parameters
        ----------
        distances, weights : of the neighbours.
        cues : the further arguments of `gate_features`.
        """
        if self.gate is None:
            amount = np.full(len(distances), self.shrinkage)
        else:
            amount = self.gate(gate_features(distances, weights, **cues))
        return np.where(np.isfinite(distances[:, 0]), amount, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `Memory.save_setting` and result files."""
        return asdict(self)

    @property
    def text(self) -> str:
        """In one line, for people."""
        if self.gate is None and not self.shrinkage:
            return "shrinkage 0, so predictions stay the base's"
        sigma = self.bandwidth if isinstance(self.bandwidth, str) else f"{self.bandwidth:.4g}"
        trust = "a gate by token" if self.gate else f"shrinkage {self.shrinkage:g}"
        return f"k {self.n_neighbors}, bandwidth {sigma}, kernel {self.kernel}, {trust}"

    def _repr_html_(self) -> str:
        named = asdict(self) | {"gate": "none" if self.gate is None else "by token"}
        return html_table("Setting of a language model", list(named.items()))

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "LanguageSetting":
        """Read back what `to_dict` gave.

        Raises
        ------
        InvalidInput : if a name is not an attribute of a setting, or a value cannot be used.
        """
        if "temperature" in values:
            raise InvalidInput(
                "this is the setting of a memory of other predictions than a language model's; "
                "choose one with tune_language, or resmem tune with a .txt file"
            )
        gate = values.get("gate")
        try:
            return LanguageSetting(**{**values, "gate": None if gate is None else TokenGate.from_dict(gate)})
        except TypeError as error:
            raise InvalidInput(f"a setting has {', '.join(asdict(LanguageSetting()))}: {error}") from None


@dataclass(frozen=True)
class HeldOutTokens:
    """What choosing a setting needs of each held-out token, for the largest k that is tried.

    Attributes
    ----------
    distances : to the neighbours, ascending; +inf where missing.
    hit : 1 where a neighbour's label is the token's.
    residual : the neighbour's residual at the token.
    agrees : where a neighbour's label is the nearest neighbour's.
    probability : the base's, of the token.
    confidence, entropy : of the base: its largest probability, and its entropy in nats.
    nearest : the base's probability of the nearest neighbour's label.
    documents : of the tokens.
    """

    distances: Float[ndarray, "q k"]
    hit: Float[ndarray, "q k"]
    residual: Float[ndarray, "q k"]
    agrees: Bool[ndarray, "q k"]
    probability: Float[ndarray, " q"]
    confidence: Float[ndarray, " q"]
    entropy: Float[ndarray, " q"]
    nearest: Float[ndarray, " q"]
    documents: Int64[ndarray, " q"]

    def __len__(self) -> int:
        return len(self.distances)

    @staticmethod
    def joined(parts: "Sequence[HeldOutTokens]") -> "HeldOutTokens":
        """One after the other."""
        names = HeldOutTokens.__dataclass_fields__
        return HeldOutTokens(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def features(self, weights: Float[ndarray, "q k"]) -> Float[ndarray, "q 7"]:
        """What the gate looks at, under these weights of the first k neighbours."""
        k = weights.shape[1]
        return gate_features(
            self.distances[:, :k], weights, self.agrees[:, :k], self.confidence, self.entropy, self.nearest
        )


def gate_features(
    distances: Float[ndarray, "q k"],
    weights: Float[ndarray, "q k"],
    agrees: Bool[ndarray, "q k"],
    confidence: Float[ndarray, " q"],
    entropy: Float[ndarray, " q"],
    nearest: Float[ndarray, " q"],
) -> Float[ndarray, "q 7"]:
    """Features of a token for `TokenGate`; the arguments are those of `HeldOutTokens`."""
    present = np.isfinite(distances)
    first = np.where(present[:, 0], distances[:, 0], 0.0)
    last = np.where(present, distances, 0.0).max(axis=1)
    return np.stack(
        [
            _logit(confidence),
            entropy,
            np.log(np.maximum(first, SMALLEST)),
            np.log(np.maximum(last, SMALLEST)),
            (weights * agrees).sum(axis=1),
            np.log(np.maximum(np.square(weights).sum(axis=1), SMALLEST)),
            np.log(np.maximum(nearest, SMALLEST)),
        ],
        axis=1,
        dtype=np.float64,
    )


@dataclass(frozen=True)
class LanguageTuning:
    """What tuning chose, and what it is worth in log-loss on tokens that did not choose it.

    Attributes
    ----------
    best : the setting, chosen on all tokens; its shrinkage is 0 where the memory does not help.
    base, corrected : mean log-loss in nats, cross-fitted by document; the floor's renormalisation left out.
    gain : base − corrected, paired.
    constant : the best setting without a gate.
    knn_lm : the best interpolation (1 − λ) base + λ memory without a gate: `residual_share` is 0.
    """

    best: LanguageSetting
    base: Estimate
    corrected: Estimate
    gain: Estimate
    constant: LanguageSetting
    knn_lm: LanguageSetting

    @property
    def helps(self) -> bool:
        """Whether the gain is above 0 with 95 % confidence."""
        return self.gain.low > 0

    @property
    def verdict(self) -> str:
        """In one line, for people."""
        if not self.helps:
            return "no gain: do not deploy"
        low, value = np.exp(self.corrected.value), np.exp(self.base.value)
        return f"perplexity {value:.2f} -> {low:.2f} ({self.gain.value:.3f} ± {self.gain.margin:.3f} nats a token)"

    @property
    def perplexities(self) -> dict[str, Estimate]:
        """Of base and corrected."""
        found = {"base": self.base, "corrected": self.corrected}
        return {
            name: Estimate(*(float(np.exp(end)) for end in (loss.value, loss.low, loss.high)))
            for name, loss in found.items()
        }

    @property
    def table(self) -> tuple[tuple[str, str, str], ...]:
        """For people: a header, and each method with its perplexity and interval."""
        rows = ((name, *figure.text) for name, figure in self.perplexities.items())
        return ("", "perplexity", "95 % interval"), *rows

    def _repr_html_(self) -> str:
        return html_table(self.verdict, self.table[1:], self.table[0])


def tune_tokens(
    tokens: HeldOutTokens,
    *,
    n_neighbors: Sequence[int],
    bandwidths: Sequence[float] = BANDWIDTHS,
    kernels: Sequence[str] = ("exponential", "gaussian"),
    shrinkages: Sequence[float] = SHRINKAGES,
    residual_shares: Sequence[float] = RESIDUAL_SHARES,
    n_folds: int = 5,
    seed: int = 0,
) -> LanguageTuning:
    """Choose k, kernel, bandwidth and residual share, fit a gate, and measure it by cross-fitting over documents.

    Where one lambda for all tokens does better than the gate on tokens that did not fit it, there is no gate.

    Parameters
    ----------
    tokens : held-out ones.
    n_neighbors : values of k to try, up to that of `tokens`.
    bandwidths : to try, as multiples of the median distance to the k-th neighbour.
    kernels : to try.
    shrinkages : constant ones to try; 0 is always tried.
    residual_shares : to try; (1,) is ResMem as published, (0,) kNN-LM.
    n_folds, seed : of the cross-fitting.

    Raises
    ------
    InvalidInput : if there is no setting to try, one cannot be used, or there are fewer than two documents or folds.
    """
    usable = [k for k in sorted({as_count("n_neighbors", k) for k in n_neighbors}) if k <= tokens.distances.shape[1]]
    amounts = np.array(sorted({0.0, *(as_fraction("shrinkage", amount) for amount in shrinkages)}))
    shares = sorted({as_fraction("residual_share", share) for share in residual_shares})
    shapes = [
        LanguageSetting(k, scale * _typical(tokens.distances[:, k - 1]), kernel)
        for k, scale, kernel in product(usable or [tokens.distances.shape[1]], bandwidths, kernels)
    ]
    if not shapes or not shares:
        raise InvalidInput(
            "there is no setting to try, expected at least one kernel, one bandwidth and one residual share"
        )
    constants: dict[float, tuple[float, LanguageSetting]] = {}
    for shape in shapes:
        recalled, residual = _at_tokens(tokens, shape, _weights(tokens, shape))
        for share in {0.0, *shares}:
            losses = _losses(tokens, _mixed(recalled, residual, share), amounts)
            chosen = int(losses.argmin())
            if share not in constants or losses[chosen] < constants[share][0]:
                setting = replace(shape, shrinkage=float(amounts[chosen]), residual_share=share)
                constants[share] = float(losses[chosen]), setting
    folds = _folds(tokens.documents, n_folds, seed)
    trials = [_tried(tokens, constants[share][1], folds) for share in shares]
    best, corrected = min(trials, key=lambda trial: float(trial[1].mean()))
    base = -np.log(np.maximum(tokens.probability, SMALLEST))
    gain = mean_interval(base - corrected, tokens.documents)
    return LanguageTuning(
        best=best if gain.low > 0 else replace(best, shrinkage=0.0, gate=None),
        base=mean_interval(base, tokens.documents),
        corrected=mean_interval(corrected, tokens.documents),
        gain=gain,
        constant=min((constants[share] for share in shares), key=lambda found: found[0])[1],
        knn_lm=constants[0.0][1],
    )


def _tried(
    tokens: HeldOutTokens, constant: LanguageSetting, folds: Int64[ndarray, " q"]
) -> tuple[LanguageSetting, Float[ndarray, " q"]]:
    """A setting with a gate, and the losses under gates that did not see the token; or as it is, if that is better."""
    weights = _weights(tokens, constant)
    added = _mixed(*_at_tokens(tokens, constant, weights), constant.residual_share)
    features = tokens.features(weights)
    gated = np.empty(len(tokens))
    for fold in np.unique(folds):
        inside = folds == fold
        gate = fit_token_gate(features[~inside], tokens.probability[~inside], added[~inside])
        gated[inside] = token_losses(tokens.probability[inside], added[inside], gate(features[inside]))
    plain = token_losses(tokens.probability, added, constant.shrinkage)
    if gated.mean() < plain.mean():
        return replace(constant, gate=fit_token_gate(features, tokens.probability, added)), gated
    return constant, plain


def fit_token_gate(
    features: Float[ndarray, "q 7"], probability: Float[ndarray, " q"], residual: Float[ndarray, " q"]
) -> TokenGate:
    """The gate with the least log-loss on held-out tokens.

    Parameters
    ----------
    features : from `gate_features`.
    probability, residual : the base's probability of each token, and the memory's residual there.
    """
    from scipy.optimize import minimize

    centres = features.mean(axis=0)
    scales = np.where(features.std(axis=0) > 0, features.std(axis=0), 1.0)
    expanded = _expanded(features, centres, scales)
    base, added = probability.astype(np.float64), residual.astype(np.float64)
    start = np.zeros(N_WEIGHTS)
    start[0] = -1.0

    def loss_and_slope(weights: Float[ndarray, " w"]) -> tuple[float, Float[ndarray, " w"]]:
        amount = _logistic(expanded @ weights)
        score, least = base + amount * added, FLOOR * np.maximum(base, SMALLEST)
        free = score > least
        slope = np.where(free, added * amount * (1 - amount) / np.where(free, score, 1.0), 0.0)
        moved = weights - start
        loss = -np.log(np.where(free, score, least)).mean() + PENALTY * moved @ moved
        return float(loss), -(slope @ expanded) / len(base) + 2 * PENALTY * moved

    found = minimize(loss_and_slope, start, jac=True, method="L-BFGS-B", options={"maxiter": 300})
    return TokenGate(tuple(found.x.tolist()), tuple(centres.tolist()), tuple(scales.tolist()))


def token_losses(
    probability: Float[ndarray, " q"], residual: Float[ndarray, " q"], shrinkage: Float[ndarray, " q"] | float
) -> Float[ndarray, " q"]:
    """−log of the corrected probability of each token, before the row is renormalised."""
    base = np.maximum(probability, SMALLEST)
    return -np.log(np.maximum(base + shrinkage * residual, FLOOR * base))


@dataclass(frozen=True)
class TokenScores:
    """Base, memory-only and corrected side by side on every token of a text.

    Attributes
    ----------
    labels, documents, offsets : which token, of which document, where in the stream.
    base_loss, corrected_loss : −log probability of the token, in nats.
    base_hit, memory_hit, corrected_hit : whether the likeliest token was the right one.
    searched : whether the memory was searched.
    """

    labels: Int64[ndarray, " q"]
    documents: Shaped[ndarray, " q"]
    offsets: Int64[ndarray, " q"]
    base_loss: Float[ndarray, " q"]
    corrected_loss: Float[ndarray, " q"]
    base_hit: Bool[ndarray, " q"]
    memory_hit: Bool[ndarray, " q"]
    corrected_hit: Bool[ndarray, " q"]
    searched: Bool[ndarray, " q"]

    def __len__(self) -> int:
        return len(self.labels)

    @staticmethod
    def joined(parts: "Sequence[TokenScores]") -> "TokenScores":
        """One after the other."""
        names = TokenScores.__dataclass_fields__
        return TokenScores(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def of(self, chosen: Shaped[ndarray, " q"]) -> "TokenScores":
        """Some of the tokens alone."""
        return TokenScores(**{name: getattr(self, name)[chosen] for name in TokenScores.__dataclass_fields__})

    @property
    def accuracy_gain(self) -> Estimate:
        """Corrected − base accuracy; whole documents are the draws of the interval."""
        return mean_interval(self.corrected_hit.astype(float) - self.base_hit, self.documents)

    @property
    def log_loss_gain(self) -> Estimate:
        """Base − corrected log-loss in nats; whole documents are the draws of the interval."""
        return mean_interval(self.base_loss - self.corrected_loss, self.documents)

    def summary(self) -> dict[str, float | int]:
        """Figures by the names of the result files."""
        accuracy, loss = self.accuracy_gain, self.log_loss_gain
        return {
            "n_test": len(self),
            "base": float(self.base_hit.mean()),
            "memory_only": float(self.memory_hit.mean()),
            "corrected": float(self.corrected_hit.mean()),
            "gain": accuracy.value,
            "gain_low": accuracy.low,
            "gain_high": accuracy.high,
            "perplexity_base": float(np.exp(self.base_loss.mean())),
            "perplexity_corrected": float(np.exp(self.corrected_loss.mean())),
            "log_loss_gain": loss.value,
            "log_loss_gain_low": loss.low,
            "log_loss_gain_high": loss.high,
            "searched": float(self.searched.mean()),
        }

    @property
    def accuracies(self) -> dict[str, Estimate]:
        """Of base, memory only and corrected; whole documents are the draws of the intervals."""
        hits = {"base": self.base_hit, "memory_only": self.memory_hit, "corrected": self.corrected_hit}
        return {name: mean_interval(hit.astype(float), self.documents) for name, hit in hits.items()}

    @property
    def table(self) -> tuple[tuple[str, str, str, str], ...]:
        """For people: a header, and each method with its accuracy, interval and perplexity."""
        losses = {"base": self.base_loss, "corrected": self.corrected_loss}
        perplexity = {name: f"{np.exp(loss.mean()):.4g}" for name, loss in losses.items()}
        rows = (
            (name.replace("_", " "), *figure.percent, perplexity.get(name, ""))
            for name, figure in self.accuracies.items()
        )
        return ("", "accuracy", "95 % interval", "perplexity"), *rows

    def _repr_html_(self) -> str:
        return html_table(self.verdict, self.table[1:], self.table[0])

    def by_frequency(self, counts: Int64[ndarray, " v"]) -> list[dict[str, float | int]]:
        """The summary for tokens of each frequency in the training text.

        Parameters
        ----------
        counts : how often each token of the vocabulary stands there.

        Returns
        -------
        From rare to common, one entry a power of ten that has tokens: its bounds as `low` (included) and `high`.
        """
        power = np.floor(np.log10(np.maximum(counts[self.labels], 1))).astype(int)
        return [
            {"low": float(10**p) if p else 0.0, "high": float(10 ** (p + 1)), **self.of(power == p).summary()}
            for p in np.unique(power)
        ]

    @property
    def helps(self) -> bool:
        """Whether accuracy or log-loss gain with 95 % confidence."""
        return self.log_loss_gain.low > 0 or self.accuracy_gain.low > 0

    @property
    def verdict(self) -> str:
        """In one line, for people."""
        gain = self.accuracy_gain
        if not self.helps:
            return "no gain: do not deploy"
        before, after = np.exp(self.base_loss.mean()), np.exp(self.corrected_loss.mean())
        return (
            f"gain {100 * gain.value:+.1f} ± {100 * gain.margin:.1f} points, perplexity {before:.1f} -> {after:.1f} "
            f"on {len(self):,} tokens"
        )


def _weights(tokens: HeldOutTokens, setting: LanguageSetting) -> Float[ndarray, "q k"]:
    return kernel_named(setting.kernel)(tokens.distances[:, : setting.n_neighbors], float(setting.bandwidth))


def _at_tokens(
    tokens: HeldOutTokens, setting: LanguageSetting, weights: Float[ndarray, "q k"]
) -> tuple[Float[ndarray, " q"], Float[ndarray, " q"]]:
    """What is added to the base at each token by interpolation with the memory, and by its residuals."""
    k = setting.n_neighbors
    recalled = (weights * tokens.hit[:, :k]).sum(axis=1)
    return recalled - tokens.probability * weights.sum(axis=1), (weights * tokens.residual[:, :k]).sum(axis=1)


def _mixed(recalled: Float[ndarray, " q"], residual: Float[ndarray, " q"], share: float) -> Float[ndarray, " q"]:
    return share * residual + (1 - share) * recalled


def _losses(tokens: HeldOutTokens, added: Float[ndarray, " q"], amounts: Float[ndarray, " s"]) -> Float[ndarray, " s"]:
    return np.array([token_losses(tokens.probability, added, amount).mean() for amount in amounts])


def _typical(distances: Float[ndarray, " q"]) -> float:
    present = distances[np.isfinite(distances)]
    return (float(np.median(present)) or 1.0) if len(present) else 1.0


def _expanded(
    features: Float[ndarray, "q 7"], centres: Float[ndarray, " 7"], scales: Float[ndarray, " 7"]
) -> Float[ndarray, "q w"]:
    """A constant, the features in deviations (no further than 4), and their products in pairs."""
    standard = np.clip((features - centres) / scales, -4, 4)
    first, second = np.triu_indices(N_FEATURES)
    return np.concatenate([np.ones((len(features), 1)), standard, standard[:, first] * standard[:, second]], axis=1)


def _logistic(values: Float[ndarray, " q"]) -> Float[ndarray, " q"]:
    return 1 / (1 + np.exp(-np.clip(values, -30, 30)))


def _logit(fractions: Float[ndarray, " q"]) -> Float[ndarray, " q"]:
    inside = np.clip(fractions.astype(np.float64), 1e-6, 1 - 1e-6)
    return np.log(inside / (1 - inside))


def _folds(documents: Shaped[ndarray, " q"], n_folds: int, seed: int) -> Int64[ndarray, " q"]:
    owner = np.unique(documents, return_inverse=True)[1]
    count = int(owner.max()) + 1
    if min(n_folds, count) < 2:
        raise InvalidInput(f"n_folds is {n_folds} and there are {count} documents, expected at least 2 of each")
    return np.random.default_rng(seed).permutation(np.arange(count) % n_folds)[owner]
