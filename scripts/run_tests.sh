#!/usr/bin/env bash
# Runs every check and every test that needs no GPU, makes the environment first when it is missing.
# Usage: bash scripts/run_tests.sh [--unit] [pytest arguments]
#   --unit   only the unit tests: offline, no Ray, one process a core
# All stages run even when one fails. The last line counts tests and, as one each, the other stages.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONDONTWRITEBYTECODE # importing vLLM without its cached bytecode takes 20 s, in every process

only_unit=false
if [[ ${1:-} == --unit ]]; then
    only_unit=true
    shift
fi
pytest_arguments=("$@")

# A stage that hangs is ended after this long: several times what it takes beside two other busy processes.
unit_limit_s=1800
integration_limit_s=1800
e2e_limit_s=3600

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1

reports=runs/tests
rm -rf "$reports"
mkdir -p "$reports"
table=()
failed_stages=0
passed=0 failed=0 skipped=0

count_tests() { # count_tests JUNIT_XML -> "passed failed skipped"
    .venv/bin/python - "$1" <<'PY'
import sys
import xml.etree.ElementTree as ElementTree

total = bad = skipped = 0
for suite in ElementTree.parse(sys.argv[1]).getroot().iter("testsuite"):
    total += int(suite.get("tests", 0))
    bad += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    skipped += int(suite.get("skipped", 0))
print(max(total - bad - skipped, 0), bad, skipped)
PY
}

close_stage() { # close_stage NAME SECONDS EXIT_CODE PASSED FAILED SKIPPED
    local result=ok detail=""
    if (($3 != 0)); then
        result=failed
        failed_stages=$((failed_stages + 1))
    fi
    if [[ $1 == *tests ]]; then detail="$4 passed, $5 failed, $6 skipped"; fi
    passed=$((passed + $4)) failed=$((failed + $5)) skipped=$((skipped + $6))
    table+=("$(printf '%-20s %8d  %s' "$1" "$2" "$result${detail:+  $detail}")")
}

run_check() { # run_check NAME COMMAND...
    local name=$1 start=$SECONDS code=0
    shift
    printf '\n==> %s: %s\n' "$name" "$*"
    "$@" </dev/null || code=$?
    close_stage "$name" $((SECONDS - start)) "$code" $((code == 0)) $((code != 0)) 0
    return "$code"
}

run_pytest() { # run_pytest NAME LIMIT_S MARKER_EXPRESSION NUM_PROCESSES [ENVIRONMENT...] -> exit code of pytest
    local name=$1 limit_s=$2 marker=$3 processes=$4 start=$SECONDS code=0
    shift 4
    printf '\n==> %s: pytest -m "%s" %s\n' "$name" "$marker" "${pytest_arguments[*]-}"
    # A background process of a script ignores SIGINT, and tests that interrupt programs hand that down to them.
    env --default-signal=INT,HUP "$@" timeout --foreground --signal=INT --kill-after=30 "$limit_s" \
        .venv/bin/python -m pytest -m "$marker" -n "$processes" --dist loadfile --durations=5 \
        --junitxml="$(report_of "$name")" ${pytest_arguments[@]+"${pytest_arguments[@]}"} </dev/null || code=$?
    if ((code == 124 || code == 137)); then echo "$name: ended after the limit of $limit_s s" >&2; fi
    echo "$((SECONDS - start)) $code" >"$(report_of "$name").end"
}

report_of() { # report_of NAME -> path of its JUnit file
    echo "$reports/${1// /_}.xml"
}

close_pytest() { # close_pytest NAME: counts what run_pytest has left
    local name=$1 seconds=0 code=1 counts
    read -r seconds code <"$(report_of "$name").end" || true
    # 5: nothing was collected, which is fine when arguments of the caller selected tests of another stage.
    if ((code == 5 && ${#pytest_arguments[@]} > 0)); then code=0; fi
    counts=$(count_tests "$(report_of "$name")" 2>/dev/null) || counts="0 0 0"
    read -r -a counts <<<"$counts"
    if ((code != 0 && counts[1] == 0)); then counts[1]=1; fi
    close_stage "$name" "$seconds" "$code" "${counts[@]}"
}

finish() {
    printf '\n%-20s %8s  %s\n' stage seconds result
    printf '%s\n' "${table[@]}"
    printf '\n%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
    exit $((failed_stages > 0))
}

run_check "setup" bash scripts/setup.sh || finish
if ! $only_unit; then
    run_check "style, types" bash scripts/check.sh --style
fi
cores=$(env -u OMP_NUM_THREADS nproc) # nproc itself would answer with that variable
run_pytest "unit tests" "$unit_limit_s" "not integration and not e2e and not gpu and not nightly" \
    $((cores < 8 ? cores : 8)) HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1
close_pytest "unit tests"
if ! $only_unit; then
    # Processes of their own: these fork, which a process that has loaded an engine must not. Side by side, since each
    # waits most of the time for one of its programs; each has a folder of its own for Ray, short as sockets' names are.
    ray_folder=$(mktemp -d /tmp/st-XXXXXX)
    trap 'rm -rf "$ray_folder"' EXIT
    run_pytest "integration tests" "$integration_limit_s" "integration and not gpu and not nightly" 0 \
        RAY_TMPDIR="$ray_folder/i" >"$reports/integration.log" 2>&1 &
    run_pytest "e2e tests" "$e2e_limit_s" "e2e and not gpu and not nightly" 0 RAY_TMPDIR="$ray_folder/e"
    wait
    cat "$reports/integration.log"
    close_pytest "integration tests"
    close_pytest "e2e tests"
fi
finish
