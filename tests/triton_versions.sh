#!/usr/bin/env bash
# Compiles the Triton kernels ahead of time with other versions of Triton: triton_versions.sh VERSION...
# Each version is installed into a temporary folder, which comes first in PYTHONPATH.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-python3}
[ $# -gt 0 ] || { echo 'which versions of Triton? make compat-triton TRITON="3.5.1 3.6.0"' >&2; exit 2; }
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

failed=
for version in "$@"; do
  "$PY" -m pip install --quiet --disable-pip-version-check --no-deps --target "$out/$version" "triton==$version"
  echo "== Triton $version"
  export PYTHONPATH="$out/$version" TRITON_CACHE_DIR="$out/$version/cache"
  "$PY" -c "import triton; assert triton.__version__ == '$version', triton.__version__"
  "$PY" -m pytest -q -n "${JOBS:-2}" -p no:cacheprovider tests/test_triton_compile.py tests/test_triton_launcher.py || failed+=" $version"
  unset PYTHONPATH
  rm -rf "${out:?}/$version"
done
[ -z "$failed" ] || { echo "failed with Triton$failed" >&2; exit 1; }
