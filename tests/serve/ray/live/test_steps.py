"""A pretend vLLM with set times does what the simulator computes: every first and last token at the same time."""

import asyncio
import random

import pytest

from qsun.eval.load.workload import TracedRequest
from qsun.eval.simulate.curves import Curves
from qsun.eval.simulate.simulation import simulate
from qsun.eval.simulate.system import DecodeWorker, System
from tests.serve.ray.live.steps import Timed, Times

TIMES = Times(step=0.1, row=0.013, most_rows=3, prefill=0.05, prompt_token=0.0021)


class AtOnce(asyncio.SelectorEventLoop):
    """A loop whose clock goes to the next event whenever nothing else is to do."""

    now = 0.0

    def time(self):
        return self.now

    def _run_once(self):
        if not self._ready and self._scheduled:
            self.now = max(self.now, self._scheduled[0].when())
        super()._run_once()


async def served(trace):
    """First and last token of each request."""
    loop, prefill, decode = asyncio.get_running_loop(), Timed(TIMES, "prefill"), Timed(TIMES, "decode")

    async def one(request):
        await asyncio.sleep(request.arrival)
        prompt, body = ("w",) * request.prompt_tokens, {"max_tokens": request.output_tokens}
        async with prefill.request(body, prompt):
            pass
        times = []
        async with decode.request(body, prompt):
            for _ in range(request.output_tokens):
                await decode.token()
                times.append(loop.time())
        return times[0], times[-1]

    return await asyncio.gather(*map(one, trace))


@pytest.mark.parametrize("rate", [1.0, 20.0])
def test_every_token_is_at_the_simulators_time(rate):
    pytest.importorskip("simpy")
    draw = random.Random(3)
    arrivals = sorted(draw.uniform(0, 40 / rate) for _ in range(40))
    trace = [TracedRequest(at, "math", draw.randint(1, 40), draw.randint(1, 12)) for at in arrivals]
    worker = DecodeWorker(("math",), max_batch=TIMES.most_rows)
    curves = Curves(lambda _variant, rows, _context: TIMES.of_step(rows), TIMES.of_prompt, "set")
    result = simulate(trace, System("one", (worker,), {"math": 1}), curves)
    loop = AtOnce()
    try:
        found = loop.run_until_complete(served(trace))
    finally:
        loop.close()
    expected = [(times.first, times.last) for times in result.times]
    assert found == [pytest.approx(pair) for pair in expected]
