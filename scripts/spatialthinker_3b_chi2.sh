#!/usr/bin/env bash
# Ablation: the chi-square divergence.
# Usage: bash scripts/spatialthinker_3b_chi2.sh [key=value ...]; trainer.dry_run=true shows what it would do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python3 -m verl.trainer.main config=configs/spatialthinker_3b_chi2.yaml "$@"
