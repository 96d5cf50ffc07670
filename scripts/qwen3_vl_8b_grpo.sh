#!/usr/bin/env bash
# SpatialThinker's run on Qwen3-VL-8B.
# Usage: bash scripts/qwen3_vl_8b_grpo.sh [key=value ...]; trainer.dry_run=true shows what it would do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python3 -m verl.trainer.main config=configs/qwen3_vl_8b.yaml "$@"
