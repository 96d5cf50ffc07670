#!/usr/bin/env bash
# The whole job on one CPU machine: scenes -> GRPO -> checkpoint -> merge -> evaluation -> report.
# Usage: bash scripts/quickstart.sh [--fresh] [trainer overrides]
#   --fresh   starts over; without it an interrupted run goes on where it stopped
# Results: runs/quickstart/summary.json and the report that it names.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

started=$(date +%s)
bash scripts/setup.sh
exec .venv/bin/python scripts/quickstart.py --started "$started" "$@"
