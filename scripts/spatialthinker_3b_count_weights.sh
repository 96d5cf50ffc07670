#!/usr/bin/env bash
# Ablation: other weights of objects and relations in the count reward.
# Usage: bash scripts/spatialthinker_3b_count_weights.sh [key=value ...]; trainer.dry_run=true shows what it would do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python3 -m verl.trainer.main config=configs/spatialthinker_3b_count_weights.yaml "$@"
