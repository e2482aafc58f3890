"""Small data sets and the memories made of them."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from residual_memory.correction import ResidualKNN
from residual_memory.memory import Memory
from residual_memory.residuals import top_m
from residual_memory.testing.problems import Problem as Problem
from residual_memory.testing.problems import classification as classification
from residual_memory.testing.problems import on_grid as on_grid
from residual_memory.testing.problems import same_bits as same_bits
from residual_memory.testing.problems import softmax as softmax


def regression(n: int = 60, q: int = 12, d: int = 5, c: int = 2, seed: int = 0) -> Problem:
    random = np.random.default_rng(seed)
    return Problem(
        random.normal(size=(n, d)),
        random.normal(size=(n, c)),
        random.normal(size=(n, c)),
        random.normal(size=(q, d)),
        random.normal(size=(q, c)),
    )


M = 2  # kept by the top-m memories below

# How a memory of classes may keep its rows: what holds for one holds for all.
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "top-m of many classes": {"residuals": "top-m", "prediction_dtype": "float16", "n_outputs": 65_537},
    "log8": {"residuals": "top-m", "prediction_dtype": "log8"},
    "log16": {"residuals": "top-m", "prediction_dtype": "log16"},
}


def told(memory: Memory, problem: Problem) -> Any:
    """The problem's predictions as the memory takes them."""
    return top_m(problem.predictions, M) if memory.layout.residuals == "top-m" else problem.predictions


def empty_memory(problem: Problem, path: Path | None = None, **options: Any) -> Memory:
    """A memory for the problem's rows, in double precision unless told otherwise."""
    settings: Mapping[str, Any] = {
        "dim": problem.keys.shape[1],
        "n_outputs": problem.predictions.shape[1],
        "task": problem.task,
        "key_dtype": "float64",
        "prediction_dtype": "float64",
        **options,
    }
    return Memory.create(path, **settings)


def memory_of(
    problem: Problem, path: Path | None = None, *, ids: Any = None, groups: Any = None, **options: Any
) -> Memory:
    """A memory that holds the problem's rows."""
    memory = empty_memory(problem, path, **options)
    memory.append(problem.keys, problem.labels, told(memory, problem), ids, groups)
    return memory


def knn_of(memory: Memory, **options: Any) -> ResidualKNN:
    """A regressor of few neighbours and a plain bandwidth unless told otherwise."""
    return ResidualKNN(memory, **{"n_neighbors": 7, "bandwidth": 0.5, **options})


def in_plain_python(script: str, *arguments: str) -> str:
    """What a script prints in a process of its own, where no types are checked: as for a user."""
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout
