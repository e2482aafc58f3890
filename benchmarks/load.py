"""Clients that ask a server on this machine as fast as it answers: asyncio and bare sockets, in a process of their own.

python -m benchmarks.load PORT CONNECTIONS SECONDS BODIES.npy TOKEN
"""

import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

HOST = "127.0.0.1"


async def ask(port: int, requests: list[bytes], end: float, waits: list[tuple[float, float, int]], number: int) -> None:
    """One connection, one request after the other; a refused one comes again at once."""
    reader, writer = await asyncio.open_connection(HOST, port)
    place = number
    try:
        while time.perf_counter() < end:
            started = time.perf_counter()
            writer.write(requests[place % len(requests)])
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.split(b"\r\n")
            length = next(int(line[15:]) for line in lines if line[:15].lower() == b"content-length:")
            if length:
                await reader.readexactly(length)
            done = time.perf_counter()
            waits.append((done, done - started, int(lines[0].split(b" ")[1])))
            place += 7
    finally:
        writer.close()


async def load(port: int, connections: int, seconds: float, requests: list[bytes]) -> list[tuple[float, float, int]]:
    """Moments of answers, how long each took, and its status."""
    waits: list[tuple[float, float, int]] = []
    end = time.perf_counter() + seconds
    await asyncio.gather(*(ask(port, requests, end, waits, number) for number in range(connections)))
    return waits


def summary(waits: list[tuple[float, float, int]], seconds: float) -> dict[str, Any]:
    """Requests a second and how long accepted ones took, in seconds."""
    accepted = np.array([wait for _, wait, status in waits if status == 200])
    return {
        "requests_per_second": len(accepted) / seconds,
        "p50": float(np.quantile(accepted, 0.5)) if len(accepted) else None,
        "p99": float(np.quantile(accepted, 0.99)) if len(accepted) else None,
        "statuses": {str(status): count for status, count in sorted(Counter(s for _, _, s in waits).items())},
    }


def requests_of(bodies: Any, token: str) -> list[bytes]:
    """Whole requests, ready to be sent."""
    head = (
        f"POST /predict HTTP/1.1\r\nhost: {HOST}\r\nauthorization: Bearer {token}\r\ncontent-type: application/json\r\n"
    )
    return [f"{head}content-length: {len(body)}\r\n\r\n{body}".encode() for body in bodies]


def main() -> None:
    """Arguments: port, connections, seconds, a file of bodies as JSON strings, the token."""
    port, connections, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    requests = requests_of(json.loads(Path(sys.argv[4]).read_text()), sys.argv[5])
    waits = asyncio.run(load(port, connections, seconds, requests))
    first = min(done - wait for done, wait, _ in waits)
    print(json.dumps({**summary(waits, seconds), "timeline": timeline(waits, first)}))


def timeline(waits: list[tuple[float, float, int]], first: float) -> list[float | None]:
    """The 99th percentile of accepted answers in each second."""
    seconds: dict[int, list[float]] = {}
    for done, wait, status in waits:
        if status == 200:
            seconds.setdefault(int(done - first), []).append(wait)
    return [float(np.quantile(seconds[s], 0.99)) if s in seconds else None for s in range(max(seconds, default=-1) + 1)]


if __name__ == "__main__":
    main()
