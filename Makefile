# A fresh machine: `make setup` once, then the rest. PYTHON chooses the environment.
PYTHON ?= .venv/bin/python
TORCH ?= torch==2.13.0
PYTEST_WORKERS ?= 2
PYTEST = $(PYTHON) -m pytest -q -n $(PYTEST_WORKERS) --dist worksteal
GPU_OUT ?= out/gpu
DEMO_BENCH = demo --calib qsun/demo/calibration.txt --valid out/held-out.txt --seq-len 256 --windows 32


.PHONY: setup demo test fast lint bench oracles vllm gpu

setup:  ## install qsun and its tools into PYTHON's environment (made where it does not exist)
	test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -m pip install -q $(TORCH)
	$(PYTHON) -m pip install -q -e '.[dev]'

demo:  ## quantize the embedded model
	rm -rf out/demo-int4
	$(PYTHON) -m qsun.cli.main quantize demo -o out/demo-int4

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

oracles:  ## other tools load our modules and give our logits; makes .oracles/* environments (gigabytes)
	tests/oracles/run.sh

vllm:  ## a real vLLM on this CPU: the plugin in every format, and a cluster through `qsun up`; makes .oracles/vllm
	tests/vllm/run.sh

gpu:  ## correctness on a CUDA device and the kernel bench, under 9 minutes; needs torch, triton, transformers, pytest
	mkdir -p $(GPU_OUT)
	$(PYTHON) -m pytest -q --noconftest -m gpu tests/gpu --junitxml=$(GPU_OUT)/tests.xml; status=$$?; \
	$(PYTHON) tests/gpu/bench.py $(GPU_OUT) && exit $$status
