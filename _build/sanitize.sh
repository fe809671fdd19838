#!/bin/sh
# Compiles a second copy of the package under build/sanitize with ASan and UBSan, and runs the kernels' tests on it.
# Usage: sanitize.sh PYTHON [pytest arguments]
set -eu
cd "$(dirname "$0")/.."
python=$1
shift
tree=build/sanitize
checks=-fsanitize=address,undefined
CXXFLAGS="$checks -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g" LDFLAGS="$checks" \
  FUSED_TRANSFORMER_CUDA=0 "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps --upgrade \
  --target "$tree" .
# The sanitizers must come first in a process whose Python was built without them. Leaks are not looked for: CPython
# frees little at exit, and the kernels allocate nothing. What Inductor compiles for itself is none of these kernels.
LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$tree" \
  "$python" -m pytest -m "not gpu" --deselect tests/kernels/test_compile.py::test_inductor tests/kernels "$@"
