"""The Python client against a real server."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

import residual_memory as rm
from residual_memory.evaluation import Setting
from residual_memory.memory import Memory
from residual_memory.server import create_app
from tests.server.conftest import TOKEN, Address, queries, running, small_memory


@pytest.fixture
def memory() -> Memory:
    return small_memory()


@pytest.fixture
def address(memory: Memory) -> Iterator[Address]:
    with running(create_app(memory, token=TOKEN)) as address:
        yield address


@pytest.fixture
def client(address: Address) -> Iterator[rm.Client]:
    with rm.Client(address.url, TOKEN) as client:
        yield client


def test_it_gives_what_the_library_gives(client: rm.Client, memory: Memory) -> None:
    keys, said = (np.asarray(queries(4)[name], np.float32) for name in ("keys", "predictions"))
    found = client.predict(keys, said)
    setting = Setting()
    np.testing.assert_allclose(
        found.corrected, setting.predict(setting.knn(memory, max_weight=0.1), keys, said), atol=1e-6
    )
    assert found.version == memory.version
    (near, *_) = client.neighbors(keys, said, n_neighbors=3)
    assert len(near) == 3
    (told, *_) = client.explain(keys, said, without=[near[0]["id"]], neighbors=2)
    assert near[0]["id"] not in [entry["id"] for entry in told["neighbors"]]


def test_it_changes_the_memory(client: rm.Client, memory: Memory) -> None:
    asked = queries(2)
    ids = client.add(asked["keys"], ["oak", 1], asked["predictions"], owner="ann", tags=["new"])
    assert ids.tolist() == [300, 301]
    assert client.forget(ids) == 2
    assert client.info()["rows"] == 300
    assert "resmem_rows 300.0" in client.metrics()
    assert client.health()


def test_errors_are_those_of_the_library(client: rm.Client, tmp_path: Path) -> None:
    with pytest.raises(rm.errors.UnknownId, match="does not hold"):
        client.forget([12345])
    with pytest.raises(rm.errors.DimensionMismatch, match="dimension 1"):
        client.predict([[1.0]], [[0.2] * 5])
    small_memory(tmp_path / "memory").close()
    with running(create_app(Memory.open(tmp_path / "memory"), token=TOKEN)) as address:
        with rm.Client(address.url, TOKEN) as reader, pytest.raises(rm.errors.ReadOnlyMemory):
            reader.forget([1])


def test_a_wrong_token_and_no_server_are_failures_of_the_server(address: Address) -> None:
    with rm.Client(address.url, "not-the-token-at-all") as client, pytest.raises(rm.errors.ServerFailure, match="401"):
        client.info()
    with rm.Client("http://127.0.0.1:9", TOKEN, timeout=2.0) as client:
        assert not client.health()
        with pytest.raises(rm.errors.ServerFailure, match="does not answer"):
            client.info()


def test_a_busy_server_is_asked_again_after_the_time_it_names() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        busy = len(asked) < 3
        return httpx.Response(503 if busy else 200, json={"rows": 1}, headers={"retry-after": "0"})

    with rm.Client("http://server", TOKEN, transport=httpx.MockTransport(answer)) as client:
        assert client.info() == {"rows": 1}
    assert len(asked) == 3


def test_a_server_that_stays_busy_is_given_up() -> None:
    busy = httpx.MockTransport(lambda _: httpx.Response(503, headers={"retry-after": "0"}))
    with rm.Client("http://server", TOKEN, transport=busy) as client:
        with pytest.raises(rm.errors.ServerFailure, match="503"):
            client.info()
