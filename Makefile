# A fresh machine: `make setup` once, then the rest. PYTHON chooses the environment.
PYTHON ?= .venv/bin/python
TORCH ?= torch==2.13.0
PYTEST_WORKERS ?= 2
# Passive: torch's idle threads sleep. By default they spin, five times the CPU time of what two threads compute.
PYTEST = OMP_WAIT_POLICY=passive $(PYTHON) -m pytest -q -n $(PYTEST_WORKERS) --dist worksteal
GPU_OUT ?= out/gpu
DEMO_BENCH = demo --calib qsun/demo/calibration.txt --valid out/held-out.txt --seq-len 256 --windows 32
REAL_OUT ?= out/real
REAL_BASE ?= HuggingFaceTB/SmolLM2-135M-Instruct
REAL_DATA ?= $(REAL_OUT)/data
REAL_ARGS ?=
REAL_GRID = --methods refined --group-size 64 --sym --bits 4,3,2 --dtype bfloat16
REAL_BUDGET = --seeds 1 --steps 200 --rates 3e-4,1e-3 --curve "" --align-steps 40 --align-share 0.1 --batch-size 16 --valid 64 --samples 1024 --no-text
REAL_TASK = --task $(1)=$(REAL_DATA)/$(1)-train.jsonl,$(REAL_DATA)/$(1)-valid.jsonl,$(REAL_DATA)/$(1)-test.jsonl,$(2)


.PHONY: setup demo test fast lint bench real oracles vllm gpu

setup:  ## install qsun and its tools into PYTHON's environment (made where it does not exist)
	test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -m pip install -q $(TORCH)
	$(PYTHON) -m pip install -q -e '.[dev]'

demo:  ## quantize the embedded model
	rm -rf out/make-demo
	$(PYTHON) -m qsun.cli.main quantize demo -o out/make-demo

test:  ## everything that needs no other tool and no GPU
	$(PYTEST) -m 'not gpu and not oracle'

fast:  ## the same without the slow ones
	$(PYTEST) -m 'not gpu and not oracle and not slow'

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench:  ## KL and CPU seconds of every pass on the embedded base; BENCH="MODEL --calib ... --valid ..." for another
	mkdir -p out
	$(PYTHON) -c "from qsun.demo.corpus import calibration_text as t; print(t(9), end='')" > out/held-out.txt
	$(PYTHON) -m qsun.cli.main bench passes $(or $(BENCH),$(DEMO_BENCH))

real: $(REAL_DATA)/snips-train.jsonl  ## docs/results/real: hours on a CPU; stop and resume it at will; REAL_ARGS=--dry-run: what is left
	$(PYTHON) -m qsun.cli.main bench tasks -o $(REAL_OUT)/study --base $(REAL_BASE) $(call REAL_TASK,snips,json) \
		$(call REAL_TASK,django,exact) $(call REAL_TASK,svamp,expression) $(REAL_GRID) $(REAL_BUDGET) $(REAL_ARGS)

$(REAL_DATA)/snips-train.jsonl:
	mkdir -p $(REAL_OUT)
	test -d $(REAL_OUT)/snips || git clone -q --depth 1 https://github.com/sonos/nlu-benchmark $(REAL_OUT)/snips
	test -d $(REAL_OUT)/django || git clone -q --depth 1 https://github.com/odashi/ase15-django-dataset $(REAL_OUT)/django
	test -d $(REAL_OUT)/svamp || git clone -q --depth 1 https://github.com/arkilpatel/SVAMP $(REAL_OUT)/svamp
	$(PYTHON) -m qsun.cli.main bench task-data -o $(REAL_DATA) --snips $(REAL_OUT)/snips --django $(REAL_OUT)/django \
		--svamp $(REAL_OUT)/svamp

oracles:  ## other tools load our modules and give our logits; makes .oracles/* environments (gigabytes)
	tests/oracles/run.sh

vllm:  ## a real vLLM on this CPU: the plugin in every format, and a cluster through `qsun up`; makes .oracles/vllm
	tests/vllm/run.sh

gpu:  ## everything on a CUDA device in one call under 9 minutes, results in GPU_OUT; wheels: tests/gpu/wheels.py
	$(PYTHON) tests/gpu/bench.py $(GPU_OUT) $(GPU)
