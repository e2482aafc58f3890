"""A served memory under load, beside plain FastAPI + numpy servers in the same run, and clients that do harm."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

import residual_memory as rm
from experiments.results_file import stamped
from residual_memory.server import Limits

RESULTS = Path(__file__).parent / "results" / "serve.json"
N, DIM, OUTPUTS, QUERIES = 50_000, 128, 10, 500
CONNECTIONS, SECONDS, TURNS = 32, 10.0, 3
TOKEN = "a-token-of-the-benchmark"
LIMITS = Limits()
SLOW_HEADERS, SLOW_BODIES = 300, 100
FEW, SEARCHES = 16, 50  # queries at a time, and how often
GOAL_RATE, GOAL_P99, GOAL_RATIO = 600.0, 0.060, 4.0

Row = dict[str, Any]


def run(*, quick: bool = False) -> None:
    """Measure everything, write the result file and print it.

    Parameters
    ----------
    quick : a slice, which is printed and written nowhere.
    """
    seconds = 2.0 if quick else SECONDS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        rows = [searched(folder), *measured(folder, seconds, 1 if quick else TURNS), *harmed(folder)]
    for row in rows:
        print(json.dumps(row))
    if not quick:
        head = stamped("serve", "python -m benchmarks serve", f"made-up keys, {N:,} x {DIM}, {OUTPUTS} classes")
        RESULTS.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


def make(folder: Path) -> None:
    """A memory, the same rows as arrays for the other server, and what clients ask."""
    random = np.random.default_rng(0)
    labels = random.integers(0, OUTPUTS, N)
    keys = random.normal(size=(N, DIM)).astype(np.float32)
    keys[:, :OUTPUTS] += 3 * np.eye(OUTPUTS, dtype=np.float32)[labels]
    said = random.dirichlet(np.ones(OUTPUTS), N).astype(np.float32)
    with rm.Memory.create(folder / "memory", dim=DIM, n_outputs=OUTPUTS) as memory:
        memory.append(keys, labels, said)
        memory.save_setting({"n_neighbors": 50, "bandwidth": 2.0})
    np.savez(folder / "arrays.npz", keys=keys, labels=labels, predictions=said, bandwidth=2.0)
    asked = random.normal(size=(QUERIES, DIM)).round(6)
    base = random.dirichlet(np.ones(OUTPUTS), QUERIES).round(8)
    bodies = [json.dumps({"keys": [q.tolist()], "predictions": [p.tolist()]}) for q, p in zip(asked, base, strict=True)]
    (folder / "bodies.json").write_text(json.dumps(bodies))
    (folder / "token").write_text(f"{TOKEN}\n")


# ---------------------------------------------------------------------- search alone


def searched(folder: Path) -> Row:
    """A few queries at a time on one thread, by numpy as the server does and by faiss."""
    import faiss

    memory = rm.Memory.open(folder / "memory")
    queries = np.random.default_rng(1).normal(size=(FEW, DIM)).astype(np.float32)
    seconds: dict[str, list[float]] = {"numpy": [], "faiss": []}
    faiss.omp_set_num_threads(1)
    with threadpool_limits(1):
        knns = {name: rm.ResidualKNN(memory, n_neighbors=50, bandwidth=2.0, index=f"exact:{name}") for name in seconds}
        for name in (*seconds, *(list(seconds) * SEARCHES)):
            began = time.perf_counter()
            knns[name].neighbors(queries)
            seconds[name].append(time.perf_counter() - began)
    mine, other = (float(np.median(seconds[name])) for name in seconds)
    return {
        "setting": f"exact search, {FEW} queries at a time, {N:,} x {DIM}, k = 50, one thread",
        "ratio": mine / other,
        "against": "faiss Flat",
        "ours": mine,
        "theirs": other,
        "unit": "seconds",
    }


# ---------------------------------------------------------------------- load


def measured(folder: Path, seconds: float, turns: int) -> list[Row]:
    """Ours and two others in turns at 32 connections; then ours, asked ten times as often as it can answer."""
    found: dict[str, list[Row]] = {"ours": [], "plain": [], "by-hand": []}
    with ours(folder) as port, theirs(folder, "plain") as plain, theirs(folder, "by-hand") as by_hand:
        ports = {"ours": port, "plain": plain, "by-hand": by_hand}
        for port_of in ports.values():
            load(folder, port_of, CONNECTIONS, 1.0)
        for _ in range(turns):
            for name, port_of in ports.items():
                found[name].append(load(folder, port_of, CONNECTIONS, seconds))
        rate, p99 = median(found["ours"], "requests_per_second"), median(found["ours"], "p99")
        crowd = load(folder, port, 10 * CONNECTIONS, seconds, 10 * rate)
        after = load(folder, port, CONNECTIONS, 6.0)
    calm = [second for second, wait in enumerate(after["timeline"], 1) if wait is not None and wait <= 1.5 * p99]
    size = f"{N:,} x {DIM}, exact search"
    rows: list[Row] = []
    for name, against in (
        ("plain", "FastAPI, pydantic and numpy, the norms of differences, a search a request"),
        ("by-hand", "the same with distances as a product of matrices, on one thread a request"),
    ):
        their_rate = median(found[name], "requests_per_second")
        rows.append(
            {
                "setting": f"predict, {size}, {CONNECTIONS} connections, over {name}",
                "ratio": rate / their_rate,
                "against": against,
                "ours": rate,
                "theirs": their_rate,
                "unit": "requests a second",
                "goal": GOAL_RATIO if name == "plain" else None,
                "goal_requests_per_second": GOAL_RATE,
                "p50": median(found["ours"], "p50"),
                "p99": p99,
                "goal_p99": GOAL_P99,
                "p99_theirs": median(found[name], "p99"),
                "turns": {kind: [row["requests_per_second"] for row in found[kind]] for kind in ("ours", name)},
            }
        )
    rows.append(
        {
            "setting": f"predict, {size}, {10 * CONNECTIONS} connections, ten times as many requests as are answered",
            "ratio": crowd["p99"] / p99,
            "against": f"the 99th percentile at {CONNECTIONS} connections",
            "ours": crowd["p99"],
            "theirs": p99,
            "unit": "seconds, of accepted requests",
            "goal": 2.0,
            "offered_per_second": 10 * rate,
            "asked_per_second": sum(crowd["statuses"].values()) / seconds,
            "requests_per_second": crowd["requests_per_second"],
            "statuses": crowd["statuses"],
            "calm_again_within_seconds": calm[0] if calm else None,
            "goal_seconds": 5,
        }
    )
    return rows


def median(rows: list[Row], name: str) -> float:
    """Of a figure over turns."""
    return float(np.median([row[name] for row in rows]))


def load(folder: Path, port: int, connections: int, seconds: float, rate: float = 0.0) -> Row:
    """What clients in a process of their own met; 0 requests a second are as many as are answered."""
    command = [sys.executable, "-m", "benchmarks.load", str(port), str(connections), str(seconds), str(rate)]
    ran = subprocess.run(
        [*command, str(folder / "bodies.json"), TOKEN], capture_output=True, text=True, check=True, timeout=600
    )
    found: Row = json.loads(ran.stdout)
    return found


@contextlib.contextmanager
def ours(folder: Path) -> Iterator[int]:
    """`resmem serve`, as a user would start it."""
    port = free_port()
    command = [sys.executable, "-m", "residual_memory.cli.main", "serve", str(folder / "memory"), "--read-only"]
    with started([*command, "--port", str(port), "--token-file", str(folder / "token")], port):
        yield port


@contextlib.contextmanager
def theirs(folder: Path, kind: str) -> Iterator[int]:
    """The plain server over the same arrays; gives its port."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.plain_server", str(folder / "arrays.npz"), str(port), kind]
    alone = {name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")} if kind == "by-hand" else {}
    with started(command, port, **alone):
        yield port


@contextlib.contextmanager
def started(command: list[str], port: int, **environment: str) -> Iterator[None]:
    """A server in a process of its own, until it is not needed."""
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **environment}
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[2]} did not start")
            time.sleep(0.1)
        yield
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def free_port() -> int:
    """One that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


# ---------------------------------------------------------------------- clients that do harm


def harmed(folder: Path) -> list[Row]:
    """Slow clients, cut off by the deadline; and honest ones beside them."""
    with ours(folder) as port:
        load(folder, port, CONNECTIONS, 1.0)
        calm = load(folder, port, CONNECTIONS, 5.0)
        found: dict[str, list[float]] = {}
        rows: list[Row] = []
        head = f"POST /predict HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {TOKEN}\r\n".encode()
        kinds = {
            "headers": (SLOW_HEADERS, head, b"x-more: 1\r\n", LIMITS.header_seconds),
            "body": (SLOW_BODIES, head + b"content-length: 100000\r\n\r\n", b" ", LIMITS.body_seconds),
        }
        slow = {
            kind: threading.Thread(target=lambda k=kind: found.update({k: endured(port, *kinds[k][:3])}))
            for kind in kinds
        }
        for thread in slow.values():
            thread.start()
        time.sleep(1.0)
        beside = load(folder, port, CONNECTIONS, 5.0)
        for thread in slow.values():
            thread.join()
    for kind, (n, _, _, seconds) in kinds.items():
        rows.append(
            {
                "setting": f"{n} clients that send their {kind} slowly, a little now and then",
                "ratio": max(found[kind]) / seconds,
                "against": "the deadline",
                "ours": max(found[kind]),
                "theirs": seconds,
                "unit": "seconds until the last was cut off",
                "goal_seconds": seconds + 1,
                "cut_off": len(found[kind]),
                "p99_of_honest_clients": beside["p99"],
                "p99_without_slow_ones": calm["p99"],
                "statuses_of_honest_clients": beside["statuses"],
            }
        )
    return rows


def endured(port: int, n: int, first: bytes, more: bytes) -> list[float]:
    """For how long the server bears with each of n clients that never finish."""
    began = time.monotonic()
    clients = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(n)]
    for client in clients:
        client.sendall(first)
        client.setblocking(False)
    ends: list[float] = []
    while clients and time.monotonic() - began < 120:
        time.sleep(0.25)
        for client in list(clients):
            try:
                if not client.recv(4096):
                    raise ConnectionResetError
            except BlockingIOError:
                with contextlib.suppress(OSError):
                    client.send(more)
            except OSError:
                ends.append(time.monotonic() - began)
                clients.remove(client)
                client.close()
    return ends
