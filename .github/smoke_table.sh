#!/usr/bin/env bash
# smoke_table.sh BASE OUT: run the methods that differ from commit BASE at tier smoke, with their variants, and write their
# table to OUT/table.txt.
set -euo pipefail
base=$1 out=$2
mkdir -p "$out"
mapfile -t changed < <(
  git diff --name-only --diff-filter=AM "$base...HEAD" -- methods | .venv/bin/python -c '
import sys
from pathlib import Path
from stepmark import plugins
changed = {Path(line.strip()).resolve() for line in sys.stdin}
for info in plugins.methods().values():
    if info.base is None and (info.path in changed or any(info.path.parent in p.parents for p in changed
                                                          if info.path.name == "__init__.py")):
        print(info.id)
'
)
if [ "${#changed[@]}" -eq 0 ]; then
  echo "No method was added or changed." >"$out/table.txt"
  exit 0
fi
selection=(--variants)
for name in "${changed[@]}"; do selection+=(--method "$name"); done
.venv/bin/stepmark run --tier smoke --quiet --results "$out/results" "${selection[@]}" || true
.venv/bin/stepmark show --tier smoke --results "$out/results" "${selection[@]}" >"$out/table.txt"
rm -rf "$out/results"
