"""Ray: shards and builds on three nodes of one machine, compared with one process, and what it takes when parts die.

While a shard or a node is gone, each answer is counted: it is exact, or a typed error, or says that it is partial. One
that is none of these would be silent; there must be none.
"""

import json
import logging
import os
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import ray
from numpy import ndarray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor
from torch.utils.data import Dataset

import residual_memory as rm
from benchmarks.core import Row, in_turns, row_of
from experiments.results_file import stamped
from residual_memory.demo.assets import N_TRAIN, shipped_keys, shipped_network
from residual_memory.demo.cifar100 import find_cifar100, read_cifar100
from residual_memory.demo.images import Images
from residual_memory.demo.networks import CifarResNet
from residual_memory.errors import DataNotFound, PartialAnswer, ShardDown
from residual_memory.indexes.ray import A_LITTLE
from residual_memory.memory import Memory
from residual_memory.memory.snapshot import Snapshot

RESULTS = Path(__file__).parent / "results" / "ray.json"
SHARDS, K = 4, 50
POLLED = 500  # queries that are asked again and again while something is down
SHARD_GOAL, NODE_GOAL = 10.0, 60.0  # seconds
PLACE = "search"  # a resource of the nodes that shards are put on
NODE: dict[str, Any] = {"object_store_memory": 256 << 20, "resources": {PLACE: 1}}
Telling = Callable[[], dict[str, int]]


def run(*, quick: bool = False) -> None:
    """Measure everything, write the result file and print it.

    Parameters
    ----------
    quick : a slice, which is printed and written nowhere.
    """
    n_queries, n_images = (1_000, 5_000) if quick else (10_000, N_TRAIN)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=".") as folder, three_nodes() as cluster:
        for row in chain(searching(Path(folder), cluster, n_queries), building(Path(folder), n_images)):
            print(f"{row['setting']}: {row['ratio']:.3g} of {row['against']}", flush=True)
            rows.append(row)
    content = {**stamped("ray", "python -m benchmarks ray", "CIFAR-100 and its keys, ResNet-8"), "rows": rows}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    if quick:
        print(text)
    else:
        RESULTS.write_text(text + "\n")


@contextmanager
def three_nodes() -> Iterator[Cluster]:
    """A head with two cores, and two nodes with one each."""
    head = {"num_cpus": 2, "include_dashboard": False, **NODE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, **NODE)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------------- search


def searching(folder: Path, cluster: Cluster, n_queries: int) -> Iterator[Row]:
    """The merged answer beside the single index's, and how long it is away when a shard or a node dies."""
    shipped = shipped_keys()
    queries = shipped.keys[N_TRAIN : N_TRAIN + n_queries]
    with Memory.create(folder / "memory", dim=64, n_outputs=100) as memory:
        memory.append(shipped.keys[:N_TRAIN], shipped.labels[:N_TRAIN], shipped.predictions()[:N_TRAIN])
    memory = Memory.open(folder / "memory")
    single = regressor(memory, "exact")
    wanted = single.neighbors(queries)
    size = f"{N_TRAIN:,} x 64, k = {K}, {SHARDS} shards on 3 nodes"
    for spec in (f"ray:{SHARDS}?resource={PLACE}", f"ray:{SHARDS}?resource={PLACE}&partial=1"):
        started = time.perf_counter()
        merged = regressor(memory, spec)
        seconds = time.perf_counter() - started
        if "partial" not in spec:
            found = merged.neighbors(queries)
            times = in_turns(lambda merged=merged: merged.search(queries, K), lambda: single.search(queries, K))  # type: ignore[misc]
            row = row_of(f"exact search, {n_queries:,} queries, {size}", "the single index", 1.0, *times)
            del row["goal"]  # both have the same cores
            agree = {name: share_of_same(getattr(found, name), getattr(wanted, name)) for name in ("ids", "distances")}
            yield {**row, "same": agree, "build_seconds": seconds}
        for what, goal, kill in (
            ("killed shard", SHARD_GOAL, partial(kill_shard, merged)),
            ("killed node, another one added", NODE_GOAL, partial(kill_node, merged, cluster)),
        ):
            seconds, told, more = until_exact(merged, queries[:POLLED], wanted.ids[:POLLED], kill)
            same = share_of_same(merged.neighbors(queries).ids, wanted.ids)
            row = row_of(f"{what}, {size}, {spec}", f"{goal:g} seconds", 1.0, seconds, goal)
            yield {**row, **told, **more(), "same": {"ids": same}}
        del merged, kill, more


def regressor(memory: Memory, index: str) -> rm.ResidualKNN:
    """A search over all rows."""
    return rm.ResidualKNN(memory, n_neighbors=K, bandwidth=1.0, index=index)


def share_of_same(found: ndarray, wanted: ndarray) -> float:
    """The part of the queries whose whole answer is the same, in order."""
    return float((found == wanted).all(axis=1).mean())


def until_exact(
    knn: rm.ResidualKNN, queries: ndarray, wanted: ndarray, kill: Callable[[], Telling]
) -> tuple[float, dict[str, int], Telling]:
    """Seconds from a kill to the first exact answer after something was missing, the answers before, and what to add.

    Parameters
    ----------
    kill : gives what tells more about it afterwards.
    """
    killed = Event()
    with ThreadPoolExecutor(1) as pool:  # nodes of Ray's start in the main thread alone
        started = time.perf_counter()
        polled = pool.submit(poll, knn, queries, wanted, killed)
        try:
            more = kill()
        finally:
            killed.set()
        ended, told = polled.result()
    return ended - started, told, more


