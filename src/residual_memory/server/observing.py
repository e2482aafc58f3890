"""What is known of a running server: counters for Prometheus, and a line of JSON for each request.

Neither holds anything of what was asked: routes are named by their template, and no header or body is looked at.
"""

import json
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LOG = logging.getLogger("residual_memory.server")
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
    def request(self, scope: MutableMapping[str, Any], status_of: Callable[[], int | None]) -> Iterator[None]:
        """Note one request, whatever becomes of it; `status_of` gives None where it had no answer."""
        started = time.perf_counter()
        failed: BaseException | None = None
        self.in_flight.inc()
        try:
            yield
        except BaseException as error:
            failed = error
            raise
        finally:
            self.in_flight.dec()
            seconds = time.perf_counter() - started
            told = status_of()
            status = told if told is not None else 500 if isinstance(failed, Exception) else GONE
            route = _route(scope)
            self._requests.labels(route, _method(scope), str(status)).inc()
            self._seconds.labels(route).observe(seconds)
            if LOG.isEnabledFor(logging.INFO):
                noted: dict[str, Any] = {
                    "event": "request",
                    "id": secrets.token_hex(4),
                    "method": _method(scope),
                    "route": route,
                    "status": status,
                    "ms": round(1000 * seconds, 2),
                }
                if failed is not None:
                    noted["error"] = type(failed).__name__
                LOG.info("request", extra={"noted": noted})


class JsonLines(logging.Formatter):
    """One object a line: time, level, and what was noted."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        noted: Mapping[str, Any] = getattr(record, "noted", {"event": record.getMessage()})
        line = {"time": f"{moment}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), **noted}
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
        return json.dumps(line)


def _route(scope: Mapping[str, Any]) -> str:
    """The template of the route, never the path: it is the client's text."""
    return getattr(scope.get("route"), "path", "none")


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _method(scope: Mapping[str, Any]) -> str:
    return scope["method"] if scope["method"] in _METHODS else "other"
