"""The oracle of where workers listen, against sockets whose addresses are known."""

import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest

from tests.vllm.listening import is_loopback, listening_addresses, members

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

CHILD = """
import os, socket, sys
sockets = [socket.create_server((host, 0), family=family) for host, family in (
    ("127.0.0.1", socket.AF_INET), ("0.0.0.0", socket.AF_INET), ("::1", socket.AF_INET6), ("::", socket.AF_INET6))]
connected = socket.create_connection(sockets[0].getsockname())
print(*(s.getsockname()[1] for s in sockets), flush=True)
if os.fork() == 0:
    sockets.append(socket.create_server(("127.0.0.2", sockets[0].getsockname()[1])))
    print("forked", flush=True)
sys.stdin.read()
"""


def test_every_address_of_a_group_is_found():
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    with ExitStack() as stack:
        stack.enter_context(socket.create_server(("127.0.0.1", 0)))  # of another group
        run = [sys.executable, "-c", CHILD]
        pipe = subprocess.PIPE
        child = stack.enter_context(subprocess.Popen(run, stdin=pipe, stdout=pipe, text=True, start_new_session=True))
        ports = [int(port) for port in child.stdout.readline().split()]
        assert child.stdout.readline() == "forked\n"
        found = listening_addresses(members(child.pid))
        child.stdin.close()
    hosts = ("127.0.0.1", "0.0.0.0", "::1", "::")  # noqa: S104
    assert found == {*zip(hosts, ports, strict=True), ("127.0.0.2", ports[0])}


def test_what_is_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.3.4.5", "::1", "::ffff:127.0.0.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "::ffff:10.0.0.1", "fe80::1")))  # noqa: S104
