"""A build by the workers of a Ray cluster: the rows of one build, whoever dies on the way."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import residual_memory as rm
from residual_memory.demo.assets import shipped_network
from residual_memory.demo.cifar100 import find_cifar100, read_cifar100
from residual_memory.demo.images import Images
from residual_memory.errors import (
    FingerprintMismatch,
    InSampleResiduals,
    InvalidInput,
    MemoryLocked,
    PathNotShared,
    ResidualMemoryError,
    WorkerLost,
)
from residual_memory.memory import Memory
from residual_memory.memory.storage import Directory
from residual_memory.models import ray as building
from residual_memory.models.parts import folder_of, place_of, whole_parts
from tests.models.nets import Examples, mlp_data
from tests.models.test_parts import DATA, MODEL, N, assert_same, build, seeded

OPTIONS: dict[str, Any] = {"layer": "head", "batch_size": 8}


class Sure(torch.nn.Module):
    """Takes its input for logits."""

    def __init__(self) -> None:
        super().__init__()
        self.same = torch.nn.Linear(3, 3, bias=False)
        torch.nn.init.eye_(self.same.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.same(x)


class Deadly:
    """The items of a data set, one of which kills the process that reads it, once."""

    def __init__(self, dataset: Any, at: int, life: Path) -> None:
        self.classes = dataset.classes
        self._dataset, self._at, self._life = dataset, at, life

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> Any:
        if row == self._at and self._life.exists():
            self._life.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return self._dataset[row]


def images(n: int) -> Images:
    folder = find_cifar100()
    if folder is None:
        pytest.skip("CIFAR-100 is not on this machine")
    return Images(read_cifar100(folder, "train").first(n))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_workers_build_the_memory_of_one_build_of_cifar_100_though_one_is_killed(ray: Any, tmp_path: Path) -> None:
    data = images(2_000)
    (tmp_path / "life").touch()

    network, rows = shipped_network("resnet8-50000"), Deadly(data, 1_900, tmp_path / "life")
    with rm.build_memory_on_ray(network, rows, tmp_path / "many", workers=2, verbose=False) as many:
        assert not (tmp_path / "life").exists(), "a worker was killed"
        assert names_in(tmp_path) == {"many"}
        with rm.build_memory(network, data, tmp_path / "one", verbose=False) as one:
            assert_same(many, one)
    assert Memory.open(tmp_path / "many", verify=True).ids.tolist() == list(range(2_000))


def test_what_goes_wrong_on_a_worker_is_raised_here_and_parts_that_are_whole_stay(ray: Any, tmp_path: Path) -> None:
    data = mlp_data(N)
    data.labels = data.labels.clone()
    data.labels[44] = -1
    with pytest.raises(InvalidInput, match=r"rows 32 to 48, on \S+: labels"):
        rm.build_memory_on_ray(MODEL, data, tmp_path / "memory", workers=1, parts=5, **OPTIONS)
    folder = folder_of(tmp_path / "memory")
    there = {os.stat(file).st_ino for rows in whole_parts(folder) for file in place_of(folder, rows).glob("rows-*")}
    assert 1 <= len(there) < 4
    assert not (tmp_path / "memory").exists()
    data.labels[44] = 2
    with rm.build_memory_on_ray(MODEL, data, tmp_path / "memory", workers=1, parts=5, **OPTIONS) as memory:
        inodes = {os.stat(file).st_ino for file in (tmp_path / "memory").glob("rows-*")}
        assert inodes > there, "what was whole is not made again"
        with build(tmp_path / "single", data=data) as single:
            assert_same(memory, single)
    assert names_in(tmp_path) == {"memory", "single"}


def test_a_finished_memory_is_opened_and_one_of_other_data_or_not_finished_is_refused(ray: Any, tmp_path: Path) -> None:
    rm.join_parts([build_part(tmp_path)], tmp_path / "memory").close()
    folder_of(tmp_path / "memory").mkdir()  # a process was killed before it had removed the parts
    with rm.build_memory_on_ray(MODEL, DATA, tmp_path / "memory", workers=1, **OPTIONS) as memory:
        assert len(memory) == N
        assert memory.version == 1
    assert not folder_of(tmp_path / "memory").exists()
    with pytest.raises(FingerprintMismatch):
        rm.build_memory_on_ray(seeded(1), DATA, tmp_path / "memory", workers=1, **OPTIONS)
    Memory.create(tmp_path / "other", dim=6, n_outputs=3, source=memory.source and {**memory.source, "complete": False})
    with pytest.raises(InvalidInput, match="one process began; finish it with build_memory"):
        rm.build_memory_on_ray(MODEL, DATA, tmp_path / "other", workers=1, **OPTIONS)
    assert names_in(tmp_path) == {"memory", "other", "part"}


def build_part(folder: Path) -> Path:
    build(folder / "part", range(N)).close()
    return folder / "part"


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        ([{"input_ids": [1, 2]}], {}, "the data set is text"),
        (DATA, {"layr": "head"}, "no option 'layr'"),
        (DATA, {"part": range(2)}, "no option 'part'"),
        (DATA, {"workers": 0}, "workers"),
        (DATA, {"batch_size": 0}, "batch_size"),
        (mlp_data(0), {}, "empty"),
    ],
)
def test_what_cannot_be_built_is_refused(
    ray: Any, tmp_path: Path, data: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidInput, match=said):
        rm.build_memory_on_ray(MODEL, data, tmp_path / "memory", **{"workers": 1, **options})
    assert names_in(tmp_path) == set()


def test_one_process_at_a_time_builds_a_memory(ray: Any, tmp_path: Path) -> None:
    other = Directory(folder_of(tmp_path / "memory"))
    other.make()
    other.lock()
    with pytest.raises(MemoryLocked):
        rm.build_memory_on_ray(MODEL, DATA, tmp_path / "memory", workers=1, **OPTIONS)
    assert other.exists()


# ---------------------------------------------------------------------- without a cluster: what a worker does


def job_in(folder: Path, data: Any = DATA, model: Any = MODEL, **options: Any) -> building.Job:
    folder.mkdir(exist_ok=True)
    return building.Job(model, data, {**OPTIONS, **options}, folder, building.mark(Directory(folder)), False)


def told(job: building.Job, *ranges: range) -> list[dict[str, Any]]:
    """What a worker says of parts that it is to make."""
    ends = {"first": [rows.start for rows in ranges], "end": [rows.stop for rows in ranges]}
    said = building.Worker(lambda: job)({name: np.array(values) for name, values in ends.items()})
    assert said["rows"] == [len(rows) for rows in ranges]
    return [json.loads(text) for text in said["said"]]


def test_models_and_data_may_be_made_on_the_worker(tmp_path: Path) -> None:
    job = job_in(tmp_path / "parts", data=lambda: DATA, model=lambda: MODEL)
    assert told(job, range(24), range(24, N)) == [{"error": None, "warnings": []}] * 2
    with rm.join_parts([place_of(job.folder, rows) for rows in whole_parts(job.folder)], tmp_path / "whole") as whole:
        with build(tmp_path / "single") as single:
            assert_same(whole, single)


def test_a_worker_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    job = job_in(tmp_path / "parts")
    job_in(tmp_path / "parts")  # a folder of that name, but of another build
    kind, message = told(job, range(8))[0]["error"]
    assert kind == "PathNotShared"
    assert re.search(r"^rows 0 to 8, on \S+: this worker does not see \S+parts", message)
    assert whole_parts(job.folder) == []
    with pytest.raises(PathNotShared, match="file system that all machines of the cluster share"):
        raise building.raised(kind, message)


def test_rows_over_which_workers_die_again_and_again_are_given_up(tmp_path: Path) -> None:
    job = job_in(tmp_path / "parts")
    place = place_of(job.folder, range(8))
    for number in range(building.MOST_DEATHS):
        assert told(job, range(8, 16))[0]["error"] is None
        (job.folder / f".{place.name}-0000000{number}.part").mkdir()
    kind, message = told(job, range(8))[0]["error"]
    with pytest.raises(WorkerLost, match="4 workers died over these rows"):
        raise building.raised(kind, message)


def test_a_warning_is_carried_home(tmp_path: Path) -> None:
    known = Examples(99.0 * torch.eye(3)[DATA.labels], DATA.labels)
    said = told(job_in(tmp_path / "parts", data=known, model=Sure(), layer="same"), range(8), range(8, 16))
    assert [[kind for kind, _ in some["warnings"]] for some in said] == [[InSampleResiduals.__name__]] * 2


def test_an_error_that_is_not_made_of_its_message_is_still_ours() -> None:
    assert type(building.raised("MissingExtra", "torch models need an extra")) is ResidualMemoryError
