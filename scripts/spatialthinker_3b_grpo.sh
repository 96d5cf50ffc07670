#!/usr/bin/env bash
# SpatialThinker-3B, the paper's run. Four 80 GB GPUs.
# Usage: bash scripts/spatialthinker_3b_grpo.sh [key=value ...]; trainer.dry_run=true shows what it would do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python3 -m verl.trainer.main config=configs/spatialthinker_3b.yaml "$@"
