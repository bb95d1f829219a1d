"""Where processes listen, as Linux says it in /proc: for the test that workers do so on the loopback address only."""

import ipaddress
import re
from collections.abc import Iterable
from pathlib import Path

LISTEN = "0A"


def listening_addresses(pids: Iterable[int]) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket that one of these processes listens on."""
    inodes = {inode for pid in pids for inode in _socket_inodes(pid)}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in inodes:
                address, port = fields[1].split(":")
                found.add((_address(address), int(port, 16)))
    return found


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def members(group: int) -> list[int]:
    """Processes of a group: a worker's engine or ranks may be processes of their own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        if int(fields[2]) == group:
            found.append(int(path.parent.name))
    return found


def _socket_inodes(pid: int) -> set[str]:
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            match = re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink()))
        except FileNotFoundError:  # closed meanwhile
            continue
        if match:
            found.add(match[1])
    return found


def _address(hexadecimal: str) -> str:
    """The kernel writes words of 32 bits in the machine's own order, which is little-endian here."""
    words = [bytes.fromhex(hexadecimal[i : i + 8])[::-1] for i in range(0, len(hexadecimal), 8)]
    return str(ipaddress.ip_address(b"".join(words)))
