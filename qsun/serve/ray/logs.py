"""What our modules log goes where Serve's own messages go."""

import logging

_SERVES = "ray.serve"


def log_to_serve() -> None:
    """Send our messages to the log of this replica, with the id of the request that they are about.

    A replica sets up handlers for Serve's logger only.
    """
    own, serves = logging.getLogger("qsun"), logging.getLogger(_SERVES)
    own.handlers = list(serves.handlers)
    own.setLevel(serves.level)
    own.propagate = False
