# `make demo` and `make test` do the whole set-up from a bare checkout. Nothing is written outside of it.
#
#   make demo PYTHON=python3.12          another interpreter
#   make demo TORCH_INDEX=URL            another index for torch alone, such as PyTorch's own for one CUDA version
#   make test WORKERS=8                  more test processes (one torch thread each)

PYTHON ?= python3
WORKERS ?= 2
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test test-cuda soak lint format clean

help:
	@echo "make demo       train on real digits, then print the test accuracy and the TensorBoard address"
	@echo "make test       all tests, on the CPU"
	@echo "make test-cuda  those that need a CUDA device"
	@echo "make soak       500 random runs against a naive second implementation, 22,000 healthy steps without a fault"
	@echo "make lint       ruff, mypy --strict, import order, Dockerfile"
	@echo "make format     let ruff format and mend what it can"
	@echo "make clean      remove the virtual environment, caches and build output; runs/ stays"

demo: $(VENV)/.examples
	$(BIN)/safeloop train configs/digits.yaml

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-cuda: $(VENV)/.dev
	SAFELOOP_TEST_DEVICE=cuda $(BIN)/python -m pytest -m cuda

soak: $(VENV)/.dev
	OMP_NUM_THREADS=1 SAFELOOP_SOAK=1 $(BIN)/python -m pytest -n $(WORKERS) tests/oracle tests/audit/test_healthy_runs.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist htmlcov .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.examples: pyproject.toml constraints.txt
	@echo "setting up $(VENV): $(TORCH) (about 200 MB) and what safeloop needs"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@$(PIP) install -c constraints.txt -e '.[examples]'
	@touch $@

$(VENV)/.dev: $(VENV)/.examples
	@echo "setting up $(VENV): what tests and checks need"
	@$(PIP) install -c constraints.txt -e '.[examples,multitask,dev]'
	@touch $@
