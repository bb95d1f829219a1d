"""What `qsun up` and the router see of a vLLM worker: its options, health, model name, and both halves of a transfer.

FAKE_VLLM has words: die (ends at once, with a message), deaf (never listens), lingers (leaves 3 s after SIGTERM).
"""

import itertools
import json
import os
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def option(name):
    return sys.argv[sys.argv.index(name) + 1]


def adapters():
    """Return what follows --lora-modules, NAME=DIRECTORY each."""
    given = sys.argv[sys.argv.index("--lora-modules") + 1 :] if "--lora-modules" in sys.argv else []
    return list(itertools.takewhile(lambda entry: not entry.startswith("--"), given))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        names = [option("--served-model-name"), *(entry.partition("=")[0] for entry in adapters())]
        self.reply({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        choice = {"index": 0, "text": option("--model"), "finish_reason": "length", "token_ids": [5]}
        usage = {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5}
        answer = {
            "id": "cmpl-1",
            "object": "text_completion",
            "model": body["model"],
            "choices": [choice],
            "usage": usage,
        }
        if body["kv_transfer_params"].get("do_remote_decode"):
            answer["kv_transfer_params"] = {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_block_ids": [[1]],
                "remote_engine_id": option("--port"),
                "remote_request_id": "1",
                "remote_host": "127.0.0.1",
                "remote_port": int(os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"]),
                "tp_size": 1,
            }
        self.reply(answer)

    def reply(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def linger(*_):
    time.sleep(3)
    os._exit(0)


MODES = os.environ.get("FAKE_VLLM", "").split()
if "die" in MODES:
    sys.exit("RuntimeError: no kernel for this")
if "lingers" in MODES:
    signal.signal(signal.SIGTERM, linger)
print("pid", os.getpid(), flush=True)
if "deaf" in MODES:
    time.sleep(600)
ThreadingHTTPServer(("127.0.0.1", int(option("--port"))), Handler).serve_forever()
