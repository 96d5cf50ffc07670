#!/usr/bin/env bash
# SpatialThinker-3B on scenes, numbers, points and puzzles made of plain pictures; docs/data.md makes the rows.
# Usage: bash scripts/spatialthinker_3b_mixed.sh [key=value ...]; trainer.dry_run=true shows what it would do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python3 -m verl.trainer.main config=configs/spatialthinker_3b_mixed.yaml "$@"
