# Each target creates the environment and builds the package first where it needs them.
# make demo   trains a net twice, with FusedAdamW and with torch's AdamW, and compares the two
# make test   runs all tests that need no GPU
# make quick  runs tests of every optimizer, errors, checkpoints, clipping, EMA and layouts, in a minute; chosen by markers
# make test-ptx   runs all tests that step on the compiled GPU kernels; an interpreter executes the kernels on the CPU
# make lint   checks style and types
# make bench  times the optimizer steps on this CPU; results go to bench/results/
# make study  compares how well the optimizers train: searches, five seeds, tables and plots in bench/results/study/
# make docs   builds the documentation site in site/; a broken link or reference is an error
# make compat TORCH="2.11.0 2.14.1"   builds the wheel with the installed torch and tests it with these; about 5 GB each
# make compat-triton TRITON="3.5.1 3.6.0 3.9.0"   compiles the Triton kernels ahead of time with these; 0.5 GB each
# make gpu    for a machine with a CUDA GPU whose python3 has torch: build, tests, sanitizer, and benchmarks into
#             bench/results/; PARTS="build step" selects parts (see bench/gpu.sh)
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
TRITON ?= 3.5.1 3.6.0 3.9.0
PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest -q -n $(JOBS)
PTX := triton-ptx,cuda-ptx
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: demo test quick test-ptx lint bench study docs gpu asan compat compat-triton clean

demo: $(VENV)/built
	$(PY) demo.py

quick: $(VENV)/built
	$(PYTEST) tests -m "not (slow or distributed or trainers or codegen)"

test: $(VENV)/built
	FUSED_OPTIM_CUDA_EMULATE=1 $(PYTEST) tests
	TRITON_INTERPRET=1 FUSED_OPTIM_TEST_BACKENDS=triton $(PYTEST) tests -m backend
	FUSED_OPTIM_TEST_BACKENDS=$(PTX) $(PYTEST) tests -m compiled
	FUSED_OPTIM_ISA=baseline $(PYTEST) tests/test_numbers.py -k cpp
	$(MAKE) asan

# `test` runs a part of these tests: those marked `compiled`.
test-ptx: $(VENV)/built
	FUSED_OPTIM_TEST_BACKENDS=$(PTX) $(PYTEST) tests -m backend

# Builds the modules with the address sanitizer, and runs the tests of memory layouts and of changes between steps.
asan: $(VENV)/built
	PY=$(abspath $(PY)) bash tests/asan.sh

compat: $(VENV)/built
	PY=$(abspath $(PY)) JOBS=$(JOBS) bash tests/compat.sh $(TORCH)

compat-triton: $(VENV)/built
	PY=$(abspath $(PY)) JOBS=$(JOBS) bash tests/triton_versions.sh $(TRITON)

lint: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(shell git ls-files 'csrc/**' 'tests/cpp/*' 'tests/ptx/native/*' 'bench/*.cpp' ':!*.py')
	$(PY) -m mypy

bench: $(VENV)/built
	$(PY) bench/step.py --suite cpu
	$(PY) bench/step.py --suite family

study: $(VENV)/built
	$(PY) bench/study.py

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "open site/index.html, or: $(PY) -m http.server --directory site"

gpu:
	PYTHON=$(PYTHON) bash bench/gpu.sh $(PARTS)

$(VENV)/installed: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	FUSED_OPTIM_CPP=1 $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf build dist *.egg-info fused_optim/*.so fused_optim/_build.json site $(VENV)
