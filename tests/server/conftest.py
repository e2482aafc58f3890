"""Memories that are served, in this process and over real sockets."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient

from residual_memory.memory import Memory
from residual_memory.server import Limits, create_app
from residual_memory.server.running import configured, listening
from tests.problems import classification

TOKEN = "a-token-of-the-tests"
BEARER = {"authorization": f"Bearer {TOKEN}"}


def small_memory(path: Any = None, **options: Any) -> Memory:
    """300 rows of five classes."""
    problem = classification(n=300, q=20, d=8, c=5)
    names = ["oak", "elm", "ash", "fir", "yew"]
    memory = Memory.create(path, dim=8, n_outputs=5, class_names=names, **options)
    memory.append(problem.keys, problem.labels, problem.predictions)
    return memory


@pytest.fixture
def memory() -> Memory:
    return small_memory()


@pytest.fixture
def client(memory: Memory) -> Iterator[TestClient]:
    with TestClient(create_app(memory, token=TOKEN), headers=BEARER) as client:
        yield client


def queries(n: int = 3) -> dict[str, Any]:
    """Keys with predictions, as a client sends them."""
    problem = classification(n=300, q=20, d=8, c=5)
    said = problem.said[:n]
    return {"keys": problem.queries[:n].tolist(), "predictions": said.tolist()}


@dataclass(frozen=True)
class Address:
    """Where a server waits."""

    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=20)


@contextlib.contextmanager
def running(app: Any, limits: Limits | None = None) -> Iterator[Address]:
    """An application on a real socket, with the protocol of `serve`."""
    waiting = listening("127.0.0.1", 0)
    server = uvicorn.Server(configured(app, limits or app.state.limits))
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [waiting]}, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline, "the server did not start in time"
            time.sleep(0.01)
        yield Address("127.0.0.1", waiting.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)
        waiting.close()
        assert not thread.is_alive(), "the server did not stop"
