"""Nothing is answered, or even read, without a token; other hosts and pages of other sites are refused."""

import http.client
import json
import logging
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.testclient import TestClient

import residual_memory
from residual_memory.errors import InvalidInput
from residual_memory.memory import Memory
from residual_memory.server import create_app
from residual_memory.server.access import Access
from residual_memory.server.observing import JsonLines
from tests.server.conftest import BEARER, TOKEN, Address, queries, running, small_memory

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")


def routes_of(routes: Sequence[BaseRoute]) -> Iterator[Route]:
    """All that a router knows, those of the routers that it includes too."""
    for route in routes:
        included = getattr(route, "original_router", None)  # newer versions of FastAPI keep routers whole
        if included is None:
            assert isinstance(route, Route), "a mount or a web socket, whose paths this test would not know"
            yield route
        else:
            yield from routes_of(included.routes)


def paths_of(app: FastAPI) -> list[str]:
    """Every route that there is, its parameters filled in, and one that there is not."""
    found = [route.path for route in routes_of(app.routes)]
    assert {"/", "/page/main.js", "/predict", "/openapi.json", "/metrics", "/v2/models/{model}/infer"} < set(found)
    assert set(app.openapi()["paths"]) < set(found)
    return [path.replace("{model}", "memory").replace("{version}", "1") for path in found] + ["/nothing"]


@pytest.fixture(scope="module")
def address() -> Iterator[Address]:
    with running(create_app(small_memory(), token=TOKEN)) as address:
        yield address


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"},
                                     {"authorization": TOKEN}, {"cookie": "resmem-80=wrong"}])  # fmt: skip
def test_every_route_and_method_wants_a_token_before_anything_is_read(headers: dict[str, str]) -> None:
    app = create_app(small_memory(), token=TOKEN)
    with TestClient(app) as client:
        for path in paths_of(app):
            for method in METHODS:
                answer = client.request(method, path, headers=headers, content=b"{ not json")
                assert answer.status_code == 401, (method, path)
                assert answer.headers["www-authenticate"] == "Bearer"


def test_a_body_is_not_waited_for_without_a_token(address: Address) -> None:
    """The answer comes though the body, which is announced, never does."""
    with address.connect() as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 1000\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_the_token_in_the_printed_address_becomes_a_cookie_and_leaves_the_address_bar(memory: Memory) -> None:
    with TestClient(create_app(memory, token=TOKEN), follow_redirects=False) as client:
        answer = client.get(f"/?token={TOKEN}")
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert client.get("/").status_code == 200
        assert client.get("/info").status_code == 200
        assert client.get("/?token=wrong-but-long-enough").status_code == 200, "the cookie is there already"
    with TestClient(create_app(memory, token=TOKEN)) as client:
        assert client.get("/?token=wrong-but-long-enough").status_code == 401
        assert client.get(f"/info?token={TOKEN}").status_code == 401, "a token in an address counts at the page alone"
        page = client.get("/", headers={"accept": "text/html"})
        assert (page.status_code, "A token is needed" in page.text) == (401, True)


def test_a_change_by_cookie_needs_the_pages_own_origin(memory: Memory) -> None:
    with TestClient(create_app(memory, token=TOKEN), base_url="http://localhost:8000") as client:
        cookie = {"cookie": f"resmem-8000={TOKEN}"}
        told = {"ids": [1]}
        assert client.post("/forget", json=told, headers=cookie).status_code == 403
        for origin in ("http://evil.example", "http://localhost:9000", "null", "http://localhost:8000.evil.example"):
            assert client.post("/forget", json=told, headers={**cookie, "origin": origin}).status_code == 403
        assert len(memory) == 300
        answer = client.post("/forget", json=told, headers={**cookie, "origin": "http://localhost:8000"})
        assert answer.status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost.", "127.0.0.2"]
)
def test_other_hosts_are_refused(memory: Memory, host: str) -> None:
    with TestClient(create_app(memory, token=TOKEN), headers=BEARER) as client:
        assert client.get("/info", headers={"host": host}).status_code == 403
        assert client.get(f"/?token={TOKEN}", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000", "[::1]"])
def test_its_own_hosts_are_served(memory: Memory, host: str) -> None:
    with TestClient(create_app(memory, token=TOKEN), headers=BEARER) as client:
        assert client.get("/info", headers={"host": host}).status_code == 200


def test_pages_of_other_sites_are_refused_even_with_the_token(memory: Memory) -> None:
    with TestClient(create_app(memory, token=TOKEN), headers=BEARER) as client:
        assert client.get("/info", headers={"origin": "http://evil.example"}).status_code == 403
        answer = client.get("/info")
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("path", "body", "scope"),
    [
        ("/predict", queries(1), "predict"),
        ("/explain", queries(1), "explain"),
        ("/neighbors", queries(1), "explain"),
        ("/predict", {"ids": [1]}, "explain"),
        ("/rows", {"ids": [1]}, "explain"),
        ("/add", {**queries(1), "labels": [1]}, "write"),
        ("/forget", {"ids": [1]}, "write"),
    ],
)
def test_a_token_does_what_its_scopes_say(memory: Memory, path: str, body: dict[str, Any], scope: str) -> None:
    everything: set[Any] = {"predict", "explain", "write"}
    tokens = {"token-with-the-scope": everything, "token-without-scope": everything - {scope}}
    with TestClient(create_app(memory, token=tokens)) as client:
        without = client.post(path, json=body, headers={"authorization": "Bearer token-without-scope"})
        assert (without.status_code, without.json()["error"]["type"]) == (403, "Forbidden")
        assert client.post(path, json=body, headers={"authorization": "Bearer token-with-the-scope"}).status_code == 200


