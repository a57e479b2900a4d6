PYTHON      ?= python3
PYTEST_ARGS ?=
DEMO_ARGS   ?=
COMPILE_ARGS ?=

BIN   := .venv/bin
STAMP := .venv/.installed
PIP   := $(BIN)/python -m pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install demo test test-gpu check compile-check clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## set up .venv with everything the other targets need (they do it themselves)

demo: $(STAMP) ## run the demonstration (DEMO_ARGS="--help" lists its options)
	$(BIN)/brn demo $(DEMO_ARGS)

# One thread a worker: the workers already fill the cores.
test: $(STAMP) ## run the tests (PYTEST_ARGS="-k name" selects some)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 $(PYTEST_ARGS)

test-gpu: $(STAMP) ## run all tests on the GPU
	$(BIN)/python -m pytest --device cuda $(PYTEST_ARGS)

compile-check: $(STAMP) ## compile all Triton kernels for GPUs, without one: registers, spills, access widths
	$(BIN)/python scripts/compile_check.py $(COMPILE_ARGS)

check: $(STAMP) ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove all that make created, .venv included
	rm -rf .venv build dist brn-demo .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A finished environment is updated in place, anything else is built anew. The stamp goes first and comes back last, so
# an interrupted install never counts. pip does not apply -c to isolated builds: hence the pinned setuptools beforehand.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'Python 3.11 or later is needed, and "$(PYTHON)" is not: name one with make PYTHON=python3.12' >&2; exit 1; }
	@echo "Setting up .venv: the first time takes some minutes"
	@if [ -e $@ ]; then rm $@; else $(PYTHON) -m venv --clear .venv; fi
	$(PIP) install -c constraints.txt setuptools wheel
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[demo,bench,dev]'
	@touch $@
