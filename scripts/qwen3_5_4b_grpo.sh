#!/usr/bin/env bash
# SpatialThinker's run on Qwen3.5-4B.
# Usage: bash scripts/qwen3_5_4b_grpo.sh [key=value ...]; trainer.dry_run=true shows what it would do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python3 -m verl.trainer.main config=configs/qwen3_5_4b.yaml "$@"