@pytest.mark.parametrize(
    "token", ["short", "with a blank in it and long", "", {}, {"short": {"predict"}}, {TOKEN: {"read"}}]
)
def test_tokens_that_protect_nothing_are_refused(token: Any) -> None:
    if token == "":
        assert len(Access.of(token).token) > 40, "a random one is made"
        return
    with pytest.raises(InvalidInput, match="token"):
        Access.of(token)


def test_a_random_token_is_another_one_each_time(memory: Memory) -> None:
    assert create_app(memory).state.token != create_app(memory).state.token


def test_logs_hold_neither_token_nor_what_was_asked(memory: Memory, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "residual_memory.server"), TestClient(create_app(memory, token=TOKEN)) as client:
        client.post("/predict", json=queries(1), headers=BEARER)
        client.post("/predict?secret=1", content=b"secret", headers=BEARER)
        client.get(f"/?token={TOKEN}")
        client.get("/secret", headers=BEARER)
    lines = [JsonLines().format(record) for record in caplog.records]
    assert any('"route": "/predict"' in line for line in lines)
    assert not [line for line in lines if "secret" in line or TOKEN in line or "0.2" in line]


def spoken(address: Address, request: bytes) -> bytes:
    """The answer to bytes, as far as the first of it comes."""
    with address.connect() as connection:
        connection.sendall(request)
        return connection.recv(200)


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (b"host: 127.0.0.1", b"200"),
        (b"host: evil.example", b"403"),
        (b"host: 127.0.0.1\r\nhost: evil.example", b"403"),
        (b"host: 127.0.0.1\r\norigin: http://evil.example", b"403"),
        (b"host: 127.0.0.1\r\norigin: http://[", b"403"),
        (b"host: 127.0.0.1\r\norigin: null", b"403"),
        (b"x-forwarded-host: 127.0.0.1\r\nhost: evil.example", b"403"),
        (b"x-nothing: 1", b"403"),
    ],
)
def test_what_comes_through_other_names_is_refused_on_the_wire(address: Address, lines: bytes, status: bytes) -> None:
    head = b"GET /info HTTP/1.1\r\nauthorization: Bearer " + TOKEN.encode() + b"\r\n"
    assert spoken(address, head + lines + b"\r\n\r\n").split(b" ")[1] == status


def test_an_address_with_many_fields_is_one_without_a_token(address: Address) -> None:
    for path in (b"/?" + b"&".join([b"a=1"] * 3000), b"/?token=%ff%fe", b"/%00%ff", b"/?token=" + b"x" * 9000):
        answer = spoken(address, b"GET " + path + b" HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 401 "), path[:20]


def test_a_failure_inside_is_an_answer_and_a_line_with_its_place_and_none_of_its_text(
    memory: Memory, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("canary of the input")

    monkeypatch.setattr(memory.snapshot.id_column, "take", fail)
    with TestClient(create_app(memory, token=TOKEN), headers=BEARER) as client:
        for path, told in (("/neighbors", "error"), ("/v2/models/memory/infer", None)):
            body = {**queries(1), "inputs": []} if told is None else queries(1)
            answer = client.post(path, json=body)
            if told is not None:
                assert answer.status_code == 500
                assert set(answer.json()["error"]) >= {"type", "message", "cause", "remedy"}
            assert "canary" not in answer.text
        assert client.get("/health").status_code == 200
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if record.levelname == "ERROR"]
    (line,) = lines
    assert (line["error"], line["status"], line["route"]) == ("RuntimeError", 500, "/neighbors")
    file, number = line["place"].split(":")
    assert (Path(residual_memory.__file__).parent / file).exists()
    assert int(number) > 0
    assert "canary" not in str(lines)


def test_an_answer_that_fails_in_its_middle_ends_without_an_end(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(small_memory(), token=TOKEN)

    @app.get("/breaks")
    async def breaks() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            yield b"first"
            raise RuntimeError("canary")

        return StreamingResponse(parts())

    with running(app) as address, address.connect() as connection:
        connection.sendall(f"GET /breaks HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {TOKEN}\r\n\r\n".encode())
        content = b""
        while part := connection.recv(4096):
            content += part
    assert b"first" in content
    assert not content.endswith(b"0\r\n\r\n"), "a client must be able to tell"
    assert "canary" not in caplog.text
    assert any(getattr(record, "noted", {}).get("error") == "RuntimeError" for record in caplog.records)


def test_a_page_of_another_site_cannot_frame_or_read_it(client: TestClient) -> None:
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy


def test_http_that_is_none_is_refused(address: Address) -> None:
    for content in (b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET\r\n\r\n"):
        with address.connect() as connection:
            connection.sendall(content)
            assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
    answer = http.client.HTTPConnection(address.host, address.port, timeout=10)
    answer.request("GET", "/health", headers=BEARER)
    assert answer.getresponse().status == 200
    answer.close()


def test_an_upgrade_to_web_sockets_is_not_taken(address: Address) -> None:
    with address.connect() as connection:
        connection.sendall(
            b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_nothing_listens_but_on_the_address_that_was_named(address: Address) -> None:
    with pytest.raises(OSError, match=r"refused|timed out"):
        socket.create_connection(("127.0.0.3", address.port), timeout=2)
