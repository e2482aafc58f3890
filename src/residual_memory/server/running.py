"""Running an application on uvicorn, with deadlines for slow clients and a cheap refusal under overload."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from residual_memory.errors import InvalidInput
from residual_memory.server.limits import Limits

_ALWAYS = (b"/health", b"/metrics", b"/v2/health")  # answered under overload too: it is no reason to be restarted


def _short(status: str, *headers: str, close: bool = True) -> bytes:
    """A whole answer without a body."""
    lines = [f"HTTP/1.1 {status}", "content-length: 0", *headers, *(["connection: close"] if close else [])]
    return "\r\n".join([*lines, "", ""]).encode()


class BoundedProtocol(HttpToolsProtocol):
    """HTTP/1.1 that waits for nobody for ever.

    A client has a time for its headers, one for its body, and one to take what it is sent. What comes when too many
    requests are under way is refused before a task is made for it.
    """

    limits = Limits()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._in_headers = True
        self._header_bytes = 0
        self._refused = False
        self._busy = _short("503 Service Unavailable", f"retry-after: {self.limits.retry_seconds}", close=False)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._end(self._busy)
        else:
            self._wait(self.limits.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._stalled is not None:
            self._stalled.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_headers:
            self._header_bytes += len(data)
            if self._deadline is None:
                self._wait(self.limits.header_seconds)
        super().data_received(data)
        if self._in_headers and self._header_bytes > self.limits.header_bytes:
            self._end(_short("431 Request Header Fields Too Large"))

    def on_message_begin(self) -> None:
        self._in_headers, self._refused = True, False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_headers, self._header_bytes = False, 0
        self._wait(self.limits.body_seconds)
        idle = self.cycle is None or self.cycle.response_complete
        if idle and len(self.tasks) >= self.limits.in_flight and not self.url.startswith(_ALWAYS):
            self._refused = True
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._stop_waiting()
        self._in_headers = True
        if not self._refused:
            super().on_message_complete()
            return
        self.transport.write(self._busy)
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self.limits.body_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()

    def _wait(self, seconds: float) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(seconds, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        answered = not self._in_headers and self.cycle is not None and self.cycle.response_started
        self._end(b"" if answered else _short("408 Request Timeout"))

    def _end(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()


def listening(host: str, port: int) -> socket.socket:
    """A socket that waits for clients.

    Raises
    ------
    InvalidInput : if the address cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InvalidInput(f"cannot listen at {host}:{port}: {error.strerror}; name another host or port") from None


def configured(app: Any, limits: Limits) -> uvicorn.Config:
    """Uvicorn's configuration for an application."""
    return uvicorn.Config(
        app,
        http=type("Bounded", (BoundedProtocol,), {"limits": limits}),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, round(limits.stop_seconds)),
    )


def serve(
    app: Any, *, host: str = "127.0.0.1", port: int = 8000, announce: Callable[[str], None] | None = None
) -> None:
    """Run an application of `create_app` until it is told to stop; requests under way are answered first.

    Parameters
    ----------
    host, port : where to listen; port 0 takes a free one.
    announce : called with the address once clients are waited for.

    Raises
    ------
    InvalidInput : if the address cannot be had.
    """
    with listening(host, port) as waiting:
        name = f"[{host}]" if ":" in host else host
        if announce is not None:
            announce(f"http://{name}:{waiting.getsockname()[1]}")
        uvicorn.Server(configured(app, app.state.limits)).run(sockets=[waiting])
