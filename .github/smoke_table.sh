#!/usr/bin/env bash
# smoke_table.sh BASE OUT: run the methods that differ from commit BASE at tier smoke, write their table to OUT/table.txt.
set -euo pipefail
base=$1 out=$2
mkdir -p "$out"
mapfile -t changed < <(git diff --name-only --diff-filter=AM "$base...HEAD" -- 'methods/*/*.py' | xargs -r -n 1 basename -s .py)
if [ "${#changed[@]}" -eq 0 ]; then
  echo "No method was added or changed." >"$out/table.txt"
  exit 0
fi
selection=()
for name in "${changed[@]}"; do selection+=(--method "$name"); done
.venv/bin/stepmark run --tier smoke --quiet --results "$out/results" "${selection[@]}" || true
.venv/bin/stepmark show --tier smoke --results "$out/results" "${selection[@]}" >"$out/table.txt"
rm -rf "$out/results"
