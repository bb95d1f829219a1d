"""Everyone who waits for the engine is told when it ends."""

import asyncio

import pytest

from qsun.engine.config import Sampling
from qsun.engine.requests import Refused, Request
from qsun.engine.thread import EngineThread


def long_request(name="a"):
    return Request(name, "math", (5, 6), Sampling(500, ignore_eos=True))


def test_stopping_ends_what_runs_with_an_error_and_refuses_what_comes(make_engine):
    async def scenario():
        thread = EngineThread(make_engine())
        thread.start()
        updates = await thread.submit([long_request()])
        first = await anext(updates)
        await asyncio.to_thread(thread.stop)
        last = [update async for update in updates][-1]
        with pytest.raises(Refused, match="shutting down"):
            await thread.submit([long_request("b")])
        return first, last

    first, last = asyncio.run(scenario())
    assert first.tokens
    assert last.finish == "error"


def test_a_call_that_comes_as_the_thread_ends_is_answered(make_engine):
    async def scenario():
        thread = EngineThread(make_engine())
        thread.start()
        calls = [asyncio.ensure_future(thread.call(lambda: 1)) for _ in range(50)]
        await asyncio.to_thread(thread.stop)
        calls += [asyncio.ensure_future(thread.call(lambda: 1)) for _ in range(50)]
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 120)

    answers = asyncio.run(scenario())
    assert all(answer == 1 or isinstance(answer, Refused) for answer in answers)
    assert isinstance(answers[-1], Refused)


def test_a_batch_of_requests_is_queued_whole_or_not_at_all(make_engine):
    async def scenario():
        engine = make_engine(max_waiting=2)
        thread = EngineThread(engine)
        thread.start()
        try:
            with pytest.raises(Refused):
                await thread.submit([long_request("a"), Request("b", "nobody", (5,))])
            await thread.call(lambda: None)
            return engine.idle
        finally:
            thread.stop()

    assert asyncio.run(scenario())


def test_an_engine_that_fails_at_cancelling_too_still_tells_all_who_wait(make_engine, monkeypatch):
    async def scenario():
        engine = make_engine()
        thread = EngineThread(engine)
        thread.start()
        leaving, staying = [await thread.submit([long_request(name)]) for name in "ab"]
        await anext(staying)

        def broken(*_):
            raise RuntimeError("the device is lost")

        def step():
            leaving.close()  # in the inbox when the thread ends
            broken()

        monkeypatch.setattr(engine, "cancel", broken)
        monkeypatch.setattr(engine, "step", step)
        return [update async for update in staying][-1]

    last = asyncio.run(asyncio.wait_for(scenario(), 120))
    assert "the device is lost" in last.error
