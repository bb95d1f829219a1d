"""vLLM plugin: `--quantization qsun` runs a decode module's layers on our kernels (docs/vllm.md).

Entry point `qsun` of the group `vllm.general_plugins`. Nothing on disk changes: config.json says gptq, awq or
compressed-tensors, and without the flag vLLM uses its own kernels.
"""


def register() -> None:
    """Make the method known to vLLM. vLLM calls it in each of its processes, and may call it again."""
    from qsun.vllm import quantization  # noqa: F401  (its decorator registers)
