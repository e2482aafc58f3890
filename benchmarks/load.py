"""Clients that ask a server on this machine: asyncio and bare sockets, in a process of their own.

python -m benchmarks.load PORT CONNECTIONS SECONDS RATE BODIES.json TOKEN
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


Wait = tuple[float, float, int]  # when the answer was there, how long it took, its status


async def ask(port: int, requests: list[bytes], end: float, pause: float, waits: list[Wait], number: int) -> None:
    """One connection, one request after the other, from the start of one to that of the next at least a pause."""
    reader, writer = await asyncio.open_connection(HOST, port)
    place, started = number, 0.0
    try:
        while (now := time.perf_counter()) < end:
            if now < started + pause:
                await asyncio.sleep(started + pause - now)
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


async def load(port: int, connections: int, seconds: float, rate: float, requests: list[bytes]) -> list[Wait]:
    """What all connections met; together they ask at most so many a second, or as fast as they are answered (0)."""
    waits: list[Wait] = []
    pause, end = connections / rate if rate else 0.0, time.perf_counter() + seconds
    await asyncio.gather(*(ask(port, requests, end, pause, waits, number) for number in range(connections)))
    return waits


def summary(waits: list[Wait], seconds: float) -> dict[str, Any]:
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
    """Arguments: port, connections, seconds, requests a second, a file of bodies as JSON strings, the token."""
    port, connections, seconds, rate = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
    requests = requests_of(json.loads(Path(sys.argv[5]).read_text()), sys.argv[6])
    waits = asyncio.run(load(port, connections, seconds, rate, requests))
    first = min(done - wait for done, wait, _ in waits)
    print(json.dumps({**summary(waits, seconds), "timeline": timeline(waits, first)}))


def timeline(waits: list[Wait], first: float) -> list[float | None]:
    """The 99th percentile of accepted answers in each second."""
    seconds: dict[int, list[float]] = {}
    for done, wait, status in waits:
        if status == 200:
            seconds.setdefault(int(done - first), []).append(wait)
    return [float(np.quantile(seconds[s], 0.99)) if s in seconds else None for s in range(max(seconds, default=-1) + 1)]


if __name__ == "__main__":
    main()
