#!/bin/sh
# Run the tests of the compiled kernels under the address and undefined-behaviour sanitizers, on a
# build of their own: the installed library stays as it is. Run from the repository root:
#
#     kernels/csrc/sanitize.sh [pytest arguments]
set -eu
python=${PYTHON:-.venv/bin/python}
base=build/sanitize
DELTASTORE_CXXFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" \
    "$python" setup.py -q build --build-base "$base"
# libstdc++ with it, or the sanitizer does not find the function that throws exceptions.
runtime="$(${CXX:-c++} -print-file-name=libasan.so) $(${CXX:-c++} -print-file-name=libstdc++.so.6)"
# Leaks are not looked for: Python and torch keep what they have until the process ends.
ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$runtime" PYTHONPATH="$(echo "$base"/lib*)" \
    "$python" -m pytest -q -p no:cacheprovider tests/kernels -k cpu "$@"
