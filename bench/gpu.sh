#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command: build, tests on the device, closeness to torch's fused kernel,
# the sanitizer, benchmarks. Uses the torch that $PYTHON has, installs nothing but this package, and writes all output
# to bench/results/<gpu>/.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

gpu=$("$PYTHON" -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))' 2>/dev/null)
if [ -z "$gpu" ]; then
  echo "make gpu: $PYTHON has no torch that sees a GPU on this machine (python -m fused_optim says more)" >&2
  exit 2
fi
out=bench/results/$gpu
mkdir -p "$out"
failed=0

part() { # part NAME COMMAND...: runs it, keeps its output, and goes on after a failure
  local name=$1
  shift
  echo "== $name: $*"
  "$@" > "$out/$name.txt" 2>&1 || { failed=1; echo "   failed, see $out/$name.txt"; }
  tail -n 5 "$out/$name.txt"
}

part build env FUSED_OPTIM_CUDA=1 "$PYTHON" -m pip install --no-build-isolation --no-deps --editable .
part environment "$PYTHON" -m fused_optim
part tests "$PYTHON" -m pytest -q -s tests/test_gpu.py tests/test_triton_kernels.py tests/test_triton_sums.py
part tests-all-backends env FUSED_OPTIM_TEST_BACKENDS=triton,cuda "$PYTHON" -m pytest -q tests
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck initcheck racecheck; do
    part "sanitizer-$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" bench/small_step.py
  done
else
  echo "== sanitizer: compute-sanitizer is not installed" | tee "$out/sanitizer.txt"
fi
part host "$PYTHON" bench/host.py --device cuda --json "$out/host.json"
part step "$PYTHON" bench/step.py --suite gpu
part step-family "$PYTHON" bench/step.py --suite gpu-family
part update "$PYTHON" bench/update.py --device cuda
exit $failed
