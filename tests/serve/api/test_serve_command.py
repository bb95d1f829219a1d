"""`qsun serve` as a process: it starts, prints its URL, answers, drains on SIGTERM, and refuses what cannot work."""

import json
import signal
import threading
from contextlib import contextmanager, suppress

import httpx
import pytest

from tests.serve.api.test_api import until
from tests.warm_process import qsun_process


@contextmanager
def serving(*options, decode="demo"):
    """Run `qsun serve`; yields its process and a client."""
    with qsun_process("serve", "--decode", decode, "--port", "0", "--json", *options) as process:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        with httpx.Client(base_url=json.loads(line)["url"], timeout=60) as client:
            yield process, client


@pytest.mark.slow
def test_it_serves_the_base_and_drains_at_sigterm():
    with serving("--threads", "1", "--drain", "600") as (process, client):
        assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403  # without keys
        body = {"model": "base", "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            received = [line for line in lines if line]
        assert received[-1] == "data: [DONE]"  # what ran is finished
        assert json.loads(received[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            client.get("/health")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_wait(number):
    with serving("--threads", "1", "--drain", "60") as (process, client):
        first, received = threading.Event(), []
        body = {"model": "base", "prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True, "n": 16}

        def read():
            with suppress(httpx.HTTPError), client.stream("POST", "/v1/completions", json=body) as stream:
                for line in stream.iter_lines():
                    received.append(line)
                    first.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert first.wait(30)
        process.send_signal(number)
        until(lambda: client.get("/ready").status_code == 503)
        assert client.post("/v1/completions", json={**body, "stream": False}).status_code == 503
        assert process.poll() is None  # it waits for what runs
        process.send_signal(number)
        assert process.wait(20) == 0
        reader.join(30)
        assert "data: [DONE]" not in received  # it was cut off, and the client can tell


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prefill", "math"], "--prefill 'math' is not NAME=DIR"),
        (["--prefill", "a b=demo"], "not NAME=DIR"),
        (["--prefill", "a=demo", "--prefill", "a=demo"], "names 'a' twice"),
        (["--prefill", "a=nowhere"], "nowhere is not a directory"),
        (["--host", "0.0.0.0"], "no API key is set"),  # noqa: S104
        (["--kv-memory", "much"], "--kv-memory 'much' is not a size"),
        (["--kv-memory", "1KB"], "kv_bytes 1000 is too small"),
        (["--api-keys", "/nonexistent"], "cannot be read"),
        (["--timeout", "0"], "seconds 0.0 is out of range"),
        (["--dtype", "float31"], "dtype 'float31' is not supported; use one of float32, bfloat16, float16"),
        (["--dtype", "int8"], "dtype 'int8' is not supported; use one of float32, bfloat16, float16"),
        (["--host", "203.0.113.7", "--api-keys", "KEYS"], "cannot listen on 203.0.113.7"),
    ],
)
def test_what_cannot_work_is_one_line(cli, tmp_path, options, message):
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-some-length\n")
    options = [str(keys) if option == "KEYS" else option for option in options]
    answer = cli("serve", "--decode", "demo", "--port", "0", *options)
    assert answer.code == 2
    assert message in answer.err.splitlines()[-1]


def test_a_port_that_is_taken_is_known_before_weights_are_loaded(cli, tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        answer = cli("serve", "--decode", "demo", "--port", taken.getsockname()[1])
    assert answer.code == 2
    assert "cannot listen on 127.0.0.1" in answer.err


def test_sizes():
    from qsun.cli.serve import byte_count

    assert [byte_count("x", t) for t in ("512MiB", "2GB", "0", "1.5KiB", "7")] == [512 << 20, 2 * 10**9, 0, 1536, 7]
