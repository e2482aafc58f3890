"""What is known of a running server: counters for Prometheus, and a line of JSON for each request.

Neither holds anything of what was asked: routes are named by their template, and no header or body is looked at.
"""

import json
import logging
import secrets
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LOG = logging.getLogger("residual_memory.server")
PACKAGE = Path(__file__).parents[1]
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GONE = 499  # the client left before the answer: a status that is only noted


class Observer:
    """Counts and notes requests; each application has its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        names: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter("resmem_requests", "Requests.", ["route", "method", "status"], **names)
        self._seconds = Histogram("resmem_request_seconds", "Seconds a request.", ["route"], buckets=SECONDS, **names)
        self.in_flight = Gauge("resmem_requests_in_flight", "Requests that are worked on.", **names)
        self.batch = Histogram("resmem_batch_rows", "Queries that were searched together.", buckets=BATCHES, **names)
        self.changed = Counter("resmem_rows_changed", "Rows that were added or forgotten.", ["change"], **names)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A figure that is looked up when it is asked for."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def exposition(self) -> bytes:
        """All figures, in the text format of Prometheus."""
        return generate_latest(self.registry)

    @contextmanager
    def request(
        self, scope: MutableMapping[str, Any], status_of: Callable[[], int | None]
    ) -> Iterator[Callable[[Exception], None]]:
        """Note one request, whatever becomes of it, and why it failed where the function that it gives is told.

        Parameters
        ----------
        status_of : gives None where there was no answer.
        """
        started = time.perf_counter()
        failure: dict[str, str] = {}
        self.in_flight.inc()
        try:
            yield lambda error: failure.update(error=type(error).__name__, place=place_of(error))
        finally:
            self.in_flight.dec()
            seconds = time.perf_counter() - started
            status, route, method = status_of() or GONE, _route(scope), _method(scope)
            self._requests.labels(route, method, str(status)).inc()
            self._seconds.labels(route).observe(seconds)
            level = logging.ERROR if failure else logging.INFO
            if LOG.isEnabledFor(level):
                about = {"id": secrets.token_hex(4), "method": method, "route": route, "status": status}
                noted = {"event": "request", **about, "ms": round(1000 * seconds, 2), **failure}
                LOG.log(level, "request", extra={"noted": noted})


def place_of(error: BaseException) -> str:
    """File and line of this package, or else of others, where an error was raised; never its message."""
    places = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [(path.relative_to(PACKAGE), line) for path, line in places if path.is_relative_to(PACKAGE)]
    path, line = (ours or places or [(Path("unknown"), 0)])[-1]
    return f"{path}:{line}"


def write_log(stream: TextIO) -> None:
    """Write what is noted to a stream, what uvicorn has to say too: without the texts of errors, which quote input."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    others = [(logging.getLogger(name), logging.WARNING) for name in ("uvicorn", "asyncio")]
    for log, level in ((LOG, logging.INFO), *others):
        log.addHandler(handler)
        log.setLevel(level)
        log.propagate = False


class JsonLines(logging.Formatter):
    """One object a line: time, level, and what was noted."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        noted: Mapping[str, Any] = getattr(record, "noted", {"event": record.getMessage()})
        line = {"time": f"{moment}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), **noted}
        if record.exc_info and record.exc_info[1] is not None:
            line |= {"error": type(record.exc_info[1]).__name__, "place": place_of(record.exc_info[1])}
        return json.dumps(line)


def _route(scope: Mapping[str, Any]) -> str:
    """The template of the route, never the path, which is the client's text."""
    return getattr(scope.get("route"), "path", "none")


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _method(scope: Mapping[str, Any]) -> str:
    return scope["method"] if scope["method"] in _METHODS else "other"
