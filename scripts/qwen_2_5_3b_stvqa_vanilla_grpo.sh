#!/usr/bin/env bash
# The vanilla GRPO baseline, 3B: format and answer alone. Four 80 GB GPUs.
# Usage: bash scripts/qwen_2_5_3b_stvqa_vanilla_grpo.sh [key=value ...]; trainer.dry_run=true shows what it would do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python3 -m verl.trainer.main config=configs/qwen_2_5_3b_stvqa_vanilla.yaml "$@"
