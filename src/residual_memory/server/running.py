"""Running an application on uvicorn, with deadlines for slow clients and a cheap refusal under overload."""

import asyncio
import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import uvicorn
from threadpoolctl import threadpool_limits
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from residual_memory.errors import InvalidInput
from residual_memory.server.limits import Limits

_ALWAYS = (b"/health", b"/metrics", b"/v2/health")  # answered under overload too: it is no reason to be restarted
REFUSAL_SECONDS = (
    0.1  # after which a client is refused: at once, it would ask again at once, and refusing takes time too
)
SWITCH_SECONDS = 0.001  # a search that comes back waits so long for Python's lock, by default five times as long


def _short(status: str, *headers: str, close: bool = True) -> bytes:
    """A whole answer without a body."""
    lines = [f"HTTP/1.1 {status}", "content-length: 0", *headers, *(["connection: close"] if close else [])]
    return "\r\n".join([*lines, "", ""]).encode()


class BoundedProtocol(HttpToolsProtocol):
    """HTTP/1.1 that waits for nobody for ever.

    A client has a time for its headers, one for its body, and one to take what it is sent. What comes when too many
    requests are under way is refused before a task is made for it; those whose body has yet to come are counted apart,
    so that slow clients take no place from others.
    """

    limits: ClassVar[Limits] = Limits()
    uploading: ClassVar[set["BoundedProtocol"]] = set()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._in_headers = True
        self._unused_bytes = 0  # of headers, of chunks' extensions, of trailers: all that is no body
        self._refused = False
        self._to_refuse = 0  # requests that are refused when their time has come, and those behind them with them
        self._busy = _short("503 Service Unavailable", f"retry-after: {self.limits.retry_seconds}", close=False)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._end(self._busy)
        else:
            self._wait(self.limits.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self.uploading.discard(self)
        if self._stalled is not None:
            self._stalled.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._unused_bytes += len(data)
        if self._in_headers and self._deadline is None:
            self._wait(self.limits.header_seconds)
        super().data_received(data)
        if self._unused_bytes > self.limits.header_bytes:
            self._end(b"" if self._answering() else _short("431 Request Header Fields Too Large"))

    def on_message_begin(self) -> None:
        self._in_headers, self._refused = True, False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_headers, self._unused_bytes = False, 0
        self._wait(self.limits.body_seconds)
        idle = not self._answering()
        if self._to_refuse or (idle and self._full() and not self.url.startswith(_ALWAYS)):
            self._refused = True
            return
        super().on_headers_complete()
        if idle:
            self.uploading.add(self)

    def on_body(self, body: bytes) -> None:
        self._unused_bytes = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._stop_waiting()
        self.uploading.discard(self)
        self._in_headers, self._unused_bytes = True, 0
        if not self._refused:
            super().on_message_complete()
            return
        self._unset_keepalive_if_required()
        if not self._to_refuse:
            self.loop.call_later(REFUSAL_SECONDS, self._refuse)
        self._to_refuse += 1
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _refuse(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(self._busy * self._to_refuse)
        self._to_refuse = 0

    def on_response_complete(self) -> None:
        self.uploading.discard(self)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self.limits.body_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()

    def _answering(self) -> bool:
        """Whether a request of this connection waits for its answer, or for the rest of it."""
        return self.cycle is not None and not self.cycle.response_complete

    def _full(self) -> bool:
        """Whether as much is under way as may be; tasks that are done stay in `tasks` for a turn of the loop."""
        most, uploading = self.limits.in_flight, len(self.uploading)
        working = len(self.tasks) - uploading
        if working >= most:
            working = sum(not task.done() for task in self.tasks) - uploading
        return working >= most or uploading >= self.limits.uploads

    def _wait(self, seconds: float) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(seconds, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        """Say so, unless it would be taken for an answer that is still to come, or for a part of one."""
        asked = not self._in_headers and not self._refused
        silent = self.cycle is not None and self.cycle.response_started if asked else self._answering()
        self._end(b"" if silent else _short("408 Request Timeout"))

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
        http=type("Bounded", (BoundedProtocol,), {"limits": limits, "uploading": set()}),
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
        sys.setswitchinterval(SWITCH_SECONDS)
        gc.collect()
        gc.freeze()  # what is there for good need not be looked through while clients wait
        threadpool_limits(max(1, (os.cpu_count() or 1) - 1), user_api="blas")  # one core is for the requests
        server = uvicorn.Server(configured(app, app.state.limits))
        with _stopped_by_signals(server):
            server.run(sockets=[waiting])


@contextmanager
def _stopped_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """Return when a signal has stopped the server: uvicorn raises it once more then, which would end the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
