# make demo   everything from nothing: environment, build, and a net trained with FusedAdamW beside torch's AdamW
# make test   everything from nothing: environment, build, all tests that need no GPU
# make test-ptx   the GPU kernels as they are compiled, run without a GPU by an interpreter: all tests that step on them
# make study  which optimizer trains best: searches, five seeds, tables and plots into bench/results/study/
# make docs   the documentation site, into site/; a broken link or reference fails it
# make compat TORCH="2.11.0 2.14.1"   the wheel, built with the present torch, tested with these; some 5 GB each
# make gpu    on a CUDA machine whose python3 has torch: build, tests, sanitizer, benchmarks into bench/results/; in parts
#             by PARTS="build step" (see bench/gpu.sh)
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest -q -n $(JOBS)
# The tests that go over every backend; the others would only repeat themselves.
ONCE := cuda_compile triton_compile walkers compile packaging docs pages trainers lightning timm lifetimes machine
NUMBERS := tests --ignore=tests/ptx $(ONCE:%=--ignore=tests/test_%.py)
PTX := triton-ptx,cuda-ptx
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: demo test test-ptx lint bench study docs gpu asan compat clean

demo: $(VENV)/built
	$(PY) demo.py

test: $(VENV)/built
	$(PYTEST) tests
	TRITON_INTERPRET=1 FUSED_OPTIM_TEST_BACKENDS=triton $(PYTEST) $(NUMBERS)
	FUSED_OPTIM_CUDA_EMULATE=1 FUSED_OPTIM_TEST_BACKENDS=cuda $(PYTEST) $(NUMBERS)
	FUSED_OPTIM_TEST_BACKENDS=$(PTX) $(PYTEST) $(NUMBERS) -m compiled
	FUSED_OPTIM_ISA=baseline $(PYTEST) tests/test_numbers.py -k cpp
	$(MAKE) asan

# A part of it is in `test`.
test-ptx: $(VENV)/built
	FUSED_OPTIM_TEST_BACKENDS=$(PTX) $(PYTEST) $(NUMBERS) -k "ptx or triton_kernels or triton_sums"

# The modules built with the address sanitizer, under the tests that move memory about.
asan: $(VENV)/built
	PY=$(abspath $(PY)) bash tests/asan.sh

compat: $(VENV)/built
	PY=$(abspath $(PY)) JOBS=$(JOBS) bash tests/compat.sh $(TORCH)

lint: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(shell git ls-files 'csrc/**' 'tests/cpp/*' 'tests/ptx/native/*' 'bench/*.cpp')
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
