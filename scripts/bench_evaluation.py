"""Measure the local engines of evaluation/evals.py: answers a second (model load apart) and peak memory.

    python3 scripts/bench_evaluation.py                                                 # the toy model on 500 scenes
    python3 scripts/bench_evaluation.py --model_path random_qwen2_5_vl_3b --image 800x600 --max_tokens 300 \\
        --items 512 --huggingface_items 32                                              # a 3B model's shape, one GPU
    python3 scripts/bench_evaluation.py --image 800x600 --max_pixels 50176 --max_tokens 4 --items 500,4000   # memory

The engines are compared by response tokens a second, so the slower one may be given fewer items. A name of
RANDOM_MODELS in verl.bench.random_models stands for random weights in that shape, which never end a response by
themselves.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's packages before installed ones

from spatialthinker.schema import VqaRow, parquet_path, write_parquet
from spatialthinker.synthetic import generate
from verl.bench.inputs import random_picture
from verl.bench.random_models import RANDOM_MODELS, describe_random_model, draw_weights

ROOT = Path(__file__).resolve().parents[1]
TOY_MODEL = ROOT / "configs" / "toy_model"
MAX_PIXELS = 12_845_056
"""Pixel limit of Qwen2.5-VL's own processor; the toy model's is that of its scenes."""
SAMPLE_S = 0.2


def make_rows(count: int, image: str | None) -> Iterator[VqaRow]:
    """Yield scenes with their questions; with a size such as 800x600 a random picture in place of each scene."""
    rng = np.random.default_rng(0)
    for _, row in generate(count, seed=5, split="val"):
        if image is not None:
            width, height = map(int, image.split("x"))
            row = replace(row, images=random_picture(rng, (width, height)))
        yield row


def make_model(model_path: str, image: str | None, max_pixels: int, folder: Path) -> Path:
    """Return the model's folder; random ones and the toy model for larger images are written into `folder`."""
    model = folder / Path(model_path).name
    if model_path in RANDOM_MODELS:
        with chdir(ROOT):  # where the toy model's tokenizer is found
            describe_random_model(model)
            draw_weights(model)
    elif image is None or Path(model_path).resolve() != TOY_MODEL:
        return Path(model_path).resolve() if Path(model_path).is_dir() else Path(model_path)
    else:
        shutil.copytree(model_path, model)
    settings = model / "processor_config.json"
    config = json.loads(settings.read_text())
    config["image_processor"]["size"]["longest_edge"] = max_pixels
    settings.write_text(json.dumps(config))
    return model


def measure(provider: str, items: int, args: argparse.Namespace, model: Path, folder: Path) -> tuple[float, str]:
    """Return the tokens a second of one run in processes of its own, and a line on it.

    The peak is that of anonymous memory of all its processes: pages of mapped files can be dropped at any time.
    """
    # Not the training prompt: its answers are rewarded as well, which is no work of the engine.
    name = f"{provider}_{items}"
    command = [sys.executable, "evaluation/evals.py", "--dataset", "stvqa", "--template", "reasoning"]
    command += ["--data_path", str(folder / "data"), "--model_path", str(model), "--provider", provider]
    command += ["--batch_size", str(args.batch_size), "--max_tokens", str(args.max_tokens)]
    command += ["--num_samples", str(items), "--output_dir", str(folder), "--custom_filename", name]
    log = folder / f"{name}.log"
    peak_bytes = 0
    with log.open("w") as handle:
        process = psutil.Popen(command, cwd=ROOT, stdout=handle, stderr=handle)
        while process.poll() is None:
            peak_bytes = max(peak_bytes, read_anonymous_bytes(process))
            time.sleep(SAMPLE_S)
    text = log.read_text()
    found = re.search(r"answered in ([\d.]+) s", text)
    if process.returncode or found is None:
        raise SystemExit(text[-3000:])
    records = json.loads((folder / f"{name}.json").read_text())
    response, prompt = (sum(record[key] for record in records) / items for key in ("response_tokens", "prompt_tokens"))
    seconds = float(found[1])
    rate = items * response / seconds
    return rate, (
        f"{items} items of {prompt:.0f} + {response:.0f} tokens: {seconds:.1f} s, {items / seconds:.2f} items/s, "
        f"{rate:.0f} tokens/s, peak {peak_bytes / 2**30:.2f} GiB"
    )


def read_anonymous_bytes(process: psutil.Process) -> int:
    """Return the memory of a process and its descendants that no file backs."""
    total = 0
    try:
        for member in (process, *process.children(recursive=True)):
            status = Path(f"/proc/{member.pid}/status").read_text()
            total += sum(int(size) for size in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+)", status, re.MULTILINE))
    except (OSError, psutil.NoSuchProcess):  # one that ends meanwhile
        pass
    return total * 1024


def main() -> None:
    """Print one line for each engine and number of items, and the engines' ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", default="500", help="one number, or several with commas")
    parser.add_argument("--huggingface_items", type=int, help="items for huggingface (default: as many)")
    parser.add_argument("--batch_size", type=int, default=4, help="of huggingface (default: 4)")
    parser.add_argument("--max_tokens", type=int, default=160)
    parser.add_argument("--image", metavar="WxH", help="random pictures of this size in place of the scenes")
    parser.add_argument("--max_pixels", type=int, default=MAX_PIXELS, help="of these pictures that the model sees")
    parser.add_argument("--model_path", default=str(TOY_MODEL), help=f"or {', '.join(RANDOM_MODELS)}")
    parser.add_argument("--providers", default="vllm,huggingface")
    args = parser.parse_args()
    counts = [int(value) for value in args.items.split(",")]
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make_model(args.model_path, args.image, args.max_pixels, folder)
        write_parquet(list(make_rows(max(counts), args.image)), parquet_path(folder / "data", "val"))
        for provider in args.providers.split(","):
            for items in counts:
                if provider == "huggingface" and args.huggingface_items:
                    items = min(items, args.huggingface_items)
                rates[provider], line = measure(provider, items, args, model, folder)
                print(f"{provider:12} {line}", flush=True)
    if len(rates) > 1:
        first, second = rates
        print(f"{first} answers {rates[first] / rates[second]:.1f} times as fast as {second}")


if __name__ == "__main__":
    main()
