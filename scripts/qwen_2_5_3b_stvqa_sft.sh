#!/usr/bin/env bash
# The supervised baseline, 3B: LoRA of rank 8, three epochs, answers without reasoning. Four GPUs.
# Usage: [NUM_GPUS=4] bash scripts/qwen_2_5_3b_stvqa_sft.sh [--OPTION VALUE ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python3 -m torch.distributed.run --nproc_per_node "${NUM_GPUS:-4}" scripts/sft.py \
    --model_path Qwen/Qwen2.5-VL-3B-Instruct --output_dir runs/qwen_2_5_3b_stvqa_sft "$@"
