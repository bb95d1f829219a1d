#!/usr/bin/env bash
# Makes the environment with a real vLLM for CPUs, NIXL and our plugin where it is absent (4 GB), then runs its tests:
# every format through the plugin, and a whole cluster through `qsun up`.
#   PYTHON             qsun's own environment (default: .venv/bin/python)
#   QSUN_ORACLES_DIR   where the environment is, or is made, as vllm/ (default: .oracles)
# Further arguments go to pytest: tests/vllm/run.sh -k cluster
set -euo pipefail
cd "$(dirname "$0")/../.."
ORACLES=vllm exec tests/oracles/run.sh tests/vllm tests/oracles/test_vllm_plugin.py "$@"
