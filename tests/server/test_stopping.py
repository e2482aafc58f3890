"""`resmem serve` as a process: what it writes, and how it stops."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import residual_memory as rm
from tests.server.conftest import BEARER, TOKEN, queries, small_memory


@contextmanager
def served(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The command on a memory of arrays, which it may change; gives the process and the port."""
    small_memory(folder / "memory").close()
    (folder / "tokens").write_text(f"{TOKEN}\n")
    command = [sys.executable, "-m", "residual_memory.cli.main", "serve", str(folder / "memory"), "--port", "0"]
    log = (folder / "log").open("w")
    with subprocess.Popen([*command, "--token-file", str(folder / "tokens")], stderr=log, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", (folder / "log").read_text())):
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, "it did not start"
                time.sleep(0.05)
            yield process, int(found[1])
        finally:
            process.kill()
            log.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_answers_what_is_under_way_takes_nothing_new_and_ends_well(tmp_path: Path, number: int) -> None:
    body = json.dumps(queries(1)).encode()
    with served(tmp_path) as (process, port):
        url = f"http://127.0.0.1:{port}"
        with rm.Client(url, TOKEN) as client:
            assert client.add(queries(1)["keys"], [1], queries(1)["predictions"]).tolist() == [300]
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            head = f"POST /predict HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {TOKEN}\r\n"
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[:50])
            time.sleep(0.2)
            process.send_signal(number)
            refused = False
            deadline = time.monotonic() + 10
            while not refused and time.monotonic() < deadline:
                try:
                    httpx.get(f"{url}/health", headers=BEARER, timeout=1)
                    time.sleep(0.05)
                except httpx.TransportError:
                    refused = True
            assert refused, "new requests are still taken"
            connection.sendall(body[50:])
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        assert process.wait(20) == 0
    with rm.Memory.open(tmp_path / "memory", writable=True) as memory:
        assert len(memory) == 301


def test_what_it_writes_is_structured_and_holds_neither_token_nor_anything_that_was_sent(tmp_path: Path) -> None:
    canary = "canaryword"
    with served(tmp_path) as (process, port), httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=BEARER) as http:
        asked = queries(1)
        assert http.post("/predict", json=asked, headers={"x-what": canary, "user-agent": canary}).status_code == 200
        assert http.post(f"/predict?{canary}=1", json={"keys": [[canary]]}).status_code == 422
        assert http.get(f"/{canary}", headers={"cookie": canary, "referer": canary}).status_code == 404
        assert http.get("/picture", params={"id": canary}).status_code == 404
        assert http.get("/info", headers={"authorization": f"Bearer {canary}"}).status_code == 401
        assert http.post("/add", json={**asked, "labels": [canary], "owner": canary}).status_code == 422
        assert http.post("/add", json={**asked, "labels": [1], "snippets": [canary]}).status_code == 200
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(canary.encode() + b"\r\n\r\n")
            connection.recv(100)
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    log = (tmp_path / "log").read_text()
    assert canary not in log
    assert TOKEN not in log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert [line["status"] for line in lines if line["event"] == "request"] == [200, 422, 404, 404, 401, 422, 200]
    assert all({"time", "level", "event"} <= set(line) for line in lines)
    assert len(log.splitlines()) - len(lines) <= 3, "but for where it listens, every line is an object"
