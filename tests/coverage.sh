#!/usr/bin/env bash
# Lines and branches of csrc that the tests reach on the CPU, and those that they miss: about 12 minutes.
# Run it after `make build`. It builds a copy of the sources with gcov's counters, in build/coverage.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$PWD/.venv/bin copy=$PWD/build/coverage
"$bin/python" -m pip --quiet install gcovr

rm -rf "$copy"
mkdir -p "$copy"
cp -r csrc tests gated_prompt examples build_backend docs conftest.py setup.py pyproject.toml README.md LICENSE \
  CMakeLists.txt "$copy"
rm -f "$copy"/gated_prompt/*.so
cd "$copy"

# gcc takes the last -O: at -O3 lines are merged, and their counts with them
counted="-O1 --coverage -fprofile-update=atomic"
printf '#!/bin/sh\nexec g++ "$@" %s\n' "$counted" > g++-counted
chmod +x g++-counted
CXX=$copy/g++-counted GATED_PROMPT_CPU_ONLY=1 "$bin/python" setup.py --quiet build_ext --inplace
"$bin/python" -m pytest tests/test_{prompt_gate,scaled_dot,divide_rows,bad_inputs,fuzz,gradient_ownership,cli}.py

"$bin/cmake" -S . -B build/cmake -G Ninja -DCMAKE_BUILD_TYPE=None -DCMAKE_MAKE_PROGRAM="$bin/ninja" \
  -DCMAKE_CXX_FLAGS="$counted" -DCMAKE_CUDA_COMPILER=NOTFOUND
"$bin/cmake" --build build/cmake
"$bin/ctest" --test-dir build/cmake --output-on-failure

for metric in line branch; do
  "$bin/gcovr" --root . --filter csrc/ --merge-lines --exclude-throw-branches --exclude-unreachable-branches \
    --gcov-ignore-parse-errors=negative_hits.warn_once_per_file --txt - --txt-metric "$metric"
done
