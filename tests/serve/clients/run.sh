#!/usr/bin/env bash
# Real clients against `qsun serve`: chats, streams, tools, structured output, log-likelihoods and load. Not part of the
# default tests: it makes its own environments (2 GB) and takes minutes. Prints one line per client and a summary.
#   PYTHON             qsun's own environment (default: .venv/bin/python)
#   QSUN_ORACLES_DIR   where the environments are, or are made, as clients/ (default: .oracles)
#   SECONDS_EACH       time limit of a client (default: 240)
# Arguments name the clients to run: tests/serve/clients/run.sh openai openai-js
set -uo pipefail
cd "$(dirname "$0")/../../.."
PYTHON=$(command -v "${PYTHON:-.venv/bin/python}")
HERE=$PWD/tests/serve/clients
HOME_OF_CLIENTS=${QSUN_ORACLES_DIR:-$PWD/.oracles}/clients
WORK=$(mktemp -d)
export PYTHONPATH=$PWD OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

make_python() {
    "$PYTHON" -m venv "$HOME_OF_CLIENTS/venv"
    local pip="$HOME_OF_CLIENTS/venv/bin/pip install -q"
    # litellm 1.107 was a compromised release
    $pip openai 'litellm<1.107' mcp langchain-openai llama-index-llms-openai-like 'pydantic-ai-slim[openai]' instructor llm
    $pip torch==2.13.0 guidellm 'lm-eval[api]' transformers datasets
    $pip aiperf
}

make_npm() {
    mkdir -p "$HOME_OF_CLIENTS/npm"
    (cd "$HOME_OF_CLIENTS/npm" && npm init -y >/dev/null &&
        npm install --no-audit --no-fund openai@6 ai@6 @ai-sdk/openai-compatible@2 zod@4 >/dev/null)
}

[ -x "$HOME_OF_CLIENTS/venv/bin/aiperf" ] || make_python
[ -d "$HOME_OF_CLIENTS/npm/node_modules/ai" ] || make_npm
cp "$HERE"/*.mjs "$HOME_OF_CLIENTS/npm/"

"$PYTHON" "$HERE/module_with_tools.py" "$WORK/module" || exit 1
"$PYTHON" -m qsun.cli.main serve --decode "$WORK/module" --port 0 --json --threads 1 --dtype float32 \
    >"$WORK/ready.json" 2>"$WORK/serve.log" &
SERVER=$!
trap 'kill "$SERVER"; wait "$SERVER" 2>/dev/null; rm -rf "$WORK"' EXIT
until [ -s "$WORK/ready.json" ]; do
    kill -0 "$SERVER" 2>/dev/null || { cat "$WORK/serve.log"; exit 1; }
    sleep 0.5
done
QSUN_URL=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["url"])' "$WORK/ready.json")
export QSUN_URL QSUN_PYTHON=$PYTHON QSUN_MODULE=$WORK/module QSUN_WORK=$WORK

PASSED=0 FAILED=0
reason() { # LOG: its last error, or its last line
    { grep -E '^ *([A-Za-z_.]*(Error|Exception)|exit code [0-9]+)\b' "$1" || cat "$1"; } | tail -n 1 | cut -c 1-200
}

run() { # NAME COMMAND...
    local name=$1
    shift
    if timeout "${SECONDS_EACH:-240}" "$@" >"$WORK/$name.log" 2>&1; then
        printf '%-14s passed  %s\n' "$name" "$(tail -n 1 "$WORK/$name.log" | cut -c 1-90)"
        PASSED=$((PASSED + 1))
    else
        printf '%-14s failed  %s\n' "$name" "$(reason "$WORK/$name.log")"
        FAILED=$((FAILED + 1))
        [ -n "${KEEP_LOGS:-}" ] && cp "$WORK/$name.log" "$KEEP_LOGS/"
    fi
}

for client in "${@:-openai openai-js litellm langchain llama-index pydantic-ai instructor ai-sdk llm lm-eval aiperf guidellm}"; do
    for name in $client; do
        case $name in
        openai-js | ai-sdk) run "$name" node "$HOME_OF_CLIENTS/npm/${name//-/_}.mjs" ;;
        lm-eval | aiperf | guidellm | llm) run "$name" env PATH="$HOME_OF_CLIENTS/venv/bin:$PATH" "$HOME_OF_CLIENTS/venv/bin/python" "$HERE/tools_of_the_shell.py" "$name" ;;
        *) run "$name" "$HOME_OF_CLIENTS/venv/bin/python" "$HERE/libraries.py" "$name" ;;
        esac
    done
done
echo "$PASSED passed, $FAILED failed"
[ "$FAILED" = 0 ]
