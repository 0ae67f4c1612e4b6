#!/usr/bin/env bash
# Everything that only a GPU can tell, in parts that end within nine minutes each:
#
#     bench/gpu.sh                    all parts, in the order of their value
#     bench/gpu.sh build step         these
#     DRY=1 bench/gpu.sh step         without a GPU: as far as it goes on stand-ins
#
#   build       builds the package, says what is here, runs tests/test_gpu*.py and the tests of the Triton kernels
#   step        AdamW in four cases, graph replay and host time among them
#   grid        the grid of bench/results (bench/step.py --suite gpu)
#   family      the other optimizers (--suite gpu-family)
#   update      the whole update against torch's composition of it
#   sanitizers  compute-sanitizer: memcheck, initcheck, racecheck
#   suite       all tests that step on a backend, eight at a time
#
# A part that has ended is not run again (FORCE=1: it is). One that was cut off continues when called again: commands that
# have ended are not repeated, and benchmarks continue after the last case.
# All output goes to $OUT, else to bench/results/<gpu>; after each part $OUT/results.tar.gz holds all of it. FROM: such an
# archive of an earlier call, for a machine that has not kept $OUT. Every part builds the package if this was not done yet.
# $PYTHON is a Python that has torch; nothing is installed but this package, and nothing is downloaded. LIMIT: seconds for
# each part.
# COMPILED=1 adds torch.compile to the peers, which takes minutes for each case. FUSED_OPTIM_COMMIT: what is measured, where
# there is no .git.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3} DRY=${DRY:-} LIMIT=${LIMIT:-520}
PARTS=(build step grid family update sanitizers suite)
DEVICE=cuda
[ -n "$DRY" ] && DEVICE=cpu

say() { echo "== $*"; }

dry() { # dry SENTENCE: what this part cannot show here
  [ -n "$DRY" ] && say "dry run: $*"
  return 0
}

run() { # run NAME COMMAND...: keeps its output in $OUT/NAME.txt, and remembers a failure
  local name=$1 ended=$OUT/ended/$part.$1 status=0
  shift
  if [ -e "$ended" ] && [ -z "${FORCE:-}" ]; then
    say "$name has ended before, with status $(cat "$ended")"
    [ "$(cat "$ended")" = 0 ] || failed=1
    return
  fi
  say "$name: $*"
  "$@" > "$OUT/$name.txt" 2>&1 || status=$?
  echo $status > "$ended"
  if [ $status != 0 ]; then
    failed=1
    say "$name failed, see $OUT/$name.txt"
  fi
  tail -n 5 "$OUT/$name.txt"
}

build() { # for the GPU of this machine alone, where this has not been done
  if [ -e fused_optim/_build.json ] && ! [ "$part" = build -a -n "${FORCE:-}" ]; then return; fi
  local cuda=1
  command -v "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" > /dev/null || {
    cuda=0
    say "there is no nvcc: the backend \"cuda\" is left out"
  }
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')}
  export TORCH_CUDA_ARCH_LIST
  rm -f "$OUT/ended/$part.build" # of a machine before this one
  run build env FUSED_OPTIM_CPP=1 FUSED_OPTIM_CUDA=$cuda "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index --editable .
}

has() { # has MODULE WHAT: whether Python has it; else says what is left out
  "$PYTHON" -c "import $1" 2> /dev/null && return 0
  say "$PYTHON has no $1: $2"
  return 1
}

pytest_() { "$PYTHON" -m pytest -q -p no:cacheprovider "$@"; }

part_build() {
  dry "nothing is built; the Triton kernels run in the interpreter of PTX, and tests/test_gpu*.py are skipped"
  run environment "$PYTHON" -m fused_optim
  has pytest "its tests are left out" || return
  local by_hand=(tests/test_triton_kernels.py tests/test_triton_sums.py)
  if [ -n "$DRY" ]; then
    run tests env FUSED_OPTIM_TEST_BACKENDS=triton-ptx "$PYTHON" -m pytest -q -s tests/test_gpu.py tests/test_gpu_lifetimes.py "${by_hand[@]}" -k "gpu or rules"
  else
    run tests-gpu pytest_ -s tests/test_gpu.py
    run tests-kernels pytest_ "${by_hand[@]}"
    run tests-lifetimes pytest_ tests/test_gpu_lifetimes.py
  fi
}

part_step() {
  dry "there is no device time and no graph replay, and two small cases stand for the four"
  local cases=one-tensor-100m,gpt2-124m,resnet50,10000x64 counts=1,10,148,500,2000,20000 options=(--graph)
  [ -n "$DRY" ] && cases=resnet50,465x1000 counts=1,148 options=(--rounds 10)
  run step "$PYTHON" bench/step.py --device $DEVICE --case $cases --peers "$(peers)" "${options[@]}" --json "$OUT/step.json" --resume
  run host "$PYTHON" bench/host.py --device $DEVICE --tensors $counts --json "$OUT/host.json"
}

part_grid() { suite gpu "the grid"; }

part_family() { suite gpu-family "the family"; }

