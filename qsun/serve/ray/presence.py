"""Which replicas Serve's controller last named to this process, by application.

A request router is told, and Serve gives it no way to the process around it: it pickles the router's module by value,
so a table there would be a copy. This module is imported by both sides, and is one.
"""

import threading
from collections import defaultdict
from collections.abc import Callable

Announce = Callable[[frozenset[str]], None]
_lock = threading.Lock()
_watchers: defaultdict[str, list[Announce]] = defaultdict(list)
_present: dict[str, frozenset[str]] = {}


def announce(app: str, replicas: frozenset[str]) -> None:
    """Tell the watchers of an application which replicas it has, by id."""
    with _lock:
        _present[app] = replicas
        watchers = list(_watchers[app])
    for watcher in watchers:
        watcher(replicas)


def watch(app: str, watcher: Announce) -> None:
    """Have a function called, in any thread, with the ids of an application's replicas, now and when they change."""
    with _lock:
        _watchers[app].append(watcher)
        present = _present.get(app)
    if present is not None:
        watcher(present)
