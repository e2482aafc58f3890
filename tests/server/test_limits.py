"""Slow, large and many: who sends so is refused or cut off, and the others are answered."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

import residual_memory as rm
from benchmarks.load import load, requests_of
from residual_memory.memory import Memory
from residual_memory.server import Limits, create_app
from residual_memory.server.running import REFUSAL_SECONDS
from residual_memory.server.service import ArrayService
from tests.server.conftest import BEARER, TOKEN, Address, queries, running, small_memory

FAST = Limits(header_seconds=1.0, body_seconds=1.0, body_bytes=100_000, header_bytes=8_192)
HEAD = f"POST /predict HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {TOKEN}\r\n".encode()


@pytest.fixture
def address() -> Iterator[Address]:
    with running(create_app(small_memory(), token=TOKEN, limits=FAST)) as address:
        yield address


def ask(address: Address, body: Any = None, timeout: float = 10) -> tuple[int, dict[str, str]]:
    """One whole request on a connection of its own."""
    connection = http.client.HTTPConnection(address.host, address.port, timeout=timeout)
    try:
        connection.request("POST", "/predict", json.dumps(body or queries(1)), BEARER)
        answer = connection.getresponse()
        answer.read()
        return answer.status, dict(answer.getheaders())
    finally:
        connection.close()


def until_closed(connections: Sequence[socket.socket]) -> list[float]:
    """After how many seconds each was closed by the other side."""
    started, ends = time.monotonic(), []
    for connection in connections:
        connection.settimeout(30)
        try:
            while connection.recv(4096):
                pass
        except ConnectionError:
            pass
        ends.append(time.monotonic() - started)
        connection.close()
    return ends


@pytest.mark.parametrize(
    ("first", "more"),
    [
        (b"", b""),
        (b"GET / HT", b"T"),
        (HEAD, b"x-more: 1\r\n"),
        (HEAD + b"content-length: 1000\r\n\r\n", b"{"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n", b"1\r\n{\r\n"),
    ],
    ids=["silent", "request line", "headers", "body", "chunks"],
)
def test_slow_clients_are_cut_off_and_honest_ones_are_not(address: Address, first: bytes, more: bytes) -> None:
    slow = [address.connect() for _ in range(30)]
    for connection in slow:
        connection.sendall(first)
    feeding = threading.Event()

    def feed() -> None:
        """A byte now and then, so that no connection is ever idle."""
        while not feeding.wait(0.2):
            for connection in slow:
                try:
                    connection.sendall(more)
                except OSError:
                    pass

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        assert ask(address)[0] == 200
        ends = until_closed(slow)
    finally:
        feeding.set()
        feeder.join()
    assert max(ends) < FAST.header_seconds + 1
    assert ask(address)[0] == 200


def test_slow_bodies_take_no_place_from_honest_clients() -> None:
    limits = Limits(in_flight=2, uploads=20, body_seconds=5.0)
    with running(create_app(small_memory(), token=TOKEN, limits=limits)) as address:
        slow = [address.connect() for _ in range(20)]
        for connection in slow:
            connection.sendall(HEAD + b"content-length: 1000\r\n\r\n{")
        assert [ask(address)[0] for _ in range(3)] == [503] * 3, "all that may be on their way are"
        slow.pop().close()
        deadline = time.monotonic() + 2
        while (status := ask(address)[0]) != 200:
            assert (status, time.monotonic() < deadline) == (503, True)
        assert [ask(address)[0] for _ in range(3)] == [200] * 3
        body = json.dumps(queries(1)).encode()
        slow[0].sendall(body[1:].ljust(999))
        assert slow[0].recv(100).startswith(b"HTTP/1.1 200 "), "and the slow are answered when they are there"
        for connection in slow:
            connection.close()


def test_trailers_and_extensions_without_end_are_cut_off() -> None:
    """By their size: the time that a body has is too long to be met here."""
    with running(create_app(small_memory(), token=TOKEN, limits=replace(FAST, body_seconds=60.0))) as address:
        _cut_off_by_size(address)
        assert ask(address)[0] == 200


def _cut_off_by_size(address: Address) -> None:
    for more in (b"0\r\n" + b"x-more: 1\r\n" * 5000, b"1;" + b"x" * 50_000, b"0\r\nx-long: " + b"x" * 50_000):
        for first in (HEAD, HEAD.replace(TOKEN.encode(), b"wrong")):
            with address.connect() as connection:
                connection.sendall(first + b"transfer-encoding: chunked\r\n\r\n")
                time.sleep(0.05)  # or all of it is one packet, which is small enough
                try:
                    connection.sendall(more)
                except ConnectionError:
                    pass
                (seconds,) = until_closed([connection])
            assert seconds < 15


def test_what_comes_too_slowly_behind_a_request_is_not_answered_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ArrayService, "answers", slowed(1.0))
    limits = Limits(header_seconds=0.4)
    body = json.dumps(queries(1)).encode()
    with running(create_app(small_memory(), token=TOKEN, limits=limits)) as address, address.connect() as connection:
        connection.sendall(HEAD + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(0.1)
        connection.sendall(b"GET /inf")
        content = b""
        while part := connection.recv(4096):
            content += part
    assert b"408" not in content


def test_a_client_that_takes_its_time_within_the_limit_is_answered(address: Address) -> None:
    body = json.dumps(queries(1)).encode()
    with address.connect() as connection:
        connection.sendall(HEAD)
        time.sleep(0.5)
        connection.sendall(f"content-length: {len(body)}\r\n\r\n".encode())
        time.sleep(0.5)
        connection.sendall(body)
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_large_body_is_refused_before_it_comes(address: Address) -> None:
    with address.connect() as connection:
        connection.sendall(HEAD + b"content-length: 100001\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_large_body_in_chunks_is_refused_when_it_is_too_large(address: Address) -> None:
    chunk = b"2710\r\n" + b"x" * 10_000 + b"\r\n"
    with address.connect() as connection:
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        sent = 0
        connection.setblocking(False)
        answer = b""
        deadline = time.monotonic() + 10
        while not answer and time.monotonic() < deadline:
            try:
                answer = connection.recv(100)
            except BlockingIOError:
                connection.setblocking(True)
                connection.sendall(chunk)
                sent += len(chunk)
                connection.setblocking(False)
                time.sleep(0.01)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert sent < 1_000_000


def test_large_headers_are_refused(address: Address) -> None:
    with address.connect() as connection:
        connection.sendall(HEAD + b"x-long: " + b"x" * 20_000)
        assert connection.recv(100).startswith(b"HTTP/1.1 431 ")


def slowed(seconds: float) -> Callable[[Any, Any], Any]:
    answers = ArrayService.answers

    def slow(self: Any, asked: Any) -> Any:
        time.sleep(seconds)
        return answers(self, asked)

    return slow


def at_once(n: int, address: Address, **options: Any) -> list[tuple[int, dict[str, str]]]:
    found: list[Any] = [None] * n

    def one(place: int) -> None:
        found[place] = ask(address, **options)

    threads = [threading.Thread(target=one, args=(place,)) for place in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_under_overload_some_are_answered_and_the_others_told_when_to_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ArrayService, "answers", slowed(0.3))
    limits = Limits(in_flight=4, rows=100)
    with running(create_app(small_memory(), token=TOKEN, limits=limits)) as address:
        found = at_once(20, address)
        statuses = sorted(status for status, _ in found)
        assert statuses.count(200) >= 4
        assert set(statuses) == {200, 503}
        assert all(headers["retry-after"] == "1" for status, headers in found if status == 503)
        assert ask(address)[0] == 200


def test_requests_behind_one_that_is_refused_are_refused_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none before its time: who is refused at once asks again at once."""
    monkeypatch.setattr(ArrayService, "answers", slowed(0.4))
    (request,) = requests_of([json.dumps(queries(1))], TOKEN)
    with running(create_app(small_memory(), token=TOKEN, limits=Limits(in_flight=1))) as address:
        with address.connect() as first, address.connect() as second:
            first.sendall(request)
            time.sleep(0.1)
            began = time.monotonic()
            second.sendall(3 * request)
            answer = b""
            while answer.count(b"HTTP/1.1 503") < 3:
                answer += second.recv(4096)
            assert time.monotonic() - began >= 0.9 * REFUSAL_SECONDS  # timers of the loop are a little early
            assert first.recv(4096).startswith(b"HTTP/1.1 200")
            second.sendall(request)
            assert second.recv(4096).startswith(b"HTTP/1.1 200")


