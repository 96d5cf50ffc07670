#!/usr/bin/env bash
# Ablation: no divergence term and no reference model.
# Usage: bash scripts/spatialthinker_3b_no_kl.sh [key=value ...]; trainer.dry_run=true shows what it would do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python3 -m verl.trainer.main config=configs/spatialthinker_3b_no_kl.yaml "$@"
