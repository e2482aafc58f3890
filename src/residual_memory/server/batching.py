"""Micro-batching: requests that wait at the same time are answered by one search."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from residual_memory.server.refusals import Overloaded, Stopping

Query = TypeVar("Query")
Answer = TypeVar("Answer")


@dataclass
class _Waiting(Generic[Query]):
    query: Query
    size: int
    future: "asyncio.Future[Any]"


class Batcher(Generic[Query, Answer]):
    """Answers queries on a thread of its own, those that came meanwhile together.

    Nobody waits for others to come: a search begins as soon as the one before it is done.

    Parameters
    ----------
    work : from queries to as many answers.
    size : rows of a query.
    rows_at_a_time : rows that are joined; a larger query goes alone.
    rows_waiting : more than these are refused.
    begin : called first on the thread.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Query]], Sequence[Answer]],
        size: Callable[[Query], int],
        *,
        rows_at_a_time: int,
        rows_waiting: int,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._work, self._size, self._begin = work, size, begin
        self._rows_at_a_time, self._rows_waiting = rows_at_a_time, rows_waiting
        self._waiting: deque[_Waiting[Query]] = deque()
        self._rows = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False

    @property
    def rows(self) -> int:
        """That wait, or are being searched."""
        return self._rows

    async def __call__(self, query: Query) -> Answer:
        """The answer of one query.

        Raises
        ------
        Overloaded : if too many rows wait already.
        Stopping : if the server stops.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(query, self._size(query), loop.create_future())
        with self._changed:
            if self._stopping:
                raise Stopping("the server stops; ask another one, or this one when it is back")
            if self._rows and self._rows + waiting.size > self._rows_waiting:
                raise Overloaded(f"{self._rows:,} queries wait already; come again in a moment")
            if self._thread is None:
                self._loop = loop
                self._thread = threading.Thread(target=self._run, name="resmem-search", daemon=True)
                self._thread.start()
            self._rows += waiting.size
            self._waiting.append(waiting)
            self._changed.notify()
        return await waiting.future

    def stop(self) -> None:
        """Take no more queries, and answer those that wait."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        self._begin()
        while batch := self._next():
            answers = self._answered([waiting.query for waiting in batch])
            assert self._loop is not None
            with self._changed:
                self._rows -= sum(waiting.size for waiting in batch)
            try:
                self._loop.call_soon_threadsafe(_deliver, batch, answers)
            except RuntimeError:
                return  # the loop is closed: nobody waits any more

    def _answered(self, queries: Sequence[Query]) -> Sequence[Any]:
        """Answers, or errors in their place: where it fails for all together, each is tried alone."""
        try:
            return self._work(queries)
        except Exception as error:
            if len(queries) == 1:
                return [error]
            return [answer for query in queries for answer in self._answered([query])]

    def _next(self) -> list[_Waiting[Query]]:
        """What is searched next; nothing when the server stops and all is answered."""
        with self._changed:
            while not self._waiting and not self._stopping:
                self._changed.wait()
            batch: list[_Waiting[Query]] = []
            rows = 0
            while self._waiting and (not batch or rows + self._waiting[0].size <= self._rows_at_a_time):
                batch.append(self._waiting.popleft())
                rows += batch[-1].size
            return batch


def _deliver(batch: Sequence[_Waiting[Any]], answers: Sequence[Any]) -> None:
    for waiting, answer in zip(batch, answers, strict=True):
        if waiting.future.done():
            continue  # its client has gone
        if isinstance(answer, Exception):
            waiting.future.set_exception(answer)
        else:
            waiting.future.set_result(answer)
