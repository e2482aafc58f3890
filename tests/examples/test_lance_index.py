"""The example of an index in another package: found by its entry point, and right by the battery."""

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import residual_memory as rm
from residual_memory.errors import CorruptFile, InvalidInput
from residual_memory.indexes.base import IndexSpec, Stored
from residual_memory.indexes.registry import engine_named, parse_spec
from residual_memory.testing import IndexContract
from residual_memory.testing.problems import classification, clustered, column

pytest.importorskip("lance", reason="needs lance: pip install pylance")

EXAMPLE = Path(__file__).parents[2] / "examples" / "lance_index"


def installed(folder: Path) -> Path:
    """A folder that holds what an installer would put there: the module, and metadata with its entry points."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]
    text = "".join(
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in named.items())
        for group, named in points.items()
    )
    (info / "entry_points.txt").write_text(text)
    module = "residual_memory_lance.py"
    (folder / module).write_bytes((EXAMPLE / module).read_bytes())
    return folder


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = installed(tmp_path_factory.mktemp("site"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
        sys.modules.pop("residual_memory_lance", None)


class TestLance(IndexContract):
    spec = "lance:num_partitions=2,num_sub_vectors=4?nprobes=2&k_factor=20"
    exact = False
    least_recall = 0.97


def test_a_memory_is_searched_by_it_and_keeps_its_index(tmp_path: Path) -> None:
    problem = clustered(n=3000, d=16)
    with rm.Memory.create(tmp_path / "mem", dim=16, n_outputs=4) as memory:
        memory.append(problem.keys, problem.labels, problem.predictions)
        knn = rm.ResidualKNN(memory, n_neighbors=10, bandwidth=1.0, index="lance")
        assert knn.description == "lance"
        knn.save_index()
        found = knn.neighbors(problem.queries)
    again = rm.ResidualKNN(rm.Memory.open(tmp_path / "mem"), n_neighbors=10, bandwidth=1.0, index="lance?nprobes=1")
    np.testing.assert_array_equal(again.neighbors(problem.queries).ids, found.ids)
    saved = sum(file.stat().st_size for file in (tmp_path / "mem").iterdir() if file.name.startswith("index-"))
    plan = rm.estimate(3000, 16, 4, index="lance", path=tmp_path)
    assert plan.fits
    assert plan.engine == "lance"
    assert plan.footprint.saved == pytest.approx(saved, rel=0.3)


def test_a_process_that_knows_nothing_of_it_finds_it_by_its_entry_point(package: Path) -> None:
    script = """
import numpy as np, residual_memory as rm
from residual_memory.indexes.registry import engine_names
memory = rm.Memory.create(dim=4, n_outputs=2)
memory.append(np.random.default_rng(0).normal(size=(600, 4)), np.zeros(600, int), np.full((600, 2), 0.5))
print(engine_names()[-1], rm.ResidualKNN(memory, index="lance:num_partitions=2").description)
"""
    places = [str(package), *(place for place in sys.path if place)]
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import sys; sys.path[:0] = {places!r}\n{script}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "lance lance num_partitions=2\n"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lance:partitions=2", "not built with 'partitions=2'"),
        ("lance:num_partitions=0", "not built with"),
        ("lance:num_sub_vectors=3", "a divisor of 8"),
        ("lance?nprobe=2", "expected nprobes or k_factor"),
        ("lance?k_factor=0.5", "at least 1"),
        ("lance?nprobes=many", "not a number"),
    ],
)
def test_what_it_does_not_know_is_refused(spec: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        engine_named("lance").check(parse_spec(spec), 8)


@pytest.mark.parametrize("name", ["/tmp/out-of-its-folder", "../out-of-its-folder"])
def test_a_saved_index_writes_nothing_outside_its_folder(name: str) -> None:
    keys, spec, engine = column(classification(n=600, d=8).keys), IndexSpec("lance"), engine_named("lance")
    pieces = {**engine.build(spec, keys, 0, 600).saved(), name: b"x"}
    pieces["names"] = json.dumps([other for other in pieces if other != "names"]).encode()
    with pytest.raises(CorruptFile, match="it names a file"):
        engine.load(spec, keys, 0, 600, Stored(pieces))
    assert not (Path(tempfile.gettempdir()) / "out-of-its-folder").exists()