def test_as_many_clients_as_may_be_under_way_are_never_refused() -> None:
    requests = requests_of([json.dumps(queries(1))], TOKEN)
    with running(create_app(small_memory(), token=TOKEN, limits=Limits(in_flight=16))) as address:
        waits = asyncio.run(load(address.port, 16, 1.0, 0.0, requests))
    assert {status for _, _, status in waits} == {200}


def test_more_rows_than_may_wait_are_refused_until_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ArrayService, "answers", slowed(0.3))
    limits = Limits(rows=10)
    with running(create_app(small_memory(), token=TOKEN, limits=limits)) as address:
        found = at_once(6, address, body=queries(4))
        statuses = [status for status, _ in found]
        assert statuses.count(429) >= 3
        assert 200 in statuses
        assert ask(address, queries(15))[0] == 200, "one large request is not refused where nothing waits"


def test_an_answer_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ArrayService, "answers", slowed(1.0))
    with running(create_app(small_memory(), token=TOKEN, limits=Limits(answer_seconds=0.2))) as address:
        started = time.monotonic()
        status, headers = ask(address)
        assert (status, headers["retry-after"]) == (503, "1")
        assert time.monotonic() - started < 0.9


def test_a_change_is_never_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is told that it came too late asks again, and the rows are there twice."""
    memory = small_memory()
    append = Memory.append

    def slow(self: Memory, *given: Any, **more: Any) -> Any:
        time.sleep(0.5)
        return append(self, *given, **more)

    monkeypatch.setattr(Memory, "append", slow)
    with running(create_app(memory, token=TOKEN, limits=Limits(answer_seconds=0.2))) as address:
        with rm.Client(address.url, TOKEN) as client:
            asked = queries(1)
            assert client.add(asked["keys"], [1], asked["predictions"]).tolist() == [300]
    assert len(memory) == 301


def test_requests_under_way_are_answered_when_the_server_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ArrayService, "answers", slowed(0.5))
    found: list[Any] = []
    with running(create_app(small_memory(), token=TOKEN)) as address:
        thread = threading.Thread(target=lambda: found.append(ask(address)))
        thread.start()
        time.sleep(0.2)
    thread.join()
    assert found[0][0] == 200
