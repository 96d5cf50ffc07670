#!/usr/bin/env bash
# SpatialThinker-30B: LoRA of rank 64 on Qwen3-VL-30B-A3B.
# Usage: bash scripts/spatialthinker_30b_lora.sh [key=value ...]; trainer.dry_run=true shows what it would do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python3 -m verl.trainer.main config=configs/spatialthinker_30b.yaml "$@"
