"""fake_server.py MODE --port P --served-model-name N: what a replica sees of a vLLM server, without vLLM.

MODE: serve; die (prints an error and leaves with 1); deaf (never listens); stubborn (serves, ignores SIGTERM, and so
does a child of its own); parent (serves, and has a child).
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def option(name):
    return sys.argv[sys.argv.index(name) + 1]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"data": [{"id": option("--served-model-name")}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def main(mode):
    print("server", os.getpid(), os.environ.get("QSUN_TEST", ""), flush=True)
    if mode == "die":
        sys.exit("no such kernel")
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mode in ("stubborn", "parent"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print("child", child.pid, flush=True)
    if mode == "deaf":
        time.sleep(600)
    ThreadingHTTPServer(("127.0.0.1", int(option("--port"))), Handler).serve_forever()


main(sys.argv[1])
