"""Turn the sharded actor of a training checkpoint into a Hugging Face folder that transformers and vLLM load.

    python scripts/model_merger.py --local_dir runs/x/global_step_75/actor [--dtype bfloat16] [--hf_upload_path me/x]

See `verl.export.merger`.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's packages before installed ones

from spatialthinker.output import print_any_text
from spatialthinker.versions import check_versions
from verl.export.merger import DTYPES, merge_checkpoint, upload_folder


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0, or 2 after one message about a checkpoint that cannot be merged."""
    print_any_text()
    parser = argparse.ArgumentParser(description="Merge a training checkpoint's actor into a Hugging Face folder.")
    parser.add_argument("--local_dir", required=True, help="folder global_step_N/actor of a checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, help="convert the weights (default: as stored)")
    parser.add_argument("--hf_upload_path", metavar="OWNER/NAME", help="also upload to this hub repository")
    parser.add_argument("--public", action="store_true", help="make a newly created hub repository public")
    args = parser.parse_args(argv)
    try:
        check_versions("torch", "transformers")
        hf_dir = merge_checkpoint(args.local_dir, args.dtype)
    except (OSError, ValueError) as error:
        print(f"model_merger: {error}", file=sys.stderr)
        return 2
    print(f"merged model: {hf_dir}")
    if json.loads((hf_dir / "config.json").read_text()).get("dtype") == "float32" and args.dtype is None:
        print("Its weights are float32, as they were stored: twice the size of the released bfloat16 models, which")
        print("--dtype bfloat16 writes.")
    if args.hf_upload_path:
        print(f"uploaded: {upload_folder(hf_dir, args.hf_upload_path, args.public)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
