from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from residual_memory.errors import FingerprintMismatch, InSampleResiduals, InvalidInput
from residual_memory.memory import Memory
from residual_memory.models import base
from residual_memory.models.base import Builder, Source, fill, warn_if_in_sample
from residual_memory.residuals import top_m
from residual_memory.types import Observations
from tests.models.nets import rows_of
from tests.problems import Problem, empty_memory

SOURCE = Source({"class": "Net", "sha256": "0" * 64}, "head", "input", 1, {"n_rows": 3})


def batches_of(problem: Problem, size: int, **more: Any) -> list[Observations]:
    ids = np.arange(len(problem))
    everything = Observations(ids, problem.keys, problem.labels, problem.predictions, **more)
    columns = {name: value for name, value in vars(everything).items() if value is not None}
    starts = range(0, len(problem), size)
    return [Observations(**{name: value[start : start + size] for name, value in columns.items()}) for start in starts]


def n_segments(memory: Memory) -> int:
    return len(memory.snapshot.tables)


def test_a_source_survives_its_plain_form() -> None:
    assert Source.from_dict(replace(SOURCE, complete=True).to_dict()) == replace(SOURCE, complete=True)


def test_the_same_source_is_accepted_however_far_its_build_went() -> None:
    SOURCE.check(replace(SOURCE, complete=True), "at here", data=True)


@pytest.mark.parametrize(
    ("name", "other"),
    [("model", {"class": "Net", "sha256": "1" * 64}), ("layer", "body"), ("side", "output"), ("pool", 2)],
)
def test_another_model_or_layer_is_refused_by_name(name: str, other: Any) -> None:
    with pytest.raises(FingerprintMismatch, match=f"at here was built with {name}"):
        SOURCE.check(replace(SOURCE, **{name: other}), "at here", data=False)


def test_other_data_are_refused_only_where_data_count() -> None:
    other = replace(SOURCE, data={"n_rows": 4})
    SOURCE.check(other, "at here", data=False)
    with pytest.raises(FingerprintMismatch, match="data"):
        SOURCE.check(other, "at here", data=True)


@pytest.mark.parametrize("size", [1, 7, 60])
def test_a_filled_memory_holds_every_batch_in_order(problem: Problem, size: int) -> None:
    memory = empty_memory(problem)
    fill(memory, batches_of(problem, size))
    np.testing.assert_array_equal(memory.ids, np.arange(len(problem)))
    np.testing.assert_array_equal(rows_of(memory, "keys"), problem.keys)
    np.testing.assert_array_equal(rows_of(memory, "labels"), problem.labels)
    np.testing.assert_array_equal(rows_of(memory, "predictions"), problem.predictions)


def test_top_m_predictions_and_groups_are_joined_too(problem: Problem) -> None:
    groups = np.arange(len(problem)) // 10
    memory = empty_memory(problem, residuals="top-m")
    told = top_m(problem.predictions, 2)
    batches = batches_of(problem, 7, groups=groups)
    fill(memory, [replace(batch, predictions=top_m(batch.predictions, 2)) for batch in batches])  # type: ignore[arg-type]
    np.testing.assert_array_equal(memory.snapshot.all_groups, groups)
    np.testing.assert_array_equal(rows_of(memory, "indices"), told.indices)
    np.testing.assert_array_equal(rows_of(memory, "probabilities"), told.probabilities)
    np.testing.assert_array_equal(rows_of(memory, "rest"), told.rest)


def test_nothing_observed_adds_nothing(problem: Problem) -> None:
    memory = empty_memory(problem)
    fill(memory, [])
    assert (len(memory), memory.version) == (0, empty_memory(problem).version)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_observed_before_an_error_is_committed(problem: Problem, error: type[BaseException]) -> None:
    memory = empty_memory(problem)
    with pytest.raises(error), Builder(memory) as builder:  # noqa: PT012
        builder.add(batches_of(problem, 7)[0])
        raise error
    np.testing.assert_array_equal(memory.ids, np.arange(7))


def test_few_rows_wait_for_more(problem: Problem) -> None:
    memory = empty_memory(problem)
    with Builder(memory) as builder:
        builder.add(batches_of(problem, 7)[0])
        assert len(memory) == 0
    assert len(memory) == 7


@pytest.mark.parametrize(("limit", "value"), [("SEGMENT_BYTES", 2), ("COMMIT_SECONDS", -1.0)])
def test_many_bytes_or_a_long_wait_are_committed_at_once(
    problem: Problem, limit: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, limit, value)
    memory = empty_memory(problem)
    with Builder(memory) as builder:
        for number, batch in enumerate(batches_of(problem, 7), 1):
            builder.add(batch)
            assert len(memory) == min(7 * number, len(problem))


def test_a_batch_that_does_not_fit_is_refused_and_the_rest_stays(problem: Problem) -> None:
    memory = empty_memory(problem)
    first, second = batches_of(problem, 7)[:2]
    fill(memory, [first])
    with pytest.raises(InvalidInput, match="labels"):
        fill(memory, [replace(second, labels=second.labels + 100)])
    np.testing.assert_array_equal(memory.ids, np.arange(7))
    assert n_segments(memory) == 1


@pytest.mark.parametrize(
    ("train", "held_out", "said"),
    [
        (0.5, 1.2, "0.5 on the memory's data and 1.2 on held-out"),
        (0.005, None, "knows them by heart"),
        (0.0, 0.0, "heart"),
    ],
)
def test_a_base_that_knows_its_data_by_heart_is_reported(train: float, held_out: float | None, said: str) -> None:
    with pytest.warns(InSampleResiduals, match=said):
        warn_if_in_sample(train, held_out, 0.01)


@pytest.mark.parametrize(("train", "held_out"), [(0.5, 0.9), (0.5, None), (0.5, 0.2), (0.01, None)])
def test_a_base_that_does_not_is_not(train: float, held_out: float | None) -> None:
    warn_if_in_sample(train, held_out, 0.01)  # warnings are errors
