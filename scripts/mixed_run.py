"""Trains the toy model on four sources at once and draws each one's curve.

    python3 scripts/mixed_run.py --run_dir runs/mixed [--without numbers] [KEY=VALUE ...]

Draws the rows (scenes with the dense reward, widths in pixels, points, and counts that data generation makes of
plain pictures), warms the model up on the replies of a hasty teacher, and trains with configs/toy_mixed_cpu.yaml.
`--without` takes a source's reward away: its groups are sampled and scored, and teach nothing. Rows and warm model
are kept and used again. Prints each source's held-out reward before and after with 95 % intervals, and draws
RUN/curves.png.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's packages before installed ones

from toy.before_after import compare_metric
from toy.charts import LIGHT, Series, draw_curves
from toy.mixture import ROOT, SOURCES, write_sources, write_warm_up

CONFIG = ROOT / "configs" / "toy_mixed_cpu.yaml"
SFT_ARGUMENTS = (
    *("--prompt_key", "problem", "--answer_key", "reply", "--format_prompt", "", "--max_pixels", "12544"),
    *("--bf16", "false", "--gradient_checkpointing", "false", "--use_cpu", "true", "--report_to", "none"),
    *("--lora_rank", "64", "--lora_alpha", "64", "--learning_rate", "2e-3", "--num_train_epochs", "4"),
    *("--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--save_strategy", "no"),
)


def prepare(data: Path, warm: Path) -> Path:
    """Draws the rows and warms the model up, unless both are there; returns the warm model's folder."""
    model = warm / "huggingface"
    if not (data / "done").is_file():
        write_sources(data)
        (data / "done").touch()
    if not (model / "model.safetensors").is_file():
        rows = write_warm_up(data)
        command = [sys.executable, str(ROOT / "scripts" / "sft.py"), "--model_path", str(ROOT / "configs/toy_model")]
        command += ["--train_files", str(rows), "--output_dir", str(warm), *SFT_ARGUMENTS]
        subprocess.run(command, check=True)
    return model


def write_config(path: Path, data: Path, model: Path, without: list[str]) -> None:
    """Writes the configuration with this run's paths."""
    config = yaml.safe_load(CONFIG.read_text())
    for key, split in (("train_files", "train"), ("val_files", "val")):
        for source, name in zip(config["data"][key], SOURCES, strict=True):
            source["path"] = f"{data / name}@{split}"
            if split == "train" and name in without:
                source["advantage_scale"] = 0.0
    config["worker"]["actor"]["model"]["model_path"] = str(model)
    config["trainer"]["save_checkpoint_path"] = str(path.parent / "checkpoints")
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """Returns the metrics of each step."""
    lines = (folder / "experiment_log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def held_out(folder: Path, step: int) -> dict[str, list[float]]:
    """Returns the held-out rewards of each source at a step, in the order of the rows."""
    found: dict[str, list[float]] = {name: [] for name in SOURCES}
    for line in (folder / f"validation_step_{step}.jsonl").read_text().splitlines():
        row = json.loads(line)
        found[row["source"]].append(row["score"]["overall"])
    return found


def report(folder: Path, without: list[str]) -> dict[str, Any]:
    """Returns each source's held-out reward before and after, and draws the curves beside the checkpoints."""
    import numpy as np

    steps = sorted(int(path.stem.rpartition("_")[2]) for path in folder.glob("validation_step_*.jsonl"))
    values = {step: held_out(folder, step) for step in steps}
    curves = [
        Series(
            f"{name}, no reward" if name in without else name,
            steps,
            [float(np.mean(values[step][name])) for step in steps],
        )
        for name in SOURCES
    ]
    picture = draw_curves(LIGHT, "Held-out reward of each source", "reward", curves)
    (folder.parent / "curves.png").write_bytes(picture)
    first, last = values[steps[0]], values[steps[-1]]
    return {name: compare_metric(np.array(first[name]), np.array(last[name])) for name in SOURCES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("runs/mixed"), help="(%(default)s)")
    parser.add_argument("--data_dir", type=Path, help="rows and warm model of another run (RUN_DIR)")
    parser.add_argument(
        "--without", action="append", default=[], choices=SOURCES, help="a source that teaches nothing"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides for the trainer's configuration")
    options = parser.parse_intermixed_args()
    start, run, shared = time.monotonic(), options.run_dir, options.data_dir or options.run_dir
    run.mkdir(parents=True, exist_ok=True)
    model = prepare(shared / "data", shared / "warm_up")
    warm_s = time.monotonic() - start
    config = run / "config.yaml"
    write_config(config, shared / "data", model, options.without)
    command = [sys.executable, "-m", "verl.trainer.main", f"config={config}", *options.overrides]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"VLLM_NO_USAGE_STATS": "1"})
    found = report(run / "checkpoints", options.without)
    print(f"\n{'source':<9} {'before':>7} {'after':>7} {'gain':>7}  95 % interval of the gain")
    for name, facts in found.items():
        low, high = facts["gain_interval"]
        line = f"{name:<9} {facts['before']:>7.3f} {facts['after']:>7.3f} {facts['gain']:>+7.3f}"
        print(f"{line}  {low:+.3f} to {high:+.3f}{'  (no reward)' if name in options.without else ''}")
    (run / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
    total = time.monotonic() - start
    print(f"{total:.0f} s, of them {warm_s:.0f} s for rows and warm-up; curves in {run / 'curves.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
