"""An engine that keeps adapters to prompts, or none: `--middleware qsun.vllm.lora_guard.RequirePrefillLora`.

Without the plugin, or without its switch, vLLM's adapters act on answers too, with status 200. This is ASGI middleware
of vLLM's HTTP server because vLLM makes that once its plugins are loaded, and before it answers anything.
"""

from typing import Any

from qsun.vllm.prefill_lora import SWITCH, installed
from qsun.vllm.startup import refuse_to_start


class RequirePrefillLora:
    """Passes every request on.

    Raises:
        QsunError: vLLM's functions are not those of prefill-only adapters. The server ends.
    """

    def __init__(self, app: Any):
        if not installed():
            refuse_to_start(
                f"adapters would act on answers too: {SWITCH}=1 has not replaced this vLLM's functions; have neither "
                "VLLM_PLUGINS nor launch.environment turn qsun's plugin off"
            )
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)
