#!/usr/bin/env python3
"""Supervised baseline: LoRA on the questions and the letter and text of their answers, without any reasoning.

    python3 scripts/sft.py --model_path Qwen/Qwen2.5-VL-3B-Instruct --output_dir runs/sft_3b [--OPTION VALUE ...]

Every option of transformers' TrainingArguments may be given; the defaults below are the paper's. The loss is that of
the answer alone: tokens of the prompt are masked. Writes OUTPUT_DIR/adapter and the merged model
OUTPUT_DIR/huggingface. A run that is started again goes on from its last checkpoint.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's packages before installed ones

from verl.trainer.sft_options import SftOptions, build_help_parser

DESCRIPTION = "Supervised baseline with LoRA."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 2 after a message about a wrong path or value."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        build_help_parser(DESCRIPTION).print_help()
        return 0
    from spatialthinker.multicast import multicast_environment
    from spatialthinker.network import use_cache_without_network
    from spatialthinker.output import print_any_text
    from spatialthinker.versions import check_versions

    print_any_text()
    os.environ.update(multicast_environment())
    given, _ = build_help_parser(DESCRIPTION).parse_known_args(arguments)
    defaults = SftOptions()
    use_cache_without_network([given.model_path or defaults.model_path, given.train_files or defaults.train_files])
    try:
        check_versions("torch", "torchvision", "torchaudio", "transformers", "datasets", "peft")
        from transformers import HfArgumentParser

        from verl.trainer.sft import SftArguments, train

        parser = HfArgumentParser(cast(Any, SftArguments), description=DESCRIPTION)
        train(*parser.parse_args_into_dataclasses(arguments))
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
