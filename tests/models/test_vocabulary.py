"""Predictions over a vocabulary, reduced in stretches, against torch on the whole."""

import numpy as np
import pytest
import torch

from residual_memory.models import vocabulary
from residual_memory.models.vocabulary import GROUP, Said, likeliest, rows_in_cache

WIDTHS = [5, GROUP, 3 * GROUP, 3 * GROUP + 1]


def logits_of(n: int, width: int) -> torch.Tensor:
    return 3 * torch.randn(n, width, generator=torch.Generator().manual_seed(n + width))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_likeliest_is_the_first_of_the_largest(width: int) -> None:
    values = logits_of(200, width).round()  # with many that are equal
    assert (values == values.amax(1, keepdim=True)).sum(1).max() > 1
    torch.testing.assert_close(likeliest(values), values.argmax(1))
    assert likeliest(values[:0]).shape == (0,)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_stretches_the_numbers_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, width: int, dtype: torch.dtype
) -> None:
    logits = logits_of(23, width).to(dtype)
    monkeypatch.setattr(vocabulary, "CACHE_BYTES", 4 * 4 * width)
    assert rows_in_cache(logits) == 4
    said, whole = Said.of(logits), logits.double()
    p = whole.softmax(1)
    torch.testing.assert_close(said.log_normaliser.double(), whole.logsumexp(1, keepdim=True), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(said.confidence.double(), p.amax(1), rtol=2e-6, atol=0)
    torch.testing.assert_close(said.entropy.double(), -(p * p.log()).sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(said.best, whole.argmax(1))
    some = torch.tensor([2, 20])
    torch.testing.assert_close(said.rows(some).entropy, said.entropy[some])


def test_no_rows_have_no_numbers() -> None:
    assert Said.of(torch.zeros(0, 7)).entropy.shape == (0,)


def test_classes_that_were_ruled_out_count_for_nothing() -> None:
    """A logits processor may have set them to minus infinity."""
    logits = logits_of(3, 8)
    logits[:, 5:] = -torch.inf
    said, less = Said.of(logits), Said.of(logits[:, :5])
    torch.testing.assert_close(said.entropy, less.entropy)
    torch.testing.assert_close(said.log_normaliser, less.log_normaliser)


def test_classes_beyond_the_vocabulary_have_no_probability() -> None:
    logits = logits_of(3, 8)
    found = Said.of(logits).probabilities_at(logits, np.array([[0, 9], [7, 8], [3, 3]]))
    expected = logits.softmax(1)
    rows, classes = [0, 1, 2], [0, 7, 3]
    np.testing.assert_allclose(found[:, 0], expected[rows, classes].numpy(), rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], [0, 0, float(expected[2, 3])], rtol=1e-5)
