"""How much a server takes on, and how long it waits."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What is refused, and after how long.

    Attributes
    ----------
    body_bytes : of a request; more is answered with 413 before it is held.
    header_bytes : of the request line and headers together.
    header_seconds : for a client to send them, from its first byte on, or from connecting.
    body_seconds : for a client to send its body, and to take an answer that it does not read.
    answer_seconds : for an answer, or for the next part of one that is streamed.
    in_flight : requests that are worked on at a time; more are answered with 503.
    uploads : requests whose body is on its way; they do not count as worked on, and more are answered with 503.
    connections : that are open at a time.
    rows : queries that may wait for a search; more are answered with 429.
    rows_a_search : queries of waiting requests that are searched together.
    retry_seconds : what a refused client is told to wait.
    stop_seconds : for requests under way when the server stops.
    """

    body_bytes: int = 8 << 20
    header_bytes: int = 32 << 10
    header_seconds: float = 10.0
    body_seconds: float = 20.0
    answer_seconds: float = 30.0
    in_flight: int = 48
    uploads: int = 256
    connections: int = 2048
    rows: int = 4096
    rows_a_search: int = 256
    retry_seconds: int = 1
    stop_seconds: float = 10.0
