"""API keys of a server, and the addresses that need them."""

import ipaddress
from pathlib import Path

from qsun.errors import QsunError


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Read API keys, one per line, without blank lines and lines that begin with #. None, no file: no keys.

    Raises:
        QsunError: the file cannot be read, or holds no key.
    """
    if path is None:
        return ()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise QsunError(f"API key file {path} cannot be read: {error}") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise QsunError(f"API key file {path} has no API key; write one key on each line")
    return keys


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposed(host: str, protected: bool, fix: str = "give a file of keys") -> None:
    """Raise QsunError for an address that other machines reach, unless it is protected."""
    if not protected and not is_loopback(host):
        raise QsunError(f"host {host} can be reached from other machines, and no API key is set; {fix}")
