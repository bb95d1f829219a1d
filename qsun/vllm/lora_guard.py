"""An engine that keeps adapters to prompts, or none: `--middleware qsun.vllm.lora_guard.RequirePrefillLora`.

Without the plugin, or without its switch, vLLM's adapters act on answers too, with status 200. This is ASGI middleware
of vLLM's HTTP server because vLLM makes that once its plugins are loaded, and before it answers anything.
"""

import logging
import os
import signal
from typing import Any

from qsun.errors import QsunError
from qsun.vllm.prefill_lora import SWITCH, installed

logger = logging.getLogger("vllm.qsun")  # vLLM shows its own loggers only


class RequirePrefillLora:
    """Passes every request on.

    Raises:
        QsunError: vLLM's functions are not those of prefill-only adapters. The server ends: vLLM itself would go on,
            with status 500 for all requests.
    """

    def __init__(self, app: Any):
        if not installed():
            error = QsunError(
                f"adapters would act on answers too: {SWITCH}=1 has not replaced this vLLM's functions; have neither "
                "VLLM_PLUGINS nor launch.environment turn qsun's plugin off"
            )
            logger.error("%s", error)
            os.kill(os.getpid(), signal.SIGTERM)
            raise error
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)
