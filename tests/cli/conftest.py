"""A directory to work in, with data, a memory of them, and a module with a model."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli import workshop


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with train.npz and held.npz."""
    monkeypatch.chdir(tmp_path)
    workshop.as_npz(tmp_path / "train.npz", workshop.columns(400, 3))
    workshop.as_npz(tmp_path / "held.npz", workshop.columns(200, 4))
    return tmp_path


@pytest.fixture
def memory(here: Path) -> Path:
    """A memory of train.npz."""
    workshop.done("build", "mem", "--data", "train.npz")
    return here / "mem"


@pytest.fixture
def net(here: Path) -> Iterator[Path]:
    """The current directory, with the module net.py."""
    (here / "net.py").write_text(workshop.NET)
    sys.modules.pop("net", None)
    yield here
    sys.modules.pop("net", None)
