"""How middleware keeps vLLM's HTTP server from starting; it is made once vLLM's plugins are loaded."""

import logging
import os
import signal
from typing import NoReturn

from qsun.errors import QsunError

logger = logging.getLogger("vllm.qsun")  # vLLM shows its own loggers only


def refuse_to_start(reason: str) -> NoReturn:
    """End the server: vLLM itself would go on, with status 500 for all requests. Raises QsunError with the reason."""
    error = QsunError(reason)
    logger.error("%s", error)
    os.kill(os.getpid(), signal.SIGTERM)
    raise error
