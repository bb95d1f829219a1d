"""A decode worker computes no prompt again: a preempted request whose KV cache was loaded ends with an error.

vLLM's scheduler preempts a running request when KV blocks run out: it frees the request's blocks, and computes its
prompt and answer again when there is room. On a decode worker that is the decode module's own text, with status 200,
because a KV cache is loaded once, and the prefill worker has freed its blocks by then.

vLLM has no switch for this, so two methods of its scheduler are replaced (`install`). The request ends as vLLM ends
those that fail in the scheduler: finish reason "error", which its server answers with status 500, or with an error
event in a stream. Tokens already streamed stay right, and none is sent twice.
"""

import inspect
import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

from qsun.errors import QsunError

logger = logging.getLogger("vllm.qsun")  # vLLM shows its own loggers only
_REPLACED = {
    "_preempt_request": "self request timestamp drop_stale_output",
    "_handle_blocked_waiting_request": "self request",
}
_FAILING = "encoder_cache_mismatch_reqs"  # ids of requests that update_from_output ends with an error
_USERS = {"schedule": (*_REPLACED,), "update_from_output": (_FAILING,)}


def install() -> None:
    """Replace both methods of vLLM's scheduler; may be called again.

    On a vLLM whose scheduler is not the one that they were written for (0.32 and 0.33), nothing is replaced, and an
    engine that loads KV cache raises QsunError at its start instead; others run as ever.
    """
    try:
        scheduler = _scheduler()
    except ImportError as error:
        logger.warning("preempted requests whose KV cache was loaded are computed again: no scheduler (%s)", error)
        return
    if getattr(scheduler, "qsun", False):
        return
    if differences := _differences(scheduler):
        scheduler.__init__ = _refusing(scheduler.__init__, ", ".join(differences))
    else:
        scheduler._preempt_request = _ends_with_error(scheduler._preempt_request)
        scheduler._handle_blocked_waiting_request = _stays_out(scheduler._handle_blocked_waiting_request)
    scheduler.qsun = True


def fault() -> str:
    """Return why the methods are not replaced in this process; empty if they are."""
    try:
        scheduler = _scheduler()
    except ImportError as error:
        return f"this vLLM has another scheduler ({error}); use vLLM 0.32 or 0.33"
    if all(getattr(vars(scheduler).get(name), "qsun", False) for name in _REPLACED):
        return ""
    if differences := _differences(scheduler):
        return f"this vLLM's scheduler has {', '.join(differences)}; use vLLM 0.32 or 0.33"
    return "qsun's plugin was not loaded; have neither VLLM_PLUGINS nor launch.environment turn it off"


def _scheduler() -> Any:
    return import_module("vllm.v1.core.sched.scheduler").Scheduler


def _differences(scheduler: Any) -> list[str]:
    """Return how this vLLM's scheduler differs from the one whose methods are replaced."""
    found = []
    for name, parameters in _REPLACED.items():
        method = vars(scheduler).get(name)
        taken = [] if method is None else list(inspect.signature(method).parameters)
        if taken != parameters.split():
            found.append(f"{name}({', '.join(taken)})" if taken else f"no {name}")
    for user, used in _USERS.items():
        method = vars(scheduler).get(user)
        names = () if method is None else inspect.unwrap(method).__code__.co_names
        found += [f"{user} without {name}" for name in used if name not in names]
    return found


def _refusing(original: Callable[..., None], differences: str) -> Callable[..., None]:
    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if _loads_kv_cache(self):
            raise QsunError(
                f"vLLM would compute a preempted request's prompt with the decode module's weights, and qsun cannot "
                f"prevent it here: this vLLM's scheduler has {differences}; use vLLM 0.32 or 0.33"
            )

    return initialize


def _ends_with_error(original: Callable[..., None]) -> Callable[..., None]:
    def _preempt_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        original(self, request, *args, **kwargs)
        if _must_end(self, request):
            getattr(self, _FAILING).add(request.request_id)
            logger.warning(
                "request %s was preempted: KV blocks ran out. It ends with an error, because its KV cache is not this "
                "worker's own to compute again. Use fewer max_num_seqs, or more memory for KV cache",
                request.request_id,
            )

    _preempt_request.qsun = True  # type: ignore[attr-defined]
    return _preempt_request


def _stays_out(original: Callable[..., bool]) -> Callable[..., bool]:
    """Asynchronous scheduling may make a step before `update_from_output` ends the request."""

    def _handle_blocked_waiting_request(self: Any, request: Any) -> bool:
        return not _must_end(self, request) and original(self, request)

    _handle_blocked_waiting_request.qsun = True  # type: ignore[attr-defined]
    return _handle_blocked_waiting_request


def _must_end(scheduler: Any, request: Any) -> bool:
    """Return whether a request has been preempted whose KV cache came from another engine."""
    came = (request.kv_transfer_params or {}).get("remote_block_ids")
    return bool(came) and request.num_preemptions > 0 and _loads_kv_cache(scheduler)


def _loads_kv_cache(scheduler: Any) -> bool:
    transfer = scheduler.vllm_config.kv_transfer_config
    return transfer is not None and bool(transfer.is_kv_consumer)
