"""Pieces that come close together are passed on together: in order, none lost, errors last."""

import asyncio
from contextlib import aclosing

import pytest

from qsun.serve.http.gathering import _MOST, gathered

SHORT = 0.01


def test_none_is_held_back_without_a_time():
    async def scenario():
        return [part async for part in gathered(numbers(5), 0.0)]

    assert asyncio.run(scenario()) == [[0], [1], [2], [3], [4]]


async def numbers(count, pause=False):
    for number in range(count):
        yield number
        if pause and number % 3:
            await asyncio.sleep(SHORT / 3)


@pytest.mark.parametrize("pause", [False, True])
def test_all_come_in_order_and_no_part_is_large(pause):
    async def scenario():
        return [part async for part in gathered(numbers(40 if pause else 3 * _MOST, pause), SHORT)]

    parts = asyncio.run(scenario())
    assert [number for part in parts for number in part] == list(range(40 if pause else 3 * _MOST))
    assert all(0 < len(part) <= _MOST for part in parts)


def test_the_first_is_passed_on_at_once_and_the_rest_together():
    async def scenario():
        first_taken, all_sent = asyncio.Event(), asyncio.Event()

        async def pieces():
            yield "first"
            await first_taken.wait()  # for ever, if it were held back for more
            for number in range(9):
                yield number
            all_sent.set()

        parts = []
        async for part in gathered(pieces(), SHORT):
            parts.append(part)
            first_taken.set()
            await all_sent.wait()
        return parts

    assert asyncio.run(scenario()) == [["first"], list(range(9))]


def test_an_error_comes_after_what_was_before_it():
    async def pieces():
        yield 1
        yield 2
        raise ValueError("broken")

    async def scenario():
        seen = []
        with pytest.raises(ValueError, match="broken"):
            async for part in gathered(pieces(), SHORT):
                seen += part
        return seen

    assert asyncio.run(scenario()) == [1, 2]


def test_a_reader_that_leaves_ends_the_stream():
    async def scenario():
        ended = asyncio.Event()

        async def pieces():
            try:
                while True:
                    yield "more"
                    await asyncio.sleep(SHORT)
            finally:
                ended.set()

        async with aclosing(gathered(pieces(), SHORT)) as parts:
            assert await anext(parts) == ["more"]
        assert ended.is_set()

    asyncio.run(scenario())
