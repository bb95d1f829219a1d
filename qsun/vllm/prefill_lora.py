"""LoRA adapters of vLLM on prompt tokens only: a prefill module of SUN inside one engine.

An adapter acts on t0 .. t(n-2) of its prompt; t(n-1) and every output token are computed by the base, which is the
decode module. Decode batches are then pure base, whatever adapters their prompts had, and no KV cache is transferred.

vLLM has no switch for this, so a few of its functions are replaced (`install`). Each replacement is checked against the
vLLM that is installed: one whose internals have moved is refused at start, because the alternative would be wrong text.
"""

import inspect
import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch

from qsun.errors import QsunError

log = logging.getLogger(__name__)
TESTED_WITH = "0.32"
SWITCH = "QSUN_PREFILL_LORA"  # an environment variable, because every process of vLLM inherits it
_NO_ADAPTER = 0


def prompt_mask(computed: np.ndarray, scheduled: np.ndarray, prompt_lengths: np.ndarray) -> np.ndarray:
    """Return which tokens of a step an adapter acts on: those before the last token of their prompt.

    Args:
        computed: (B,) tokens of each request whose KV is in the cache already.
        scheduled: (B,) tokens of each request in this step; they follow the computed ones.
        prompt_lengths: (B,) tokens of each prompt.
    Returns:
        (sum of scheduled,) bool. Output tokens that are computed again after a preemption are False.
    """
    starts = np.repeat(computed - (scheduled.cumsum() - scheduled), scheduled)
    positions = starts + np.arange(len(starts))
    return positions < np.repeat(prompt_lengths, scheduled) - 1


def boundary_keys(prompt_length: int, block_end: int) -> list[tuple[str, int]]:
    """Return the additional keys of a prefix-cache block of an adapter's request that ends before `block_end`.

    A block that reaches position n-1 holds KV of the base. It may serve a request whose seam is at the same position,
    such as this one after a preemption, and no other: to a longer prompt those tokens belong to the adapter.
    """
    return [("qsun_seam", prompt_length - 1)] if block_end > prompt_length - 1 else []


def install() -> None:
    """Replace vLLM's choice of adapters for each token, its prefix-cache keys, and its CPU kernel's default adapter.

    May be called again. Raises QsunError for a vLLM whose functions are not those that are replaced; nothing is
    replaced then.
    """
    found = [(_find(module, owner), *rest) for module, owner, *rest in _REPLACEMENTS]
    for (module, owner, *_), (target, name, parameters, _) in zip(_REPLACEMENTS, found, strict=True):
        _check(target, name, parameters, f"{module}.{owner + '.' if owner else ''}{name}")
    version = import_module("vllm").__version__
    if not version.startswith(f"{TESTED_WITH}."):
        log.warning(
            "%s=1 was tested with vLLM %s, and this is %s; check its answers first", SWITCH, TESTED_WITH, version
        )
    for target, name, _, replacement in found:
        original = vars(target)[name]
        if not getattr(original, "qsun", False):
            changed: Any = replacement(original)
            changed.qsun = True
            setattr(target, name, changed)


def installed() -> bool:
    """Return whether `install` has replaced all functions in this process."""
    try:
        found = [vars(_find(module, owner)).get(name) for module, owner, name, *_ in _REPLACEMENTS]
    except QsunError:
        return False
    return all(getattr(function, "qsun", False) for function in found)


def _check(target: Any, name: str, parameters: str, path: str) -> None:
    original = vars(target).get(name)  # its own, not one that it inherits
    found = [] if original is None else list(inspect.signature(original).parameters)
    if found != parameters.split() and not getattr(original, "qsun", False):
        raise QsunError(
            f"{path}({', '.join(found)}) of this vLLM is not the function that {SWITCH}=1 replaces; use vLLM "
            f"{TESTED_WITH}, or unset {SWITCH}"
        )


def _find(module: str, owner: str) -> Any:
    try:
        found = import_module(module)
        return getattr(found, owner) if owner else found
    except (ImportError, AttributeError) as error:
        raise QsunError(f"{SWITCH}=1 needs vLLM {TESTED_WITH}: {error}; unset {SWITCH}, or install that one") from None


def _inputs_of_input_batch(_: Callable[..., Any]) -> Callable[..., Any]:
    """For the first model runner, whose batch knows positions and prompts."""

    def make_lora_inputs(self: Any, num_scheduled_tokens: Any, num_sampled_tokens: Any) -> Any:
        count = self.num_reqs
        adapters = self.request_lora_mapping[:count]
        scheduled = num_scheduled_tokens[:count]
        mask = prompt_mask(self.num_computed_tokens_cpu[:count], scheduled, self.num_prompt_tokens[:count])
        tokens = np.where(mask, adapters.repeat(scheduled), _NO_ADAPTER)
        active = set(np.unique(tokens).tolist())
        requests = {request for number, request in self.lora_id_to_lora_request.items() if number in active}
        sampled = np.full(int(num_sampled_tokens.sum()), _NO_ADAPTER)  # the output head is the base's
        return tuple(sampled.tolist()), tuple(tokens.tolist()), requests

    return make_lora_inputs


def _runner_with_positions(original: Callable[..., Any]) -> Callable[..., Any]:
    """For the second model runner: its adapters' state must see the positions of the requests."""

    def with_positions(self: Any, vllm_config: Any, device: Any) -> None:
        original(self, vllm_config, device)
        self.lora_state.qsun_requests = self.req_states

    return with_positions


