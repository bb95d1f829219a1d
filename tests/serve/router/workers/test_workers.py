"""The circuit breaker, and the load of a worker."""

from qsun.serve.router.workers.worker import Breaker, Worker


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_the_circuit_opens_cools_down_is_probed_and_closes():
    clock = Clock()
    breaker = Breaker(3, 10.0, clock)
    assert [breaker.fail(), breaker.fail(), breaker.state] == [False, False, "closed"]
    breaker.succeed()  # failures count only in a row
    assert [breaker.fail(), breaker.fail(), breaker.fail(), breaker.state] == [False, False, True, "open"]
    clock.now = 9.9
    assert breaker.state == "open"
    clock.now = 10.0
    assert breaker.state == "half_open"
    assert breaker.fail()  # the probe failed: another cool-down
    assert breaker.state == "open"
    clock.now = 20.0
    breaker.succeed()
    assert breaker.state == "closed"
    assert not breaker.fail()


def test_a_worker_carries_what_is_not_done_yet():
    worker = Worker("http://w", "decode", "qsun-0", Breaker(3, 10.0))
    with worker.handling(100) as load, worker.handling(10):
        load.done(30)
        assert (worker.in_flight, worker.outstanding_tokens) == (2, 80)
        load.done(1000)  # more than was announced
        assert worker.outstanding_tokens == 10
    assert (worker.in_flight, worker.outstanding_tokens, worker.taken) == (0, 0, 2)
    try:
        with worker.handling(5):
            raise OSError
    except OSError:
        assert worker.outstanding_tokens == 0
