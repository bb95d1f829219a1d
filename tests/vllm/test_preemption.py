"""A preempted request whose KV cache was loaded ends with an error. Without vLLM, on a scheduler in its shape."""

import logging
import os
import signal
import sys
from types import ModuleType, SimpleNamespace

import pytest

from qsun.errors import QsunError
from qsun.vllm import preemption
from qsun.vllm.kv_guard import RequireKvCache

LOADED = {"do_remote_prefill": False, "do_remote_decode": False, "remote_block_ids": [[1, 2]]}  # once it was loaded
ASKED_TO_PREFILL = {"do_remote_prefill": False, "do_remote_decode": True, "remote_block_ids": None}


def make_scheduler():
    """vLLM 0.32's class, with one running request at most."""

    class Scheduler:
        def __init__(self, vllm_config):
            self.vllm_config = vllm_config
            self.waiting, self.running, self.encoder_cache_mismatch_reqs = [], [], set()

        def schedule(self, preempt=False):
            """Return the request that is computed."""
            if preempt:
                self._preempt_request(self.running.pop(), 0.0, drop_stale_output=False)
            elif not self.running and self.waiting and self._handle_blocked_waiting_request(self.waiting[0]):
                self.running.append(self.waiting.pop(0))
            return self.running[0] if self.running else None

        def _preempt_request(self, request, timestamp, drop_stale_output=False):
            request.num_computed_tokens = 0
            request.num_preemptions += 1
            self.waiting.insert(0, request)

        def _handle_blocked_waiting_request(self, request):
            return not request.blocked

        def update_from_output(self):
            """Return ids of requests that end with an error."""
            failed = set(self.encoder_cache_mismatch_reqs)
            self.encoder_cache_mismatch_reqs.clear()
            self.waiting = [request for request in self.waiting if request.request_id not in failed]
            return failed

    return Scheduler


@pytest.fixture
def scheduler_class(monkeypatch):
    """Of the vLLM that is installed while the test runs."""
    made = make_scheduler()
    module = ModuleType("vllm.v1.core.sched.scheduler")
    module.Scheduler = made
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(preemption, "import_module", sys.modules.__getitem__)
    return made


def config(role):
    return SimpleNamespace(kv_transfer_config=role and SimpleNamespace(is_kv_consumer=role != "kv_producer"))


def preempted(scheduler_class, role, params):
    """(scheduler, request) after the request ran and was preempted."""
    scheduler = scheduler_class(config(role))
    request = SimpleNamespace(
        request_id="r", kv_transfer_params=params, num_computed_tokens=9, num_preemptions=0, blocked=False
    )
    scheduler.waiting.append(request)
    assert scheduler.schedule() is request
    scheduler.schedule(preempt=True)
    return scheduler, request


@pytest.mark.parametrize("role", ["kv_consumer", "kv_both"])
def test_a_request_whose_kv_cache_was_loaded_ends_with_an_error(role, scheduler_class, caplog):
    preemption.install()
    with caplog.at_level(logging.WARNING, "vllm.qsun"):
        scheduler, _ = preempted(scheduler_class, role, LOADED)
    assert "request r was preempted" in caplog.text
    assert scheduler.schedule() is None  # asynchronous scheduling makes a step before the last one's output is there
    assert scheduler.update_from_output() == {"r"}
    assert scheduler.waiting == []


@pytest.mark.parametrize(
    ("role", "params"),
    [
        ("kv_consumer", None),  # a prompt of one token
        ("kv_both", ASKED_TO_PREFILL),
        ("kv_producer", ASKED_TO_PREFILL),
        (None, None),
    ],
)
def test_any_other_is_computed_again(role, params, scheduler_class):
    preemption.install()
    scheduler, request = preempted(scheduler_class, role, params)
    assert scheduler.update_from_output() == set()
    request.blocked = True
    assert scheduler.schedule() is None
    request.blocked = False
    assert scheduler.schedule() is request


def test_vllm_may_load_its_plugins_more_than_once(scheduler_class):
    assert preemption.fault()
    preemption.install()
    replaced = dict(vars(scheduler_class))
    preemption.install()
    assert dict(vars(scheduler_class)) == replaced
    assert not preemption.fault()


def other_parameters(scheduler_class):
    scheduler_class._preempt_request = lambda self, requests: None


def absent(scheduler_class):
    del scheduler_class._handle_blocked_waiting_request


def unused(scheduler_class):
    scheduler_class.schedule = lambda self: self._handle_blocked_waiting_request(None)


def other_errors(scheduler_class):
    scheduler_class.update_from_output = lambda self: self.failed_requests


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_parameters, r"_preempt_request\(self, requests\)"),
        (absent, r"no _handle_blocked_waiting_request"),
        (unused, r"schedule without _preempt_request"),
        (other_errors, r"update_from_output without encoder_cache_mismatch_reqs"),
    ],
)
def test_an_engine_that_loads_kv_cache_does_not_start_on_another_vllm(change, named, scheduler_class):
    change(scheduler_class)
    preemption.install()
    preemption.install()
    assert preemption.fault()
    for role in ("kv_consumer", "kv_both"):
        with pytest.raises(QsunError, match=named):
            scheduler_class(config(role))
    for role in ("kv_producer", None):
        scheduler_class(config(role))


def test_the_middleware_ends_a_server_without_the_plugin(scheduler_class, monkeypatch):
    signals = []
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append((pid, number)))
    with pytest.raises(QsunError, match="VLLM_PLUGINS"):
        RequireKvCache(None)
    assert signals == [(os.getpid(), signal.SIGTERM)]
    preemption.install()
    RequireKvCache(None)
    assert len(signals) == 1
