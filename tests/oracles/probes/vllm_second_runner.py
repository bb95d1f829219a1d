"""vllm_second_runner.py OUT JOB: vllm_prefill_lora.py on vLLM's second model runner, its Triton kernels interpreted.

Needs Triton on PYTHONPATH, VLLM_USE_V2_MODEL_RUNNER=1 and TRITON_INTERPRET=1. vLLM uses Triton on a CPU only where it
has a backend of that name, which the interpreter does without.
"""

import sys
from types import SimpleNamespace

from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))

from vllm_prefill_lora import main  # noqa: E402  (imports vLLM)

if __name__ == "__main__":
    main(*sys.argv[1:])
