"""vLLM plugin: `--quantization qsun` runs a decode module's layers on our kernels (docs/vllm.md).

Entry point `qsun` of the group `vllm.general_plugins`. Nothing on disk changes: config.json says gptq, awq or
compressed-tensors, and without the flag vLLM uses its own kernels.
"""

import os


def register() -> None:
    """Register the quantization method with vLLM, which calls this in each of its processes, perhaps repeatedly.

    On engines that load KV cache a preempted request ends with an error (preemption.py). With QSUN_PREFILL_LORA=1 in
    the environment, LoRA adapters act on prompt tokens only (prefill_lora.py).
    """
    from qsun.vllm import preemption, quantization  # noqa: F401  (the latter's decorator registers)

    preemption.install()
    if os.environ.get("QSUN_PREFILL_LORA", "0") not in ("", "0"):
        from qsun.vllm.prefill_lora import install

        install()
