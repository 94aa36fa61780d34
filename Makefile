# What there is to do with this repository. Each target sets up all that it needs.
#
#   make demo        train an embedding on real digit scans, print a table, draw pictures into demo-output/
#   make demo-compare  the same network by every mining strategy and several margins: a table, a picture
#   make test        build, and run every test, on all cores
#   make attack      the numeric tests with fresh seeds, on each instruction set, for MINUTES=3; prints what reproduces
#   make simt        the CUDA kernels on the CPU, every rule of CUDA checked (part of make test)
#   make test-cuda-on-cpu  tests of the operators on the CUDA path, kernels and all, in host memory
#   make simt-mutants  takes each barrier and wait out of them: is it missed?
#   make bench       the benchmarks; writes benchmarks/results/ and the tables in README.md and docs/benchmarks.md
#   make bench-quick the same in two minutes, writing nothing
#   make cuda-check  the CUDA kernels compiled without a GPU: no warning, no spill, and the tables of docs/kernels.md
#   make gpu-report  where a GPU and torch are: builds in place, tests, measures; writes OUT=benchmarks/results
#   make lint        ruff, mypy, clang-format
#   make format      let ruff and clang-format rewrite
#   make clean       remove all that was made
#
# TORCH=torch==2.13.0 chooses a torch, VENV=DIR a place for it, TRIPLET_EXT_BUILD=none what is compiled.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
OUT ?= benchmarks/results
MINUTES ?= 3
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

PYTEST := $(BIN)/pytest -n $(JOBS) --dist worksteal
LINT := ruff==0.17.6 clang-format==23.1.5 mypy==2.4.1

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CPP := $(SOURCES) $(shell find tests/simt -name '*.cpp' -o -name '*.h')
PACKAGE := setup.py pyproject.toml $(SOURCES) $(wildcard triplet_ext/*.py triplet_ext/*/*.py)

.PHONY: demo demo-compare test test-cuda-on-cpu attack simt simt-mutants bench bench-quick table cuda-check gpu-report lint format clean

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q '$(TORCH)'
	$(PIP) install -q 'setuptools>=77' wheel ninja pybind11 numpy
	@touch $@

# The torch that is there must build the extension, hence no build isolation.
$(VENV)/.package: $(VENV)/.torch $(PACKAGE)
	$(PIP) install -q --no-build-isolation '.[test]'
	@touch $@

$(VENV)/.bench: $(VENV)/.package
	$(PIP) install -q --no-build-isolation '.[bench]'
	@touch $@

$(VENV)/.lint: $(VENV)/.torch
	$(PIP) install -q $(LINT)
	@touch $@

demo: $(VENV)/.package
	$(BIN)/python examples/digits.py

demo-compare: $(VENV)/.package
	$(BIN)/python examples/compare.py

# Else a process whose threads wait for each other keeps them spinning, and the processes beside it wait for a core.
test test-cuda-on-cpu attack simt: export OMP_WAIT_POLICY = PASSIVE

test: $(VENV)/.package
	$(PYTEST)

attack: $(VENV)/.package
	$(BIN)/python tests/attack.py --minutes $(MINUTES) --jobs $(JOBS)

simt: $(VENV)/.package
	$(PYTEST) tests/simt

# Those that pass there; others meet what docs/semantics.md says of CUDA.
CUDA_ON_CPU ?= $(patsubst %,tests/test_%.py,cuda_on_cpu explicit indexed memory_bank reductions_stats)

test-cuda-on-cpu: $(VENV)/.package
	$(PYTEST) --cuda-on-cpu plain $(CUDA_ON_CPU)

simt-mutants: $(VENV)/.package
	$(BIN)/python -m tests.simt.mutants

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks

bench-quick: $(VENV)/.bench
	$(BIN)/python -m benchmarks --quick

cuda-check:
	$(PYTHON) tests/cuda_check.py

gpu-report:
	$(PYTHON) -m benchmarks.gpu_report --output '$(OUT)'

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf .venv* build *.egg-info demo-output .pytest_cache .hypothesis .mypy_cache .ruff_cache
	rm -f triplet_ext/_C*.so triplet_ext/_build.json
	find . -name __pycache__ -prune -exec rm -rf {} +
