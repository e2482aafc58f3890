"""Which of the 50,000 CIFAR-100 training images a network sees.

The 5,000 held-out images are in no sample but the whole, so that the settings of every other network can be chosen on
images that it never saw.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from residual_memory.demo.cifar100 import Cifar100, held_out_split

SAMPLE_SEED = 7
FRACTIONS = (0.1, 0.2, 0.4, 0.6, 0.9, 1.0)
IMBALANCE = 100


def fraction_of(fraction: float) -> Callable[[Cifar100], Int64[ndarray, " n"]]:
    """The sample of this fraction of all images; each sample holds the smaller ones."""

    def rows(train: Cifar100) -> Int64[ndarray, " n"]:
        if fraction == 1.0:
            return np.arange(len(train))
        fitted = held_out_split(len(train))[0]
        order = np.random.default_rng(SAMPLE_SEED).permutation(fitted)
        return np.sort(order[: round(fraction * len(train))])

    return rows


def long_tailed(train: Cifar100) -> Int64[ndarray, " n"]:
    """The sample whose commonest class is `IMBALANCE` times as frequent as its rarest, falling geometrically.

    References
    ----------
    Cui et al., "Class-balanced loss based on effective number of samples", CVPR 2019, section 5.1.
    """
    generator = np.random.default_rng(SAMPLE_SEED)
    order = generator.permutation(held_out_split(len(train))[0])
    n_classes = len(train.class_names)
    ranks = generator.permutation(n_classes)
    by_class = [order[train.labels[order] == label] for label in range(n_classes)]
    commonest = min(map(len, by_class))
    kept = [
        rows[: max(1, round(commonest * IMBALANCE ** (-rank / (n_classes - 1))))]
        for rows, rank in zip(by_class, ranks, strict=True)
    ]
    return np.sort(np.concatenate(kept))


SAMPLES = {f"{fraction:.0%}": fraction_of(fraction) for fraction in FRACTIONS} | {"long-tailed": long_tailed}
