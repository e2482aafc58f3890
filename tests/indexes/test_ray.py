"""Search on a Ray cluster: the answer of one index, whoever dies, and never a part of it without a word."""

import gc
import importlib.util
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy import ndarray

from residual_memory.correction import Found, ResidualKNN
from residual_memory.errors import InvalidInput, MissingExtra, PartialAnswer, PathNotShared, ShardDown
from residual_memory.indexes.base import Index, Usable, nearest
from residual_memory.indexes.ray import Shard, Sharded, digest_of
from residual_memory.indexes.registry import EXACT, build_index, parse_spec, planned
from residual_memory.memory import Column, Memory
from residual_memory.testing import IndexContract
from residual_memory.testing.problems import clustered, column
from tests.problems import classification, empty_memory, in_plain_python, knn_of, memory_of, same_bits

pytestmark = pytest.mark.usefixtures("ray")
LONGEST = 30.0  # seconds in which a shard is there again on a busy machine


class TestTwoShards(IndexContract):
    """Actors take a second or two to start: those of one data set serve all tests that search it."""

    spec = "ray:2"
    made: ClassVar[dict[Any, Index]] = {}

    def build(self, keys: Column, first: int = 0, n_rows: int | None = None) -> Index:
        everything = keys.take(np.arange(len(keys)))
        place = (everything.tobytes(), keys.n_parts, first, n_rows)
        if place not in self.made:
            self.made[place] = super().build(keys, first, n_rows)
        return self.made[place]

    @classmethod
    def teardown_class(cls) -> None:
        cls.made.clear()


def same_answer(found: Found, wanted: Found) -> bool:
    return all(same_bits(getattr(found, name), getattr(wanted, name)) for name in ("ids", "distances", "weights"))


def exact(memory: Memory, **options: Any) -> ResidualKNN:
    return knn_of(memory, index="exact", **options)


def sharded(knn: ResidualKNN) -> Sharded:
    """The index over a memory's first rows."""
    part = knn._current().parts[0]
    assert isinstance(part, Sharded)
    return part


def process_of(ray: Any, knn: ResidualKNN, number: int) -> int:
    """The process of a shard."""
    return int(ray.get(sharded(knn)._actors[number].__ray_call__.remote(lambda _: os.getpid())))


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def waited_for(condition: Callable[[], bool], seconds: float = LONGEST) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def waited_answer(knn: ResidualKNN, queries: ndarray) -> Found:
    """The first answer of all shards; one before it is an error, or says that it is partial."""
    end = time.monotonic() + LONGEST
    while True:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found = knn.neighbors(queries)
            except ShardDown:
                found = None
        assert found is None or found.complete == (not caught)
        if found is not None and found.complete:
            return found
        assert time.monotonic() < end, "the shard is not there again"
        time.sleep(0.05)