def _room_for_two_runs(original: Callable[..., Any]) -> Callable[..., Any]:
    """A request takes two runs of equal adapters in a step, its prompt's and the base's, where vLLM counts one."""

    def with_room(self: Any, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
        original(self, max_num_batched_tokens, 2 * max_batches, device, **kwargs)

    return with_room


def _inputs_of_lora_state(_: Callable[..., Any]) -> Callable[..., Any]:
    def make_lora_inputs(self: Any, req_ids: Any, idx_mapping: Any, num_scheduled_tokens: Any) -> Any:
        requests = self.qsun_requests
        computed, lengths = requests.num_computed_tokens_np[idx_mapping], requests.prompt_len.np[idx_mapping]
        mask = prompt_mask(computed, num_scheduled_tokens, lengths)
        tokens = np.where(mask, self.lora_ids[idx_mapping].repeat(num_scheduled_tokens), _NO_ADAPTER)
        sampled = (_NO_ADAPTER,) * len(idx_mapping)
        return sampled, tuple(tokens.tolist()), self.get_activate_loras(req_ids)

    return make_lora_inputs


def _adapters_at_work(_: Callable[..., Any]) -> Callable[..., Any]:
    """Of requests that still read their prompt, so that a pure decode step takes the base's own CUDA graph."""

    def get_activate_loras(self: Any, req_ids: Any) -> Any:
        requests = self.qsun_requests
        reading = [
            request
            for request in req_ids
            if requests.num_computed_tokens_np[requests.req_id_to_index[request]]
            < requests.prompt_len.np[requests.req_id_to_index[request]] - 1
        ]
        return {self.lora_requests[request] for request in reading if request in self.lora_requests}

    return get_activate_loras


def _block_keys(original: Callable[..., Any]) -> Callable[..., Any]:
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        if request.lora_request is not None:
            keys = (keys or ()) + tuple(boundary_keys(request.num_prompt_tokens, end_token_idx))
        return keys, next_mm_idx

    return generate_block_hash_extra_keys


def _shrink_without_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's CPU product takes -1, which means no adapter, for the last adapter slot."""

    def bgmv_shrink(
        inputs: torch.Tensor,
        lora_b_weights: torch.Tensor,
        output_tensor: torch.Tensor,
        lora_indices_tensor: torch.Tensor,
        scaling: float = 1.0,
    ) -> None:
        original(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor.mul_((lora_indices_tensor >= 0)[:, None])

    return bgmv_shrink


def _nothing_without_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """In a step without adapters vLLM's CPU product still allocates and calls for every layer."""

    def add_lora_linear(self: Any, *args: Any, **kwargs: Any) -> None:
        if not (self.is_prefill and self.no_lora):  # is_prefill: no_lora is of this step
            original(self, *args, **kwargs)

    return add_lora_linear


def _no_adapter_of_the_head(_: Callable[..., Any]) -> Callable[..., Any]:
    """Tokens are chosen by the base, and vLLM's CPU product copies a vocabulary of zeros for each row."""

    def add_lora_logits(self: Any, *args: Any, **kwargs: Any) -> None:
        pass

    return add_lora_logits


_SHRINK = "inputs lora_b_weights output_tensor lora_indices_tensor scaling"
_REPLACEMENTS: list[tuple[str, str, str, str, Callable[..., Callable[..., Any]]]] = [
    (
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch",
        "make_lora_inputs",
        "self num_scheduled_tokens num_sampled_tokens",
        _inputs_of_input_batch,
    ),
    (
        "vllm.v1.worker.gpu.lora_utils",
        "LoraState",
        "make_lora_inputs",
        "self req_ids idx_mapping num_scheduled_tokens",
        _inputs_of_lora_state,
    ),
    ("vllm.v1.worker.gpu.lora_utils", "LoraState", "get_activate_loras", "self req_ids", _adapters_at_work),
    (
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner",
        "__init__",
        "self vllm_config device",
        _runner_with_positions,
    ),
    (
        "vllm.v1.core.kv_cache_utils",
        "",
        "generate_block_hash_extra_keys",
        "request start_token_idx end_token_idx start_mm_idx",
        _block_keys,
    ),
    (
        "vllm.lora.punica_wrapper.punica_base",
        "PunicaWrapperBase",
        "__init__",
        "self max_num_batched_tokens max_batches device kwargs",
        _room_for_two_runs,
    ),
    (
        "vllm.lora.punica_wrapper.punica_cpu",
        "PunicaWrapperCPU",
        "add_lora_linear",
        "self y x lora_a_stacked lora_b_stacked scale output_slices buffer kwargs",
        _nothing_without_adapter,
    ),
    (
        "vllm.lora.punica_wrapper.punica_cpu",
        "PunicaWrapperCPU",
        "add_lora_logits",
        "self y x lora_a_stacked lora_b_stacked scale buffer kwargs",
        _no_adapter_of_the_head,
    ),
    ("vllm.lora.ops.torch_ops.lora_ops", "", "bgmv_shrink", _SHRINK, _shrink_without_adapter),
    ("vllm.lora.ops.torch_ops", "", "bgmv_shrink", _SHRINK, _shrink_without_adapter),
    ("vllm.lora.punica_wrapper.punica_cpu", "", "bgmv_shrink", _SHRINK, _shrink_without_adapter),
]
