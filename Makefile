# Everything a user or CI runs. `make` alone prints this list.
.DEFAULT_GOAL := help
.PHONY: help setup repro test test-slow check smoke gpu-check clean

PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export OMP_WAIT_POLICY ?= passive

help:  ## print the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/ready-dev  ## build the environment in .venv, pinned by constraints.txt

# torch first and by itself: any other order lets a dependency choose another build of it
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e .
	touch $@

# what tests and checks need on top
$(VENV)/ready-dev: $(VENV)/ready
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

repro: $(VENV)/ready  ## run the pipeline: `dvc repro` with params.yaml
	dvc repro

test: setup  ## run the tests that take seconds
	python -m pytest

test-slow: setup  ## run the tests that take minutes
	python -m pytest -m 'slow and not gpu'

check: setup  ## lint, formatting and types
	ruff check .
	ruff format --check .
	mypy

smoke: setup  ## run the whole pipeline on the smoke preset in a temporary clone
	./tests/smoke.sh

gpu-check: setup  ## on a machine with a GPU: tests, sanitizer, measurements, the smoke pipeline; 8 minutes
	python benchmarks/gpu_check.py

clean:  ## remove unfinished training runs and caches of the tools; data and models stay
	rm -rf .inflight .mypy_cache .ruff_cache .pytest_cache .hypothesis
