"""What `qsun up` on this machine does with a changed file, and at its end; Ray is pretended."""

import pytest

pytest.importorskip("ray.serve", reason="needs Ray: pip install 'qsun[ray]'")

from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException

from qsun.errors import QsunError
from qsun.serve.cluster.file import parse_cluster
from qsun.serve.ray import local
from qsun.serve.ray.signals import UpSignals


def cluster(**changes):
    values = {"decode": {"module": "demo", "workers": 1}, "models": {"m": {"module": "demo", "workers": 1}}}
    return parse_cluster(values | changes)


@pytest.fixture
def served(monkeypatch):
    """A LocalServe that runs a first file. `put` has the configs, `said` what it reports; `faults` come from Serve."""

    def wait(*_):
        if made.faults:
            raise made.faults.pop(0)

    put, said = [], []
    made = local.LocalServe("http://d", "http://127.0.0.1:8000", cluster().listen, None, said.append)
    made.put, made.said, made.faults = put, said, []
    monkeypatch.setattr(local, "put_config", lambda _, config, __: made.put.append(config))
    monkeypatch.setattr(local, "wait_until_running", wait)
    monkeypatch.setattr(local, "_check_room", lambda _: None)
    monkeypatch.setattr(local, "serve_config", lambda cluster, planned: (cluster.listen.port, *planned))
    made.apply(cluster(), ["first"])
    put.clear()
    return made


@pytest.mark.parametrize("fault", [QsunError("application a cannot be deployed"), RayActorError(), RuntimeError("x")])
def test_a_file_that_does_not_run_is_taken_back(served, fault):
    served.faults = [fault]
    with pytest.raises(QsunError, match=r"^the changed file is not applied: .") as raised:
        served.reload(lambda: (cluster(), ["faulty"]))
    assert served.put == [(8000, "faulty"), (8000, "first")]
    assert "\n" not in str(raised.value)
    served.reload(lambda: (cluster(), ["second"]))
    served.faults = [fault]
    with pytest.raises(QsunError):
        served.reload(lambda: (cluster(), ["faulty"]))
    assert served.put[-1] == (8000, "second")


def test_a_file_that_is_faulty_reaches_nothing(served):
    def read():
        raise QsunError("decode is missing")

    with pytest.raises(QsunError, match="decode is missing"):
        served.reload(read)
    assert served.put == []


def test_where_it_listens_stays_and_it_says_so(served):
    served.reload(lambda: (cluster(listen={"port": 9000}), ["second"]))
    assert served.put == [(8000, "second")]
    assert served.said[0] == "listen.host and listen.port are those of http://127.0.0.1:8000 until a restart"


@pytest.mark.parametrize("fault", [None, RayServeException("gone"), TimeoutError()])
def test_the_end_waits_for_the_ingress_to_drain(served, monkeypatch, fault):
    asked = []

    class Handle:
        def broadcast(self, method):
            asked.append(method)
            return self

        def results(self, timeout_s):
            asked.append(timeout_s)
            if fault is not None:
                raise fault

    def handle(_, app_name):
        asked.append(app_name)
        return Handle()

    monkeypatch.setattr(local.serve, "get_deployment_handle", handle)
    served.reload(lambda: (cluster(limits={"drain_seconds": 7.0}), ["second"]))
    served.drain()
    assert asked[:2] == ["qsun", "drain"]
    assert asked[2] > 7.0 + local.LAST_SECONDS


@pytest.mark.parametrize(
    "fault", [QsunError("no such module"), OSError("no file"), RayActorError(), RuntimeError("x y")]
)
def test_a_hangup_whose_reload_fails_ends_nothing(fault, caplog):
    reloads = []

    def reload():
        reloads.append(len(reloads))
        if len(reloads) == 1:
            signals.hangup.set()
            raise fault
        raise KeyboardInterrupt

    signals = UpSignals()
    signals.hangup.set()
    local.until_interrupted(signals, reload)
    assert reloads == [0, 1]
    assert str(fault).splitlines()[0] in caplog.text
