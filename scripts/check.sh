#!/usr/bin/env bash
# Checks a change: style, layers, types, and the unit tests that concern the files that differ from the branch main.
# Usage: bash scripts/check.sh [--all | --style]
#   --all    all unit tests
#   --style  no tests; commit hooks and scripts/run_tests.sh run this
# All checks run even when one fails.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tests=()
case ${1:-} in
"") mapfile -t tests < <(.venv/bin/python scripts/select_tests.py) ;;
--all) tests=(tests/unit) ;;
--style) ;;
*) echo "check.sh: unknown argument '$1'; it takes --all or --style" >&2 && exit 2 ;;
esac

failed=()
run_check() { # run_check NAME COMMAND...
    local name=$1 start=$SECONDS
    shift
    if "$@" </dev/null; then echo "$name: ok, $((SECONDS - start)) s"; else failed+=("$name"); fi
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
.venv/bin/pyright >"$log" </dev/null & # on one core and the longest, beside the others
pyright=$!
finish_pyright() { wait "$pyright" || { cat "$log" && return 1; }; }

run_check "ruff check" .venv/bin/ruff check
run_check "ruff format" .venv/bin/ruff format --check
run_check "lint-imports" .venv/bin/lint-imports
if ((${#tests[@]} > 0)); then
    export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
    run_check "unit tests" .venv/bin/python -m pytest -n 2 --dist loadfile \
        -m "not integration and not e2e and not gpu and not nightly" "${tests[@]}"
fi
run_check "pyright" finish_pyright

if ((${#failed[@]} > 0)); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
