"""Micro-batching: what waits together is searched together, and everybody gets his own answer."""

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest

from residual_memory.server.batching import Batcher
from residual_memory.server.refusals import Overloaded, Stopping


def doubling(batches: list[int], seconds: float = 0.0) -> "Batcher[int, int]":
    def work(asked: Sequence[int]) -> list[int]:
        batches.append(len(asked))
        time.sleep(seconds)
        return [2 * one for one in asked]

    return Batcher(work, lambda _: 1, rows_at_a_time=8, rows_waiting=20)


def test_everybody_gets_his_own_answer_from_few_searches() -> None:
    batches: list[int] = []
    batcher = doubling(batches, 0.02)

    async def ask() -> list[int]:
        return await asyncio.gather(*(batcher(number) for number in range(17)))

    assert asyncio.run(ask()) == [2 * number for number in range(17)]
    assert len(batches) <= 4
    assert max(batches) <= 8
    batcher.stop()
    assert batcher.rows == 0


def test_one_alone_waits_for_nobody() -> None:
    batcher = doubling([])
    started = time.monotonic()
    assert asyncio.run(batcher(1)) == 2
    assert time.monotonic() - started < 0.5
    batcher.stop()


def test_more_than_may_wait_are_refused_and_the_others_answered() -> None:
    batcher = doubling([], 0.05)

    async def ask() -> list[object]:
        return await asyncio.gather(*(batcher(number) for number in range(30)), return_exceptions=True)

    found = asyncio.run(ask())
    refused = [one for one in found if isinstance(one, Overloaded)]
    assert len(refused) == 10
    assert sorted(one for one in found if isinstance(one, int)) == [2 * number for number in range(20)]
    batcher.stop()


def test_an_error_reaches_those_who_asked_and_nobody_else() -> None:
    def work(asked: Sequence[int]) -> list[int]:
        time.sleep(0.02)
        batches.append(list(asked))
        if 3 in asked:
            raise ValueError("three")
        return list(asked)

    batches: list[list[int]] = []
    batcher: Batcher[int, int] = Batcher(work, lambda _: 1, rows_at_a_time=8, rows_waiting=20)

    async def ask() -> list[object]:
        return await asyncio.gather(*(batcher(number) for number in range(5)), return_exceptions=True)

    found = asyncio.run(ask())
    assert [one for one in found if isinstance(one, int)] == [0, 1, 2, 4]
    assert isinstance(found[3], ValueError)
    assert any(len(batch) > 1 and 3 in batch for batch in batches), "it failed for several at once"
    batcher.stop()


def test_what_waits_when_it_stops_is_answered_and_nothing_new_is_taken() -> None:
    batcher = doubling([], 0.1)

    async def ask() -> tuple[list[int], object]:
        waiting = asyncio.gather(*(batcher(number) for number in range(9)))
        await asyncio.sleep(0.02)
        stopping = threading.Thread(target=batcher.stop)
        stopping.start()
        await asyncio.sleep(0.02)
        late = (await asyncio.gather(batcher(99), return_exceptions=True))[0]
        return await waiting, late

    answers, late = asyncio.run(ask())
    assert answers == [2 * number for number in range(9)]
    assert isinstance(late, Stopping)


def test_a_client_that_left_harms_nobody() -> None:
    batcher = doubling([], 0.05)

    async def ask() -> int:
        left = asyncio.ensure_future(batcher(1))
        stays = asyncio.ensure_future(batcher(2))
        await asyncio.sleep(0.01)
        left.cancel()
        return await stays

    assert asyncio.run(ask()) == 4
    batcher.stop()


@pytest.mark.parametrize("rows", [21, 1000])
def test_one_query_larger_than_all_that_may_wait_goes_alone(rows: int) -> None:
    batcher: Batcher[int, int] = Batcher(list, lambda size: size, rows_at_a_time=8, rows_waiting=20)
    assert asyncio.run(batcher(rows)) == rows
    batcher.stop()
