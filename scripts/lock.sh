#!/usr/bin/env bash
# Renews requirements/cpu.txt and requirements/gpu.txt: every package that gets installed, with its hashes.
# Usage: bash scripts/lock.sh [--upgrade]
#   --upgrade   takes the newest release of everything that pyproject.toml leaves open; without it pins stay
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv=.venv/bin/uv
[[ -x $uv ]] || uv=$(command -v uv) || {
    echo "error: no uv found; run bash scripts/setup.sh first" >&2
    exit 2
}
[[ $# -eq 0 || $* == --upgrade ]] || {
    echo "error: unknown arguments '$*'; only --upgrade is known" >&2
    exit 2
}

# manylinux_2_31: with an older platform llguidance has only a source distribution, which needs Rust.
lock() { # lock OUTPUT [uv pip compile arguments]
    local output=$1
    shift
    "$uv" pip compile pyproject.toml --extra train --extra eval --extra data --extra dev \
        --override requirements/overrides.txt --python-version 3.12 --python-platform x86_64-manylinux_2_31 \
        --generate-hashes --no-emit-index-url --quiet --output-file "$output" \
        --custom-compile-command "bash scripts/lock.sh" "$@"
    echo "$output: $(grep -c '^[a-z0-9].*==' "$output") packages"
}

lock requirements/gpu.txt "$@"
lock requirements/cpu.txt requirements/cpu.in --override requirements/cpu-overrides.txt "$@"
