"""Slots for requests: order, limits, and fairness between models."""

import asyncio
import math

import pytest

from qsun.serve.http.errors import HttpError
from qsun.serve.router.exchange.admission import Admission
from tests.serve.routing import run, until


class Requests:
    """Requests that hold their slot until they are told to end."""

    def __init__(self, admission):
        self.admission, self.admitted, self.refused = admission, [], []
        self.tasks = {}

    async def ask(self, *names):
        """Ask for slots, in this order; the model is the first letter of a name."""
        for name in names:
            waiting = self.admission.waiting + self.admission.running + len(self.refused)
            self.tasks[name] = asyncio.create_task(self._hold(name))
            await until(lambda before=waiting: self._seen > before)

    @property
    def _seen(self):
        return self.admission.waiting + self.admission.running + len(self.refused)

    async def _hold(self, name):
        try:
            async with self.admission.permit(name[0]):
                self.admitted.append(name)
                await asyncio.Event().wait()
        except HttpError as error:
            assert error.status == 429
            self.refused.append(name)

    async def end(self, name):
        self.tasks[name].cancel()
        await asyncio.wait([self.tasks[name]])


def test_a_burst_of_one_model_does_not_delay_another():
    async def scenario():
        requests = Requests(Admission(2, 100))
        await requests.ask("a1", "a2", "a3", "a4", "a5", "a6", "b1", "b2")
        assert requests.admitted == ["a1", "a2"]
        for name in ("a1", "a2", "b1", "a3"):
            await requests.end(name)
        assert requests.admitted == ["a1", "a2", "b1", "a3", "b2", "a4"]

    run(scenario)


def test_models_take_turns_for_a_single_slot():
    async def scenario():
        requests = Requests(Admission(1, 100))
        await requests.ask("a1", "a2", "a3", "b1", "b2", "c1")
        for name in ("a1", "a2", "b1", "c1", "a3"):
            await until(lambda name=name: requests.admitted[-1] == name)
            await requests.end(name)
        await until(lambda: requests.admitted[-1] == "b2")

    run(scenario)


def test_a_full_queue_drops_the_latest_request_of_the_model_with_the_most():
    async def scenario():
        requests = Requests(Admission(1, 3))
        await requests.ask("a1", "a2", "a3", "a4")
        await requests.ask("a5")
        assert requests.refused == ["a5"]
        requests.tasks["b1"] = asyncio.create_task(requests._hold("b1"))
        await until(lambda: requests.refused == ["a5", "a4"])
        await requests.end("a1")
        await requests.end("a2")
        assert requests.admitted == ["a1", "a2", "b1"]
        assert requests.admission.waiting == 1

    run(scenario)


@pytest.mark.parametrize("ends", ["leaves", "waits too long"])
def test_a_request_that_no_longer_waits_holds_no_slot(ends):
    async def scenario():
        admission = Admission(1, 3, math.inf if ends == "leaves" else 0.05)
        requests = Requests(admission)
        await requests.ask("a1", "a2")
        if ends == "leaves":
            await requests.end("a2")
        else:
            await until(lambda: requests.refused == ["a2"])
        await requests.end("a1")
        assert (admission.running, admission.waiting) == (0, 0)
        async with admission.permit("b"):
            assert admission.running == 1

    run(scenario)


def test_more_slots_admit_requests_that_wait():
    async def scenario():
        requests = Requests(Admission(1, 3))
        await requests.ask("a1", "a2", "a3")
        requests.admission.limit(2, 3)
        await until(lambda: requests.admitted == ["a1", "a2"])

    run(scenario)
