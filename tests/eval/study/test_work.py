"""Processes of a study end with it, whatever ends it."""

import os
import signal
import time
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import pytest

from qsun.errors import OutOfMemory, QsunError
from qsun.eval.study import work
from qsun.eval.study.work import Work, run_pieces
from tests.warm_process import WarmProcess, warm_context


def begin(file):
    """Write the process id to a file and work for a long time."""
    begun = file.with_suffix(".begun")
    begun.write_text(str(os.getpid()))
    begun.rename(file)
    time.sleep(60)


def study(folder):
    """More pieces than processes; forked, as a new Python would import torch for seconds."""
    work.get_context = lambda _: get_context("fork")
    pieces = [Work(str(n), folder / "made", begin, (folder / str(n),)) for n in range(8)]
    run_pieces(pieces, 2)


def alive(pid):
    with suppress(ProcessLookupError, FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "too late"
        time.sleep(0.02)


@pytest.fixture
def started(tmp_path):
    """The process of a study, and those of its two pieces."""
    with WarmProcess(study, tmp_path) as process:
        until(lambda: len(list(tmp_path.glob("[0-9]"))) == 2)
        workers = [int(file.read_text()) for file in tmp_path.glob("[0-9]")]
        try:
            yield process, workers
        finally:
            for pid in filter(alive, workers):
                os.kill(pid, signal.SIGKILL)


def begun(folder):
    return sum(file.is_file() for file in folder.iterdir())


def test_ctrl_c_ends_every_process_and_begins_nothing_more(started, tmp_path):
    process, workers = started
    for pid in (*workers, process.pid):  # as a terminal does
        os.kill(pid, signal.SIGINT)
    assert process.wait(20) != 0
    until(lambda: not any(map(alive, workers)))
    assert begun(tmp_path) == 2
    assert "KeyboardInterrupt" in process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_where_the_one_that_started_them_is_killed(started, tmp_path, number):
    process, workers = started
    process.send_signal(number)
    process.wait(20)
    until(lambda: not any(map(alive, workers)))
    assert begun(tmp_path) == 2


def test_a_process_that_was_killed_is_one_clear_line(started, tmp_path):
    process, workers = started
    os.kill(workers[0], signal.SIGKILL)
    assert process.wait(20) != 0
    until(lambda: not any(map(alive, workers)))
    last = process.stderr.read().strip().splitlines()[-1]
    assert last.endswith(
        "one of 2 processes was killed before its work was done, as when memory runs out; free some, and run the "
        "command again"
    )
    assert begun(tmp_path) == 2


def fail(_):
    raise QsunError("train.jsonl has no examples")


def test_an_error_of_one_piece_does_not_wait_for_the_others(monkeypatch, tmp_path):
    with WarmProcess(print) as first_one:  # which takes as long as importing torch does
        first_one.wait()
    monkeypatch.setattr(work, "get_context", lambda _: warm_context())
    pieces = [Work(str(n), tmp_path / "made", f, (tmp_path / str(n),)) for n, f in enumerate((begin, fail, begin))]
    start = time.monotonic()
    with pytest.raises(QsunError, match="has no examples"):
        run_pieces(pieces, 2)
    assert time.monotonic() - start < 20


def note(folder, name, waits_for):
    """Append this piece's name to a file when it has ended, which it does once what it waits for exists."""
    until(lambda: not waits_for or Path(waits_for).exists())
    with (folder / "order").open("a") as file:
        file.write(name)
    (folder / name).touch()


def test_a_piece_begins_as_soon_as_what_it_needs_is_made(monkeypatch, tmp_path):
    """c needs a and not b, and b ends only when c has: whoever waits for all of a stage never ends."""
    monkeypatch.setattr(work, "get_context", lambda _: warm_context())
    (tmp_path / "there").touch()
    needs = {"d": ["c", "b"], "b": ["there"], "a": [], "c": ["a"]}
    waits = {"b": tmp_path / "c"}
    pieces = [
        Work(name, tmp_path / name, note, (tmp_path, name, waits.get(name)), needs=tuple(tmp_path / n for n in needed))
        for name, needed in needs.items()
    ]
    reported = []
    run_pieces(pieces, 2, lambda *report: reported.append(report))
    assert (tmp_path / "order").read_text() == "acbd"
    assert reported == [("", 0, 4), ("a", 1, 4), ("c", 2, 4), ("b", 3, 4), ("d", 4, 4)]


def take(folder, name, beside):
    """Fail for want of memory while another piece works, which is all the time in a first trial."""
    crowded = beside and not (folder / beside).exists()
    with (folder / "order").open("a") as file:
        file.write(name)
    if crowded:
        raise OutOfMemory(f"{name} needs 3 GB, with 2 free")
    until(lambda: name in "cd" or "b" in (folder / "order").read_text())
    time.sleep(0.5)  # what begins beside it does so before its end
    (folder / name).touch()


def test_a_piece_without_memory_beside_others_is_done_when_one_has_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(work, "get_context", lambda _: warm_context())
    beside = {"a": "", "b": "a", "c": "b", "d": "c"}
    pieces = [Work(name, tmp_path / name, take, (tmp_path, name, other)) for name, other in beside.items()]
    run_pieces(pieces, 2)
    # Which of the first two processes is up first is open; from then on it is one at a time.
    assert (tmp_path / "order").read_text() in ("abbcd", "babcd")


def test_a_piece_without_memory_though_it_is_alone_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(work, "get_context", lambda _: warm_context())
    with pytest.raises(OutOfMemory, match="a needs 3 GB, with 2 free"):
        run_pieces([Work("a", tmp_path / "a", take, (tmp_path, "a", "never"))], 2)
    assert (tmp_path / "order").read_text() == "a"


def allocate(_):
    raise RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has")


def test_memory_that_runs_out_is_one_line_with_the_fix(monkeypatch, tmp_path):
    monkeypatch.setattr(work, "get_context", lambda _: warm_context())
    says = "memory ran out asking for 3.00 GiB more; use a machine with more, or fewer --processes"
    with pytest.raises(OutOfMemory, match=says):
        run_pieces([Work("a", tmp_path / "a", allocate, (0,))], 1)


def raise_strangely(_):
    class TwoParts(Exception):  # which another process cannot make again
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    raise TwoParts("this", "that")


def leave(_):
    raise SystemExit(0)


@pytest.mark.parametrize(("function", "says"), [(raise_strangely, "TwoParts: this and that"), (leave, "SystemExit: 0")])
def test_any_error_of_a_piece_names_it_and_its_cause(monkeypatch, tmp_path, function, says):
    monkeypatch.setattr(work, "get_context", lambda _: warm_context())
    with pytest.raises(RuntimeError) as error:
        run_pieces([Work("math sun, seed 0", tmp_path / "a", function, (0,))], 1)
    assert str(error.value).startswith("math sun, seed 0:\n") and says in str(error.value)