def poll(knn: rm.ResidualKNN, queries: ndarray, wanted: ndarray, killed: Event) -> tuple[float, dict[str, int]]:
    """Ask again and again; when all was exact again, and how the answers were before."""
    told = Counter({"errors": 0, "marked_partial": 0, "silent_partial": 0})
    exact_since: float | None = None
    while exact_since is None or not told.total() or not killed.is_set():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PartialAnswer)
            try:
                found = knn.neighbors(queries)
            except ShardDown:
                told["errors"] += 1
                exact_since = None
                continue
        same = bool((found.ids == wanted).all())
        told["silent_partial"] += found.complete and not same
        told["marked_partial"] += not found.complete
        exact_since = (exact_since or time.perf_counter()) if found.complete and same else None
    return exact_since, dict(told)


def actors_of(knn: rm.ResidualKNN) -> list[Any]:
    """The actors of the shards."""
    return list(knn._current().parts[0]._actors)  # type: ignore[attr-defined]


def homes_of(knn: rm.ResidualKNN) -> list[str]:
    """The node of each shard."""
    asked = [actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()) for actor in actors_of(knn)]
    return list(ray.get(asked))


def kill_shard(knn: rm.ResidualKNN) -> Telling:
    """Kill the process of the second shard."""
    os.kill(ray.get(actors_of(knn)[1].__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    return dict


def kill_node(knn: rm.ResidualKNN, cluster: Cluster) -> Telling:
    """Take a node with a shard away, and add one that alone has room; afterwards tells how many shards are there."""
    homes = homes_of(knn)
    node = next(node for node in cluster.worker_nodes if node.node_id in homes)
    others = {other.node_id: homes.count(other.node_id) for other in (cluster.head_node, *cluster.worker_nodes)}
    lost = others.pop(node.node_id)
    holders: list[Any] = []
    for place, n in others.items():
        here = NodeAffinitySchedulingStrategy(place, soft=False)
        rest = {PLACE: 1 - n * A_LITTLE}
        holders.append(ray.remote(Holder).options(num_cpus=0, resources=rest, scheduling_strategy=here).remote())
    ray.get([holder.ready.remote() for holder in holders])
    cluster.remove_node(node, allow_graceful=False)
    new = cluster.add_node(num_cpus=1, **NODE)

    def told() -> dict[str, int]:
        for holder in holders:
            ray.kill(holder)
        return {"shards_lost": lost, "shards_on_the_new_node": homes_of(knn).count(new.node_id)}

    return told


class Holder:
    """Takes the rest of a resource, so that nothing else is put on its node."""

    def ready(self) -> None:
        """Whether it has it."""


# ---------------------------------------------------------------------- build


class Pictures(Dataset[Any]):
    """The first training images; one of them kills the process that reads it, once, where `life` is a file.

    Parameters
    ----------
    n : images.
    life : removed by the process that dies; None lets all live.
    """

    def __init__(self, n: int, life: Path | None) -> None:
        folder = find_cifar100()
        if folder is None:
            raise DataNotFound("CIFAR-100 is not on this machine; make data fetches it")
        self._images = Images(read_cifar100(folder, "train").first(n))
        self.classes, self._life = self._images.classes, life

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        if self._life is not None and item == len(self) // 2 + 100 and self._life.exists():
            self._life.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return self._images[item]


def network() -> CifarResNet:
    """The network that ships with the package."""
    return shipped_network("resnet8-50000")


def building(folder: Path, n_images: int) -> Iterator[Row]:
    """A build by four workers beside one by this process, without and with a worker that is killed in the middle."""
    started = time.perf_counter()
    single = rm.build_memory(network(), Pictures(n_images, None), folder / "single", layer="head", verbose=False)
    alone = time.perf_counter() - started
    for killed in (False, True):
        life = folder.absolute() / "life"
        if killed:
            life.touch()
        target = folder / f"many-{killed}"
        started = time.perf_counter()
        many = rm.build_memory_on_ray(
            network, lambda life=life: Pictures(n_images, life), target, workers=SHARDS, layer="head", verbose=False
        )
        seconds = time.perf_counter() - started
        setting = f"build of {n_images:,} images, ResNet-8, {SHARDS} workers on 3 nodes"
        row = row_of(setting + (", one killed" if killed else ""), "one process", 1.0, seconds, alone)
        del row["goal"]  # both have the same cores
        whole = many.verify().ok and not life.exists()
        yield {**row, "rows": len(many), "same_rows": same_rows(many.snapshot, single.snapshot), "whole": whole}
        many.close()
    single.close()


def same_rows(found: Snapshot, wanted: Snapshot) -> float:
    """The part of the rows that are the same to the last bit in every column, in order."""
    if found.n_rows != wanted.n_rows or set(found.tables[0]) != set(wanted.tables[0]):
        return 0.0
    rows = np.arange(wanted.n_rows)
    same = found.all_ids == wanted.all_ids
    for name in set(wanted.tables[0]) - {"ids"}:
        pairs = found.column(name).take(rows), wanted.column(name).take(rows)
        same &= np.equal(*pairs).reshape(len(rows), -1).all(axis=1)
    return float(same.mean())