@contextmanager
def stopped(process: int) -> Iterator[None]:
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_it_follows_the_memory_to_the_last_bit(where: str, tmp_path: Path) -> None:
    problem, more = classification(n=400, q=30), classification(n=40, seed=1)
    memory = empty_memory(problem, None if where == "ram" else tmp_path / "memory", key_dtype="float32")
    for start in range(0, 400, 100):  # several files
        part = problem.rows(slice(start, start + 100))
        memory.append(part.keys, part.labels, part.predictions, groups=np.arange(100) // 5)
    with memory:
        knn = knn_of(memory, index="ray:3")
        assert knn.description.startswith("ray 3 shards, exact")
        assert same_answer(knn.neighbors(problem.queries), exact(memory).neighbors(problem.queries))
        memory.append(more.keys, more.labels, more.predictions, groups=np.arange(40))
        memory.forget(np.arange(0, 400, 3))
        first = sharded(knn)
        excluded = np.arange(30)
        found = knn.neighbors(problem.queries, exclude=excluded)
        assert same_answer(found, exact(memory).neighbors(problem.queries, exclude=excluded))
        assert found.complete
        assert sharded(knn) is first, "few new rows are searched here"
        memory.compact()
        assert same_answer(knn.neighbors(problem.queries), exact(memory).neighbors(problem.queries))
        assert sharded(knn) is not first


def test_each_shard_may_have_another_index(tmp_path: Path) -> None:
    problem = clustered()
    with memory_of(problem, tmp_path / "memory") as memory:
        knn = knn_of(memory, index="ray:2:faiss:IVF4,Flat?nprobe=4")
        assert knn.description == "ray 2 shards, faiss IVF4,Flat"
        assert same_answer(knn.neighbors(problem.queries), exact(memory).neighbors(problem.queries))
        few = knn_of(memory, index="ray:2:faiss:IVF16,Flat?nprobe=1&timeout=20")
        assert few.description.startswith("ray 2 shards, exact"), "too few rows a shard for so many cells"


def test_many_queries_of_several_threads_are_answered_right(tmp_path: Path) -> None:
    problem = classification(n=300, q=3_000, d=8)
    with memory_of(problem, tmp_path / "memory") as memory:
        knn, wanted = knn_of(memory, index="ray:2"), exact(memory).neighbors(problem.queries)
        assert problem.queries.nbytes > 100 << 10, "they go through Ray's store"
        with ThreadPoolExecutor(4) as pool:
            every = list(pool.map(lambda _: knn.neighbors(problem.queries), range(8)))
    assert all(same_answer(found, wanted) for found in every)


def test_rows_that_do_not_count_are_passed_over_in_the_shards() -> None:
    problem = clustered()
    keys, usable = column(problem.keys), Usable(np.arange(800) % 4 == 1)
    index = build_index(parse_spec("ray:2"), keys, 0, 800)
    for _ in range(2):
        listed = index.candidates(problem.queries, 10, usable)
        assert usable.rows[listed.rows].all()
    found, wanted = (
        nearest([some], keys, problem.queries, 10, usable=usable) for some in (index, build_index(EXACT, keys, 0, 800))
    )
    assert same_bits(found.rows, wanted.rows)
    every = index.candidates(problem.queries, 300, usable)
    assert every.bounds is not None
    assert np.isinf(every.bounds).all(), "all 200 rows that count are listed"
    assert (np.sort(every.rows, axis=1)[:, -200:] == np.flatnonzero(usable.rows)).all()


# ---------------------------------------------------------------------- who dies


def test_a_killed_shard_is_an_error_until_it_is_there_again(ray: Any, tmp_path: Path) -> None:
    problem = classification(n=600, q=50)
    with memory_of(problem, tmp_path / "memory") as memory:
        knn, wanted = knn_of(memory, index="ray:3"), exact(memory).neighbors(problem.queries)
        killed = process_of(ray, knn, 1)
        os.kill(killed, signal.SIGKILL)
        said = (
            r"^shard 2 of 3, rows 200 to 400, does not answer: its process died, and is being started again; "
            r"ask again in some seconds, or take what the others know with 'ray:3\?partial=1'$"
        )
        with pytest.raises(ShardDown, match=said):
            knn.neighbors(problem.queries)
        assert same_answer(waited_answer(knn, problem.queries), wanted)
        assert process_of(ray, knn, 1) != killed


def test_a_partial_answer_says_so_and_is_exact_on_the_rows_that_are_there(ray: Any, tmp_path: Path) -> None:
    problem = classification(n=600, q=50)
    there = np.r_[0:200, 400:600]
    with memory_of(problem, tmp_path / "memory") as memory:
        knn, wanted = knn_of(memory, index="ray:3?partial=1&timeout=0.5"), exact(memory).neighbors(problem.queries)
        partly = exact(memory_of(problem.rows(there), ids=there)).neighbors(problem.queries)
        processes = [process_of(ray, knn, number) for number in range(3)]
        with stopped(processes[1]):
            with pytest.warns(PartialAnswer, match=r"^partial answer 1: shard 2 of 3, rows 200 to 400, does not"):
                found = knn.neighbors(problem.queries)
            assert not found.complete
            assert same_answer(found, partly)
            with pytest.warns(PartialAnswer, match="^partial answer 2: "):
                _, rows = knn.search(problem.queries, 5)
            assert not rows.complete
            assert not rows.first(2).complete
            with pytest.warns(PartialAnswer, match="^partial answer 3: "):
                assert not knn.contributions(problem.queries)[0].complete
            with stopped(processes[0]), stopped(processes[2]):
                with pytest.raises(ShardDown, match=r"shard 1 of 3.*\(and 2 more\)"):
                    knn.neighbors(problem.queries)
        found = waited_answer(knn, problem.queries)
        assert found.complete
        assert same_answer(found, wanted)


def test_an_actor_that_ray_gave_up_is_made_again(ray: Any) -> None:
    problem = classification(n=300)
    memory = memory_of(problem)
    knn = knn_of(memory, index="ray:2")
    ray.kill(sharded(knn)._actors[0], no_restart=True)
    assert waited_for(lambda: knn_says(knn, problem.queries).startswith("shard 1 of 2"))
    found = waited_answer(knn, problem.queries)
    assert same_answer(found, exact(memory).neighbors(problem.queries))


def knn_says(knn: ResidualKNN, queries: ndarray) -> str:
    """What is said of a shard that is down; nothing where all answer."""
    try:
        knn.neighbors(queries)
    except ShardDown as error:
        return str(error)
    return ""


def test_a_shard_that_says_nothing_is_down_after_the_timeout(ray: Any) -> None:
    problem = classification(n=300)
    knn = knn_of(memory_of(problem), index="ray:2?timeout=0.5")
    wanted = knn.neighbors(problem.queries)
    with stopped(process_of(ray, knn, 1)), pytest.raises(ShardDown, match=r"it has said nothing for 0\.5 seconds"):
        knn.neighbors(problem.queries)
    assert same_answer(waited_answer(knn, problem.queries), wanted)


def test_a_shard_whose_files_are_gone_is_down_until_the_memory_is_refreshed(ray: Any, tmp_path: Path) -> None:
    problem = classification(n=300)
    memory_of(problem, tmp_path / "memory").close()
    reader = Memory.open(tmp_path / "memory")
    knn = knn_of(reader, index="ray:2")
    with Memory.open(tmp_path / "memory", writable=True) as writer:
        writer.forget([3])
        writer.compact()
    assert same_answer(knn.neighbors(problem.queries), exact(reader).neighbors(problem.queries)), "it pins its version"
    killed = process_of(ray, knn, 0)
    os.kill(killed, signal.SIGKILL)
    assert waited_for(lambda: "if it was compacted meanwhile, refreshed" in knn_says(knn, problem.queries))
    reader.refresh()
    assert same_answer(knn.neighbors(problem.queries), exact(reader).neighbors(problem.queries))


def test_the_actors_end_with_the_regressor(ray: Any) -> None:
    memory = memory_of(classification(n=300))
    knn = knn_of(memory, index="ray:2")
    processes = [process_of(ray, knn, number) for number in range(2)]
    other = knn.with_kernel(n_neighbors=3, kernel="uniform", bandwidth=1.0)
    del knn
    gc.collect()
    time.sleep(0.5)
    assert all(map(is_running, processes)), "another regressor searches with them"
    del other
    gc.collect()
    assert waited_for(lambda: not any(map(is_running, processes)))


ALONE = """
import numpy as np, ray, residual_memory as rm
random = np.random.default_rng(0)
memory = rm.Memory.create(dim=4, n_outputs=2)
memory.append(random.normal(size=(300, 4)), np.zeros(300, int), np.full((300, 2), 0.5))
queries = random.normal(size=(20, 4))
knn, single = (rm.ResidualKNN(memory, index=index) for index in ("ray:2", "exact"))
print((knn.neighbors(queries).ids == single.neighbors(queries).ids).all())
print(ray.get_runtime_context().gcs_address is not None)
ray.shutdown()
for _ in range(2):
    try:
        knn.neighbors(queries)
    except rm.errors.ShardDown as error:
        print(error)
"""


def test_ray_starts_by_itself_and_an_index_does_not_outlive_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ended = "Ray was shut down after the index was built; make the regressor again"
    assert in_plain_python(ALONE).splitlines() == ["True", "True", ended, ended]


# ---------------------------------------------------------------------- what is refused


def test_a_path_that_workers_do_not_see_is_named(tmp_path: Path) -> None:
    problem = classification(n=300)
    memory_of(problem, tmp_path / "memory").close()
    memory = Memory.open(tmp_path / "memory")
    shutil.rmtree(tmp_path / "memory")
    with pytest.raises(PathNotShared, match=r"memory/rows-\S+ is not to be seen on \S+; the memory must be on"):
        knn_of(memory, index="ray:2")


def test_another_file_of_the_same_name_is_noticed(tmp_path: Path) -> None:
    problem = classification(n=300)
    memory = memory_of(problem, tmp_path / "memory")
    keys = memory.snapshot.keys
    shard = Shard(keys.opener(0, 300), digest_of(keys, 0, 300), EXACT)
    assert shard.ready()[1]
    file = next((tmp_path / "memory").glob("rows-*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    shutil.move(file, tmp_path / "elsewhere")
    file.write_bytes(content)
    with pytest.raises(PathNotShared, match="under the memory's path are others"):
        Shard(keys.opener(0, 300), digest_of(memory.snapshot.keys, 0, 300), EXACT).ready()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("ray", "does not say how many shards there are; write ray:8"),
        ("ray:0", "does not say how many shards"),
        ("ray:two", "does not say how many shards"),
        ("ray:2,faiss:Flat", "does not say how many shards"),
        ("ray:2:ray:2", "expected another engine"),
        ("ray:2:exat", "expected to begin with one of"),
        ("ray:2:faiss:IVF", "faiss cannot make 'IVF'"),
        ("ray:2?partial=2", "partial is 2, expected 0 or 1"),
        ("ray:2?timeout=0", "timeout is 0, expected seconds above 0"),
        ("ray:2?timeout=soon", "timeout='soon' is not a number"),
        ("ray:2?threads=0.5", r"threads is 0\.5, expected a whole number above 0"),
        ("ray:2?resource=tpu", "no machine of the cluster has the resource 'tpu'; start one with"),
        ("ray:2?nprobe=3", "has no option 'nprobe'"),
    ],
)
def test_a_spec_that_cannot_be_built_is_refused(spec: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        knn_of(memory_of(classification(n=300)), index=spec)


def test_without_ray_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    with pytest.raises(MissingExtra, match=r"pip install 'residual-memory\[ray\]'"):
        knn_of(memory_of(classification()), index="ray:2")


def test_each_shard_has_the_threads_that_it_was_given(ray: Any) -> None:
    knn = knn_of(memory_of(classification(n=300)), index="ray:2?threads=3")
    asked = [actor.__ray_call__.remote(lambda _: os.environ["OMP_NUM_THREADS"]) for actor in sharded(knn)._actors]
    assert ray.get(asked) == ["3", "3"]


def test_few_rows_are_searched_without_a_cluster() -> None:
    assert knn_of(memory_of(classification(n=100)), index="ray:2").description.startswith("exact")


def test_what_it_takes_is_what_its_parts_take() -> None:
    assert planned("ray:4:exact:faiss", 16, 10_000)[1] == planned("exact:faiss", 16, 10_000)[1]