suite() { # suite NAME WHAT
  if [ -n "$DRY" ]; then
    dry "bench/step.py says that there is no GPU; $2 is checked for what it names, and one of its cases is run on the CPU"
    run "step-$1-names" "$PYTHON" -c "import sys; sys.path.insert(0, 'bench'); from suites import SUITES; print(*SUITES['$1'].configs, sep='\n')"
    run "step-$1" "$PYTHON" bench/step.py --device cpu --optimizer "$([ "$1" = gpu ] && echo adamw || echo lamb)" \
      --case 465x1000 --rounds 10 --json "$OUT/step-$1.json" --resume
  else
    run "step-$1" "$PYTHON" bench/step.py --suite "$1" --peers "$(peers)" --out "$OUT" --resume
  fi
}

peers() { # all of the suites', torch.compile where it is asked for
  local names=torch-foreach,torch-fused,foreach,qhoptim,ours-triton,ours-cuda,optimi,apex,apex-sgd-lamb,bitsandbytes,flashoptim,torchao-8bit
  [ -n "$DRY" ] && names=torch-foreach,torch-fused,ours
  echo "$names${COMPILED:+,torch-compile}"
}

part_update() {
  dry "times are those of a CPU, of one case"
  if [ -n "$DRY" ]; then
    run update "$PYTHON" bench/update.py --case resnet50 --dtype float32 --feature clip --rounds 3 --out "$OUT" --resume
  else
    run update "$PYTHON" bench/update.py --device cuda --out "$OUT" --resume
  fi
}

part_sanitizers() {
  dry "compute-sanitizer needs a GPU; every access of the compiled kernels is checked by tests/ptx instead, for one rule here"
  if [ -n "$DRY" ]; then
    run sanitizers env FUSED_OPTIM_TEST_BACKENDS=triton-ptx,cuda-ptx "$PYTHON" -m pytest -q tests/test_layouts.py -k "sizes and ptx and lion"
    return
  fi
  if ! command -v compute-sanitizer > /dev/null; then
    say "compute-sanitizer is not installed, so nothing is checked by it"
    return
  fi
  for tool in memcheck initcheck racecheck; do
    # Within the caching allocator's blocks the tools see nothing.
    run "sanitizer-$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool $tool --error-exitcode 1 "$PYTHON" bench/small_step.py
  done
}

part_suite() {
  dry "the tests step on the compiled kernels in the interpreter, those alone that make test runs on them"
  has pytest "the suite is left out" || return
  has hypothesis "test_layouts.py, which draws its examples with it, is left out"
  local jobs=()
  has xdist "one test at a time" && jobs=(-n "$([ -n "$DRY" ] && echo 2 || echo 8)")
  if [ -n "$DRY" ]; then
    run suite env FUSED_OPTIM_TEST_BACKENDS=triton-ptx,cuda-ptx "$PYTHON" -m pytest -q "${jobs[@]}" tests -m compiled
  else
    run suite env FUSED_OPTIM_TEST_BACKENDS=triton,cuda "$PYTHON" -m pytest -q "${jobs[@]}" tests -m backend
  fi
}

if [ "${1:-}" = --inside ]; then # a part, under its time limit
  failed=0 part=$2
  [ -n "$DRY" ] || build
  "part_$part"
  exit $failed
fi

for part in "$@"; do
  if ! [[ " ${PARTS[*]} " = *" $part "* ]]; then
    echo "bench/gpu.sh: there is no part $part; there are ${PARTS[*]}" >&2
    exit 2
  fi
done
if [ -n "$DRY" ]; then
  gpu=dry-run
else
  gpu=$("$PYTHON" -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))' 2> /dev/null)
  if [ -z "$gpu" ]; then
    echo "bench/gpu.sh: $PYTHON has no torch that sees a GPU on this machine (python -m fused_optim says more)" >&2
    exit 2
  fi
fi
export OUT=${OUT:-bench/results/$gpu}
mkdir -p "$OUT/done" "$OUT/ended"
OUT=$(cd "$OUT" && pwd)
if [ -n "${FROM:-}" ] && [ ! -e "$OUT/results.tar.gz" ]; then
  tar -xzf "$FROM" -C "$OUT" || exit 2
fi
failed=0
for part in "${@:-${PARTS[@]}}"; do
  if [ -e "$OUT/done/$part" ] && [ -z "${FORCE:-}" ]; then
    say "$part has been done ($OUT/done/$part)"
    continue
  fi
  begin=$SECONDS
  timeout --kill-after 15 "$LIMIT" bash "$0" --inside "$part" 2>&1 | tee "$OUT/$part.log"
  status=${PIPESTATUS[0]}
  if [ "$status" = 124 ] || [ "$status" = 137 ]; then
    say "$part was cut off after $LIMIT s; call it again, and it goes on"
    failed=1
  else
    echo "$(date -u +%FT%TZ), $((SECONDS - begin)) s, status $status" > "$OUT/done/$part"
    [ "$status" = 0 ] || failed=1
  fi
  tar -czf "$OUT/.results.tar.gz" -C "$OUT" --exclude ./.results.tar.gz --exclude ./results.tar.gz . && mv "$OUT/.results.tar.gz" "$OUT/results.tar.gz"
done
exit $failed
