#!/usr/bin/env bash
# Tests one wheel, built with the installed torch, under other versions of torch: compat.sh VERSION...
# Each version gets its own environment in $COMPAT (about 5 GB each, kept for the next run) with the unchanged wheel. Runs
# the tests of numbers, of changes between steps and of torch's contract.
set -euo pipefail
cd "$(dirname "$0")/.."
repo=$PWD
PY=${PY:-python3}
COMPAT=${COMPAT:-${TMPDIR:-/tmp}/fused_optim-compat}
[ $# -gt 0 ] || { echo 'which versions of torch? make compat TORCH="2.11.0 2.14.1"' >&2; exit 2; }
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

FUSED_OPTIM_CPP=1 "$PY" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$out" .
wheel=$(echo "$out"/*.whl)
echo "== $(basename "$wheel"), built with torch $("$PY" -c 'import torch; print(torch.__version__)')"
cp -r tests pyproject.toml setup.py "$out"  # without the package, so that the wheel is imported

for version in "$@"; do
  env=$COMPAT/torch-$version
  [ -x "$env/bin/python" ] || "$PY" -m venv "$env"
  "$env/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$version" numpy pytest pytest-xdist expecttest
  "$env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall "$wheel"
  cd "$out"
  echo "== torch $version"
  "$env/bin/python" -m fused_optim | grep -E '^(torch|instruction set|change detector|backend cpp)'
  "$env/bin/python" -m fused_optim | grep -qE '^backend cpp +ok'
  "$env/bin/python" -m pytest -q -n "${JOBS:-2}" -p no:cacheprovider \
    tests/test_numbers.py tests/test_changes.py tests/test_looks.py tests/test_torch_contract.py
  cd "$repo"
done
