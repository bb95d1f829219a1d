"""The files that vLLM's output goes to, on a node of Ray; needs no Ray."""

import os
import stat
import sys
import tempfile
import time

import pytest

from qsun.errors import QsunError
from qsun.serve.ray.engine.command import EngineCommand
from qsun.serve.ray.engine.logs import KEPT, drop_old_logs, hold_log, log_directory, logs_in_use, wait_until_unused
from qsun.serve.ray.engine.process import EngineProcess


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_default_directory_is_this_users_alone(temporary):
    directory = log_directory(None)
    assert directory == temporary / f"qsun-logs-{os.getuid()}"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert log_directory(None) == directory


@pytest.mark.parametrize("other", ["readable", "link", "file", "owner"])
def test_a_default_directory_that_others_made_is_refused(temporary, monkeypatch, other):
    place = temporary / f"qsun-logs-{os.getuid()}"
    if other == "readable":
        place.mkdir()
        place.chmod(0o755)
    elif other == "link":
        (temporary / "mine").mkdir(mode=0o700)
        place.symlink_to(temporary / "mine")
    elif other == "file":
        place.write_text("")
    else:
        (temporary / "qsun-logs-4242").mkdir(mode=0o700)
        monkeypatch.setattr(os, "getuid", lambda: 4242)
    with pytest.raises(QsunError, match=r"set ray\.logs to"):
        log_directory(None)


def test_a_directory_that_cannot_be_made_is_one_line(temporary):
    (temporary / "file").write_text("")
    command = EngineCommand("decode-abcdefgh", (sys.executable, "-c", ""), {}, "http://127.0.0.1:1", "qsun-d")
    with pytest.raises(QsunError, match=r"logs cannot be written to .*file/logs: Not a directory; set ray.logs"):
        EngineProcess(command, str(temporary / "file" / "logs"), 1.0, print)
    (temporary / "decode-abcdefgh.log").mkdir()
    with pytest.raises(QsunError, match=r"decode-abcdefgh.log: Is a directory; set ray.logs"):
        EngineProcess(command, str(temporary), 1.0, print)


def test_waiting_until_no_log_is_in_use(temporary):
    with hold_log(temporary / "a.log"):
        started = time.monotonic()
        wait_until_unused(temporary, 0.3)
        assert time.monotonic() - started >= 0.3
        others = logs_in_use(temporary)
        wait_until_unused(temporary, 60.0, others)  # of another qsun up
    wait_until_unused(temporary, 600.0)
    assert time.monotonic() - started < 300.0


def test_the_newest_logs_of_a_pool_and_those_in_use_are_kept(temporary):
    names = [f"prefill-math-0123abcd-{number:08d}.log" for number in range(KEPT + 3)]
    others = ["decode-0.log", "decode-abcdefgh.log", "prefill-math-0123abcd-x-0123abcd-abcdefgh.log", "notes.log"]
    for age, name in enumerate(names + others):
        (temporary / name).write_text(name)
        os.utime(temporary / name, (1e9 - age, 1e9 - age))
    with hold_log(temporary / names[-1]):
        drop_old_logs(temporary, "prefill-math-0123abcd")
        assert names_in(temporary) == sorted([*names[:KEPT], names[-1], *others])
    drop_old_logs(temporary, "prefill-math-0123abcd")
    assert names_in(temporary) == sorted(names[:KEPT] + others)
