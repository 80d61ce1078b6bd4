# Every target sets up what it needs, in an environment of its own, .venv, made from PYTHON.
PYTHON ?= python3
VENV := .venv/bin/python
PYTEST = $(VENV) -m pytest

.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-gpu bench check clean extension

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: extension ## a small model with adapters, from injection to merge
	$(VENV) examples/demo.py

# $(call workers,N): N test processes, where pytest-xdist is installed: a GPU machine may not have it.
workers = $$($(VENV) -c 'import importlib.util as u; print("-n $(1)" if u.find_spec("xdist") else "")')

test: extension ## the quick suite, without a GPU
	$(PYTEST) tests $(call workers,2)
	@echo "make test: all tests passed"

test-full: extension ## the quick suite's slow half: every planted fault, sanitizers, every configuration
	FUSED_LORA_EXTENT=full $(PYTEST) tests -n 2 -m "slow or extent"
	@echo "make test-full: all tests passed"

# The kernels that Triton compiles are kept where another machine of this kind can be given them.
test-gpu: export TRITON_CACHE_DIR ?= $(CURDIR)/build/triton
test-gpu: extension ## the correctness suite on a CUDA device
	FUSED_LORA_TEST_DEVICE=cuda $(PYTEST) tests -m "numeric or gpu" $(call workers,8)
	@echo "make test-gpu: all tests passed on the GPU"

bench: extension ## the microbenchmarks
	$(PYTEST) bench

check: .venv/stamp ## lint, format and types
	$(VENV) -m ruff check
	$(VENV) -m ruff format --check
	$(VENV) -m mypy

clean: ## remove the environment and everything built
	rm -rf .venv build dist python/*.egg-info python/fused_lora/_C.abi3.so
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks

.venv/stamp: .ci/venv requirements.txt pyproject.toml setup.py
	.ci/venv $(PYTHON)
	@touch $@

# ninja rebuilds what changed in csrc/; without nvcc this says why there is no extension.
extension: .venv/stamp
	@$(VENV) setup.py --quiet build_ext --inplace
