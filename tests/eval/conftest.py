"""A short index of lm-eval's tasks; an OpenAI-compatible server with known delays, on bare sockets."""

import asyncio
import json
import shutil
import socket
import struct
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest


@dataclass
class FakeServer:
    """How the server behaves, and what it has seen.

    Attributes:
        first_s, each_s: before the first token and between tokens. stalled: answers wait until it is set.
        fault: by model, one of "http 503", "cut short", "error in the stream", "connection broken", "not JSON",
            "not a stream", "no tokens", "silence", "odd event". odd: that event.
        usage: whether answers have it. tokens_per_letter, template_tokens: of its tokenizer.
    """

    first_s: float = 0.02
    each_s: float = 0.01
    fault: dict = field(default_factory=dict)
    usage: bool = True
    tokens_per_letter: int = 1
    template_tokens: int = 0
    models: tuple = ("math", "code", "tool")
    url: str = ""
    stall: bool = False
    odd: str = ""
    seen: list = field(default_factory=list)  # (time, headers, body)

    def release(self):
        self._loop.call_soon_threadsafe(self._released.set)

    async def _serve(self, ready):
        self._loop, self._released, self._stopped = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        await self._stopped.wait()
        server.close()

    async def _connection(self, reader, writer):
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            line, *rest = head.split("\r\n")
            headers = dict(part.lower().split(": ", 1) for part in rest if ": " in part)
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            if line.startswith("GET"):
                data = {"data": [{"id": name} for name in self.models]}
                self._plain(writer, 200, data)
            else:
                body = json.loads(body)
                self.seen.append((time.perf_counter(), headers, body))
                await self._answer(writer, body, "chat" in line)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def _plain(self, writer, status, data, kind="application/json"):
        text = json.dumps(data).encode()
        head = (
            f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(text)}\r\nconnection: close\r\n\r\n"
        )
        writer.write(head.encode() + text)

    def _prompt_tokens(self, body):
        text = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        return self.template_tokens + self.tokens_per_letter * len(text.split())

    async def _answer(self, writer, body, chat):
        usage = {"prompt_tokens": self._prompt_tokens(body), "completion_tokens": body["max_tokens"]}
        fault = self.fault.get(body["model"])
        if not body.get("stream"):
            return self._plain(writer, 200, {"choices": [], **({"usage": usage} if self.usage else {})})
        if fault == "http 503":
            return self._plain(writer, 503, {"error": {"message": "full"}})
        if fault == "not a stream":
            return self._plain(writer, 200, {"choices": []})
        if self.stall:
            await self._released.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nconnection: close\r\n\r\n")
        if chat:
            self._event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        await asyncio.sleep(self.first_s)
        for number in range(0 if fault == "no tokens" else body["max_tokens"]):
            if number:
                await asyncio.sleep(self.each_s)
            if number == 2 and fault and await self._fails(writer, fault):
                return None
            piece = {"delta": {"content": "x"}} if chat else {"text": "x"}
            self._event(writer, {"choices": [{**piece, "finish_reason": None}]})
            await writer.drain()
        if fault != "no tokens":
            self._event(writer, {"choices": [{"delta": {}, "text": "", "finish_reason": "length"}]})
        if self.usage:
            self._event(writer, {"choices": [], "usage": usage})
        writer.write(b"data: [DONE]\n\n")
        return None

    async def _fails(self, writer, fault):
        if fault == "error in the stream":
            self._event(writer, {"error": {"message": "decode worker lost"}})
        elif fault == "not JSON":
            writer.write(b"data: {oops\n\n")
        elif fault == "odd event":
            self._line(writer, self.odd)
            return False  # and the rest of the answer after it
        elif fault == "connection broken":
            linger = struct.pack("ii", 1, 0)  # close with a reset instead of an orderly end
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        elif fault == "silence":
            await self._stopped.wait()
        return fault != "no tokens"

    def _event(self, writer, data):
        self._line(writer, json.dumps(data))

    def _line(self, writer, text):
        writer.write(b"data: " + text.encode() + b"\n\n")


@contextmanager
def _serving(**behaviour):
    """Run a FakeServer in its own thread."""
    server, ready = FakeServer(**behaviour), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(server._serve(ready)))
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        server._loop.call_soon_threadsafe(server._stopped.set)
        thread.join(10)


@pytest.fixture
def serving():
    """serving(**behaviour): a context manager that gives a running FakeServer."""
    return _serving


@pytest.fixture(scope="module")
def short_index(tmp_path_factory):
    """Of lm-eval's own tasks leave GSM8K: 14,000 files take 8 seconds to index."""
    from lm_eval.tasks import manager

    own = tmp_path_factory.mktemp("lm-eval")
    shutil.copytree(Path(manager.__file__).parent / "gsm8k", own / "gsm8k")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager, "__file__", str(own / "manager.py"))
        yield
