"""The Python client against a real server."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import residual_memory as rm
from residual_memory.evaluation import Setting
from residual_memory.memory import Memory
from residual_memory.server import Limits, create_app
from residual_memory.server.service import ArrayService
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


def test_what_cannot_be_sent_is_refused_here(address: Address) -> None:
    with rm.Client(address.url, TOKEN) as client:
        unsayable: list[Any] = [float("nan"), object()]
        for keys in ([[value] * 8] for value in unsayable):
            with pytest.raises(rm.errors.InvalidInput, match="cannot be sent"):
                client.predict(keys, [[0.2] * 5])
    with pytest.raises(rm.errors.InvalidInput, match="which is none"):
        rm.Client("http://127.0.0.1:port", TOKEN)


def test_rows_are_asked_without_themselves_and_several_ids_go_as_an_array(client: rm.Client) -> None:
    assert client.predict(ids=[3, 4]).corrected.shape == (2, 5)
    asked = queries(2)
    ids = client.add(asked["keys"], np.array([0, 1]), asked["predictions"], ids=np.array([900, 901]))
    assert ids.tolist() == [900, 901]
    assert 900 not in [entry["id"] for entry in client.neighbors(ids=[900])[0]]
    with pytest.raises(rm.errors.DuplicateId):
        client.add(asked["keys"], [0, 1], asked["predictions"], ids=[900, 902])


def test_every_client_of_a_busy_server_is_answered_in_the_end(monkeypatch: pytest.MonkeyPatch, memory: Memory) -> None:
    answers = ArrayService.answers

    def slow(self: ArrayService, asked: Any) -> Any:
        time.sleep(0.1)
        return answers(self, asked)

    monkeypatch.setattr(ArrayService, "answers", slow)
    app = create_app(memory, token=TOKEN, limits=Limits(in_flight=2))
    with running(app) as address, rm.Client(address.url, TOKEN) as client, ThreadPoolExecutor(6) as pool:
        keys, said = queries(1).values()
        found = list(pool.map(lambda _: client.predict(keys, said), range(6)))
        refused = client.metrics()
    assert len(found) == 6
    assert 'route="/predict",status="200"} 6.0' in refused


def test_another_server_is_told_from_ours() -> None:
    for answer in (httpx.Response(200, text="<html>"), httpx.Response(200, json=[1])):
        with rm.Client("http://server", TOKEN, transport=httpx.MockTransport(lambda _, it=answer: it)) as client:
            assert not client.health()
            with pytest.raises(rm.errors.ServerFailure, match="right address"):
                client.info()


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
