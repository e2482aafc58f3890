"""What all tests share: how hard Hypothesis works, and small problems."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import problems, rays
from tests.problems import Problem

settings.register_profile(
    "quick", max_examples=30, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("quick")

# Threads of libraries that wait for each other in a loop make small problems slow on a busy machine.
faiss.omp_set_num_threads(1)
torch.set_num_threads(1)


@pytest.fixture
def problem() -> Problem:
    return problems.classification()


@pytest.fixture
def values() -> Problem:
    return problems.regression()


@pytest.fixture(params=["ram", "disk"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Where a memory lives: None is in RAM."""
    return tmp_path / "memory" if request.param == "disk" else None


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape checks off, as for users: beartype stops a wrong word first, and makes an exporter fix the batch size."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def ray() -> Iterator[Any]:
    """One local Ray for all tests of a process that need one."""
    yield from rays.started()
