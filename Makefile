PYTHON      ?= python3
PYTEST_ARGS ?=
DEMO_ARGS   ?=
COMPILE_ARGS ?=
BUILD_ARGS  ?=
BENCH_ARGS  ?=
EXPERIMENT_ARGS ?=

BIN   := .venv/bin
STAMP := .venv/.installed
BUILT := brn_kernels/_native/.built
PIP   := $(BIN)/python -m pip --quiet --disable-pip-version-check
CSRC  := $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

.DEFAULT_GOAL := help
.PHONY: help install build demo test test-gpu sanitize bench docs-bench experiments docs-experiments \
    compile-check wheel-check check clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) $(BUILT) ## set up .venv with everything the other targets need (they do it themselves)

build: $(STAMP) ## compile the native backend into the checkout (BUILD_ARGS="--help" lists its options)
	$(BIN)/brn build --in-place $(BUILD_ARGS)

demo: $(STAMP) ## run the demonstration (DEMO_ARGS="--help" lists its options)
	$(BIN)/brn demo $(DEMO_ARGS)

# One thread a worker: the workers already fill the cores.
test: $(STAMP) $(BUILT) ## run the tests (PYTEST_ARGS="-k name" selects some)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:benchmark -n auto --maxprocesses 8 $(PYTEST_ARGS)

test-gpu: $(STAMP) $(BUILT) ## run all tests on the GPU
	$(BIN)/python -m pytest --device cuda $(PYTEST_ARGS)

# Python itself is not compiled with it, so AddressSanitizer is loaded before all else, and with it the C++ library, whose
# `throw` it intercepts.
sanitize: $(STAMP) ## run the tests of native loops and calls in C++ under AddressSanitizer and UBSan
	$(BIN)/brn build --sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 BRN_KERNELS_SANITIZE=1 OMP_NUM_THREADS=2 \
	    $(BIN)/python -m pytest -p no:benchmark -n auto --maxprocesses 8 -k "native or node or (operators and not inductor)" $(PYTEST_ARGS)

# Saved, so that a change can be compared: BENCH_ARGS="--benchmark-compare"
bench: $(STAMP) $(BUILT) ## the developer's quick check of speed (BENCH_ARGS="--every-layer -k both" selects; `brn bench` is the real one)
	$(BIN)/python -m pytest bench --benchmark-autosave --benchmark-columns=median,iqr,rounds $(BENCH_ARGS)

docs-bench: $(STAMP) ## write docs/benchmarks.md and README's table from the CSVs in bench/results
	$(BIN)/python -m bench.docs

experiments: $(STAMP) $(BUILT) ## when does it help? go on measuring where the recorded runs end (EXPERIMENT_ARGS="b --fresh": one anew)
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments $(EXPERIMENT_ARGS)

docs-experiments: $(STAMP) ## write docs/when-to-use.md and its figures from the CSVs in experiments/results
	$(BIN)/python -m experiments --docs

compile-check: $(STAMP) ## compile all Triton kernels for GPUs, without one: registers, spills, access widths
	$(BIN)/python -m scripts.compile_check $(COMPILE_ARGS)

wheel-check: $(STAMP) ## build a wheel with the native backend and try it in an empty environment
	scripts/wheel_check.sh $(BIN)/python

check: $(STAMP) ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC) bench/idle_device.cpp tests/cuda_driver.c

clean: ## remove all that make created, .venv included
	rm -rf .venv brn_kernels/_native build dist *.egg-info
	rm -rf brn-demo .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Without a compiler everything else still works, so that is no error here; `make build` makes it one.
$(BUILT): $(STAMP) $(CSRC) $(wildcard brn_kernels/build/*.py)
	@$(BIN)/brn build --in-place && touch $@ || \
	    echo 'Note: no native backend, for the reason above. Everything else works; `make build` tries again.' >&2

# A finished environment is updated in place, anything else is built anew. The stamp goes first and comes back last, so
# an interrupted install never counts. pip does not apply -c to isolated builds: hence the pinned setuptools beforehand.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'Python 3.11 or later is needed, and "$(PYTHON)" is not: name one with make PYTHON=python3.12' >&2; exit 1; }
	@echo "Setting up .venv: the first time takes some minutes"
	@if [ -e $@ ]; then rm $@; else $(PYTHON) -m venv --clear .venv; fi
	$(PIP) install -c constraints.txt setuptools wheel
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[demo,bench,experiments,dev]'
	@touch $@
