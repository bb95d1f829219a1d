"""How a config reaches a running cluster, and with which token; needs no Ray."""

import json
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from qsun.errors import QsunError
from qsun.serve.ray import config
from qsun.serve.ray.config import put_config as put_with
from qsun.serve.ray.config import ray_token

TOKEN = "secret-token"  # noqa: S105 - of no cluster
CONFIG = {"applications": []}


@contextmanager
def dashboard(*statuses):
    """A server that answers as Serve does, in the end with the last status; gives its URL, and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers["Authorization"], body))
            self.send_response(statuses[min(len(asked), len(statuses)) - 1])
            self.end_headers()
            self.wfile.write(b"no such\nmodule")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def put_config(url, values):
    put_with(url, values, ray_token(os.environ))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return tmp_path


def test_a_running_cluster_gets_the_config():
    with dashboard(200) as (url, asked):
        put_config(url + "/", CONFIG)
    assert asked == [("/api/serve/applications/", None, CONFIG)]


def test_the_token_is_the_one_that_ray_would_find(home, monkeypatch):
    with dashboard(200) as (url, asked):
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text("of-home\n")
        put_config(url, CONFIG)
        (home / "file").write_text("of-file\n")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "file"))
        put_config(url, CONFIG)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "of-shell")
        put_config(url, CONFIG)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        put_config(url, CONFIG)
    assert [sent for _, sent, _ in asked] == ["Bearer of-home", "Bearer of-file", "Bearer of-shell", None]


def test_a_dashboard_whose_serve_takes_long_to_start_is_asked_again(monkeypatch):
    monkeypatch.setattr(config, "_AGAIN_SECONDS", 0.01)
    with dashboard(500, 500, 200) as (url, asked):
        put_config(url, CONFIG)
    assert len(asked) == 3
    with dashboard(500) as (url, asked), pytest.raises(QsunError, match="answers 500: no such module"):
        put_config(url, CONFIG)
    assert len(asked) == 4


@pytest.mark.parametrize("status", [401, 403])
def test_a_cluster_that_wants_another_token(status, monkeypatch):
    with dashboard(status) as (url, _):
        with pytest.raises(QsunError, match=f"answers {status}: it requires a token; set RAY_AUTH_TOKEN"):
            put_config(url, CONFIG)
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
        with pytest.raises(QsunError, match="refuses this token; set RAY_AUTH_TOKEN") as refused:
            put_config(url, CONFIG)
    assert TOKEN not in str(refused.value)


def test_a_token_that_cannot_be_sent_is_in_no_message(home, monkeypatch):
    for token in (f"{TOKEN}\nX: y", f"{TOKEN}ü", f"{TOKEN} b"):
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        with pytest.raises(QsunError, match="the token in RAY_AUTH_TOKEN is empty or not valid") as refused:
            put_config("http://127.0.0.1:1", CONFIG)
        assert TOKEN not in str(refused.value)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "none"))
    with pytest.raises(QsunError, match="none cannot be read: No such file or directory; correct RAY_AUTH_TOKEN_PATH"):
        put_config("http://127.0.0.1:1", CONFIG)


def test_a_cluster_that_refuses_or_does_not_answer():
    with dashboard(400) as (url, _), pytest.raises(QsunError, match="answers 400: no such module"):
        put_config(url, CONFIG)
    with pytest.raises(QsunError, match="does not answer"):
        put_config(url, CONFIG)
    with pytest.raises(QsunError, match="ray://head:10001 is not the address of a dashboard; give http://HEAD:8265"):
        put_config("ray://head:10001", CONFIG)
