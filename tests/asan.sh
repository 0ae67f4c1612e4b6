#!/usr/bin/env bash
# Builds the modules with the address sanitizer into a temporary folder, and runs the tests of memory layouts and of
# changes between steps with them. Of the CPU kernels it builds the instruction set that the tests use here.
set -euo pipefail
cd "$(dirname "$0")/.."
repo=$PWD
PY=${PY:-python3}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

isa=$("$PY" -c 'from fused_optim.engine.modules import instruction_sets; print(instruction_sets()[0])')
FUSED_OPTIM_ISAS=$isa FUSED_OPTIM_DEBUG=1 FUSED_OPTIM_CPP=1 "$PY" setup.py --quiet build_ext --build-temp "$out/tmp" --build-lib "$out/lib" > "$out/log" 2>&1 || { cat "$out/log"; exit 1; }
cp -r fused_optim/*.py fused_optim/{backends,cost,engine,interop,optim,recipes} "$out/lib/fused_optim/"
cp -r triton_kernels "$out/lib/fused_optim/triton_kernels"

# Python itself is not sanitized, so the sanitizer's library must be preloaded. Python does not free all memory at exit, so
# leak reports would be meaningless.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$out/lib" FUSED_OPTIM_CUDA_EMULATE=1
cd "$out"  # keeps Python from importing the checkout's own build
"$PY" -c 'import fused_optim, sys; assert fused_optim.__file__.startswith(sys.argv[1]), fused_optim.__file__' "$out"
"$PY" -m pytest -q -c "$repo/pyproject.toml" --rootdir "$repo" -p no:cacheprovider \
  "$repo/tests/test_layouts.py" "$repo/tests/test_changes.py" "$repo/tests/test_looks.py" "$repo/tests/test_robust.py" -k "not fork and not import and not module"
