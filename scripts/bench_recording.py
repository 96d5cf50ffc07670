#!/usr/bin/env python3
"""Cost of recording: time of a training step, equality of what is learned, and the size of the files of a long run.

    python3 scripts/bench_recording.py step [--minutes 15]  # one toy run whose steps record or not
    python3 scripts/bench_recording.py same [--steps 6]     # two toy runs, equal to the last digit
    python3 scripts/bench_recording.py size [--steps 2]     # whole steps of 512 prompts with photograph-like pictures

step: every step has the same prompts, the same seed and a learning rate of 0, so that its work is the same. Blocks of
three steps with recording and without come in pairs, in random order; the first step of a block is left out, since the
step before it may still be written. The ratio of both times is given with a 95 % interval, by a bootstrap over pairs,
and beside it what recording takes on the trainer's own thread, on the driver's recording thread and in the background.
On a machine with other work the CPU time of the trainer, ranks and engine varies less than the step's time.

size: bytes of a picture and of a row, scaled by the pictures and rows of a run of 75 such steps. The files are
removed. Pictures are of dead leaves (opaque discs of all sizes, with shading and noise), whose edges and spectrum are
those of photographs, as JPEG of quality 90; words of the responses are drawn by Zipf's law, so that they do not repeat
as few sentences would.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout's packages before installed ones

VARYING = ("timing_", "perf/", "recording/", "checks/", "checkpoint/")
"""Beginnings of names of metrics that are no function of the seed."""
BLOCK = 3
NUM_RESAMPLES = 10_000
RUN_STEPS, PROMPTS, SAMPLES = 75, 512, 8
"""The paper's run."""
PICTURE_PX = (800, 600)
JPEG_QUALITY = 90


# One run whose steps record or not


def make_schedule(num_pairs: int, seed: int) -> list[bool]:
    """One flag a step, True to record: a block for the start, then pairs of blocks in random order."""
    rng = random.Random(seed)
    orders = [rng.choice(((True, False), (False, True))) for _ in range(num_pairs)]
    blocks = [True, *(is_on for order in orders for is_on in order)]
    return [is_on for is_on in blocks for _ in range(BLOCK)]


class Forgetful(dict):
    """Names of stored pictures that are never found again, as in a first epoch, where each prompt is new."""

    def __contains__(self, key: object) -> bool:
        return False


class Clock:
    """Seconds that calls of some functions take on the thread that calls them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return call


def read_cpu_s(recorder: Any) -> dict[str, float]:
    """CPU seconds so far of the recording's thread in the driver and of its process."""
    threads = {each.id: each for each in psutil.Process().threads()}
    own = threads[recorder.thread.native_id]
    (pid,) = recorder.background.pool._processes  # no other way to its id
    times = psutil.Process(pid).cpu_times()
    return {"thread": own.user_time + own.system_time, "process": times.user + times.system}


def read_training_cpu_s(recorder: Any) -> dict[int, float]:
    """CPU seconds so far of each process of the run, by its id, but for the recording's."""
    found, own = {}, psutil.Process()
    for process in (own, *own.children(recursive=True)):
        if process.pid not in recorder.background.pool._processes:
            with suppress(psutil.Error):  # it has ended in this moment
                times = process.cpu_times()
                found[process.pid] = times.user + times.system
    return found


class Enough(Exception):
    """Enough steps for the time that was given."""


def make_trainer_class(schedule: Sequence[bool], notes: dict[str, Any], minutes: float) -> type:
    """A trainer that records by a schedule and notes what each step takes."""
    from verl.trainer.ray_trainer import GRPOTrainer

    class AlternatingTrainer(GRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.clock, generate = Clock(), self.engines.generate

            def generate_alike(prompts: Any, sampling: Any, seed: int, for_training: bool = True) -> Any:
                return generate(prompts, sampling, 1, for_training)

            self.engines.generate = generate_alike
            self.recorder.pictures = Forgetful()
            for owner, name in ((self.recorder, "read"), (self.recorder, "write"), (self.recorder, "append")):
                setattr(owner, name, self.clock.timed(getattr(owner, name)))
            self.actor.mean_entropies = self.clock.timed(self.actor.mean_entropies)  # type: ignore[attr-defined]

        def train_step(self) -> dict[str, Any]:
            if self.step % (2 * BLOCK) == BLOCK + 1 and time.monotonic() > self.end:  # pairs are whole
                raise Enough
            self.recorder.is_on = schedule[self.step - 1]
            if self.step == BLOCK:
                notes["cpu_before"] = read_cpu_s(self.recorder)
            before = read_training_cpu_s(self.recorder)
            self.clock.seconds, start = 0.0, time.perf_counter()
            metrics = super().train_step()
            note = {"step": self.step, "is_on": self.recorder.is_on, "seconds": time.perf_counter() - start}
            after = read_training_cpu_s(self.recorder)
            note["cpu_seconds"] = sum(after[pid] - before.get(pid, 0.0) for pid in after)
            note |= {"own_seconds": self.clock.seconds, "load": os.getloadavg()[0]}
            note |= {"response_tokens": metrics["response_length/mean"], "reward": metrics["reward/overall"]}
            notes.setdefault("steps", []).append(note)
            return metrics

        def fit(self) -> None:
            self.end = time.monotonic() + 60 * minutes
            with suppress(Enough):
                super().fit()
            deadline = time.monotonic() + 300
            while self.recorder.num_written < self.recorder.num_sent and time.monotonic() < deadline:
                time.sleep(0.1)
            notes["cpu_after"] = read_cpu_s(self.recorder)
            notes["lost"] = self.recorder.num_failed + self.recorder.num_dropped

    return AlternatingTrainer


def draw_rows(folder: Path, num_rows: int) -> None:
    if not folder.is_dir():
        rows = ["--out", str(folder), "--seed", "3", "--train", str(num_rows), "--val", "16"]
        subprocess.run([sys.executable, "-m", "spatialthinker.synthetic", *rows], cwd=ROOT, check=True)


def arguments(data: Path, run: Path, steps: int, *more: str) -> list[str]:
    """Arguments of a toy run without checkpoints and, but at its end, validations."""
    names = [f"config={ROOT / 'configs/toy_cpu.yaml'}", f"data.train_files={data}@train", f"data.val_files={data}@val"]
    names += [f"trainer.save_checkpoint_path={run}", f"trainer.max_steps={steps}", "trainer.logger=[file]"]
    names += ["trainer.val_before_train=false", "trainer.val_freq=-1", "trainer.save_freq=-1"]
    return [*names, *more]


def interval(pairs: np.ndarray, statistic: Callable[..., Any]) -> tuple[float, float, float]:
    """Ratio of a statistic with recording to that without, and its 95 % interval; seconds [pairs, 2, steps]."""
    rng = np.random.default_rng(0)
    drawn = pairs[rng.integers(len(pairs), size=(NUM_RESAMPLES, len(pairs)))]  # [resamples, pairs, 2, steps]
    values = statistic(drawn, axis=(1, 3))  # [resamples, 2]
    low, high = np.quantile(values[:, 0] / values[:, 1], (0.025, 0.975))
    whole = statistic(pairs, axis=(0, 2))
    return float(whole[0] / whole[1]), float(low), float(high)


def summarise(notes: dict[str, Any]) -> str:
    """The result of a run in words."""
    blocks = [notes["steps"][start : start + BLOCK] for start in range(BLOCK, len(notes["steps"]), BLOCK)]
    found = [[block for block in blocks if block[0]["is_on"] == is_on] for is_on in (True, False)]
    pairs, cpu_pairs = (
        np.array([[[step[name] for step in block[1:]] for block in pair] for pair in zip(*found, strict=True)])
        for name in ("seconds", "cpu_seconds")
    )  # [pairs, 2, steps]
    recorded = [step for step in notes["steps"][BLOCK:] if step["is_on"]]
    plain_s = float(pairs[:, 1].mean())
    cpu = {name: notes["cpu_after"][name] - notes["cpu_before"][name] for name in ("thread", "process")}
    num_recorded = len(recorded) + 1  # the last step of the first block too
    cpu = {name: seconds / num_recorded for name, seconds in cpu.items()}
    own = [step["own_seconds"] for step in recorded]
    loads = [step["load"] for step in notes["steps"][BLOCK:]]
    lines = [
        f"{len(pairs)} pairs of blocks, {pairs[:, 0].size} measured steps of each kind; "
        f"{notes['lost']} steps not recorded in full",
        f"response tokens {sorted({round(step['response_tokens'], 2) for step in notes['steps']})}, "
        f"load of the machine {min(loads):.1f} to {max(loads):.1f}",
        f"without recording {plain_s:.3f} s a step, standard deviation {100 * pairs[:, 1].std() / plain_s:.1f} %; "
        f"CPU time {cpu_pairs[:, 1].mean():.2f} s, {100 * cpu_pairs[:, 1].std() / cpu_pairs[:, 1].mean():.1f} %",
    ]
    for what, values in (("time", pairs), ("CPU time of trainer, ranks and engine", cpu_pairs)):
        for name, statistic in (("means", np.mean), ("medians", np.median)):
            ratio, low, high = interval(values, statistic)
            lines.append(f"{what}, ratio of {name}: {ratio:.4f}, 95 % interval {low:.4f} to {high:.4f}")
    lines += [
        f"on the trainer's own thread: {1000 * statistics.mean(own):.1f} ms a step, at most {1000 * max(own):.1f} ms, "
        f"{100 * statistics.mean(own) / plain_s:.3f} %",
        f"CPU time of the driver's recording thread: {1000 * cpu['thread']:.0f} ms a step, "
        f"{100 * cpu['thread'] / plain_s:.2f} %",
        f"CPU time of the process of lowest priority: {1000 * cpu['process']:.0f} ms a step, "
        f"{100 * cpu['process'] / plain_s:.2f} %",
    ]
    return "\n".join(lines)


def measure_step(options: argparse.Namespace, folder: Path) -> int:
    from verl.trainer import main as trainer_main
    from verl.trainer import ray_trainer

    schedule, notes = make_schedule(options.pairs, options.seed), {}
    draw_rows(folder / "one_batch", 32)
    ray_trainer.GRPOTrainer = make_trainer_class(schedule, notes, options.minutes)  # type: ignore[misc]
    shutil.rmtree(folder / "alternating", ignore_errors=True)
    more = ["data.shuffle=false", "worker.actor.optim.lr=0"]
    code = trainer_main.main(arguments(folder / "one_batch", folder / "alternating", len(schedule), *more))
    if code:
        return code
    (folder / "steps.json").write_text(json.dumps(notes, indent=1) + "\n")
    print(summarise(notes))
    return 0


# Two runs, equal to the last digit


def train(folder: Path, rule: str, steps: int) -> list[dict[str, Any]]:
    """Returns the metrics of a run's steps."""
    run = folder / rule
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "verl.trainer.main"]
    command += arguments(folder / "data", run, steps, f"trainer.rollouts_to_keep={rule}")
    with (folder / f"{rule}.log").open("w") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True)
    return [json.loads(line) for line in (run / "experiment_log.jsonl").read_text().splitlines()]


def compare(options: argparse.Namespace, folder: Path) -> int:
    draw_rows(folder / "data", 512)
    first, second = (train(folder, rule, options.steps) for rule in ("all", "none"))
    differences = [] if len(first) == len(second) else [f"{len(first)} and {len(second)} steps"]
    differences += [
        f"step {one['step']}: {key} is {one.get(key)} and {other.get(key)}"
        for one, other in zip(first, second, strict=False)
        for key in sorted(one.keys() | other.keys())
        if not key.startswith(VARYING) and one.get(key) != other.get(key)
    ]
    print("\n".join(differences) or f"{len(first)} steps with recording and without: equal to the last digit")
    return 1 if differences else 0


# Size of the files


def draw_picture(rng: np.random.Generator) -> bytes:
    """A JPEG with the edges and the spectrum of a photograph."""
    from PIL import Image, ImageDraw, ImageFilter

    from spatialthinker.storage.images import encode

    width, height = PICTURE_PX
    image = Image.new("RGB", PICTURE_PX, (118, 124, 130))
    draw = ImageDraw.Draw(image)
    radii = (rng.random(1500) * (3.0**-2 - 220.0**-2) + 220.0**-2) ** -0.5  # density r^-3 from 3 to 220 pixels
    for radius in sorted(radii, reverse=True):
        x, y = rng.random(2) * (width, height)
        colour = np.clip(rng.normal(120, 55) + rng.normal(0, 22, 3), 0, 255).astype(int)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(map(int, colour)))
    grains = Image.fromarray(rng.normal(128, 40, (height // 4, width // 4, 3)).clip(0, 255).astype(np.uint8))
    shading = np.asarray(grains.resize(PICTURE_PX, Image.Resampling.BICUBIC), dtype=float) - 128
    noise = rng.normal(0, 4, (height, width, 1))  # of a sensor
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(0.7)), dtype=float)
    return encode(
        Image.fromarray((soft + 0.2 * shading + noise).clip(0, 255).astype(np.uint8)), "JPEG", quality=JPEG_QUALITY
    )


class Inline:
    """The background in this process: at the lowest priority it would wait for whoever else uses the machine."""

    def __init__(self) -> None:
        self.seconds = {"describe": 0.0, "store_picture": 0.0, "write_step": 0.0}

    def start(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, function: Any, *args: Any) -> Any:
        start = time.thread_time()
        result = function(*args)
        name = getattr(function, "__name__", "describe")  # a partial has none
        self.seconds[name] += time.thread_time() - start
        return result


def make_step(rows: list[Any], words: list[str], num_tokens: int, draws: bool, rng: np.random.Generator) -> Any:
    """A step's answered prompts: real prompts and scenes, made-up numbers, and if asked for new pictures."""
    import torch

    from spatialthinker.synthetic import gold_response
    from verl.protocol import DataProto
    from verl.protocol.row_values import as_objects
    from verl.trainer.recording.answered import Answered

    shape = (PROMPTS, SAMPLES, 2 * num_tokens)
    chosen = [rows[i] for i in rng.integers(len(rows), size=PROMPTS)]
    lengths = rng.integers(num_tokens // 2, num_tokens * 3 // 2, size=shape[:2])
    places = 1 / np.arange(1, len(words) + 1)
    texts = []
    for row, length in zip(chosen, lengths.tolist(), strict=True):
        gold = gold_response(row)
        for tokens in length:  # four characters a token
            drawn = rng.choice(len(words), size=tokens, p=places / places.sum())
            thought = " ".join(words[i] for i in drawn)[: max(0, 4 * tokens - len(gold))]
            texts.append(gold.replace("<think>", f"<think>{thought} "))
    mask = torch.arange(shape[2]) < torch.from_numpy(lengths).unsqueeze(-1)
    log_probs = -torch.from_numpy(rng.exponential(0.3, shape)).float()
    tensors = {
        "responses": torch.from_numpy((rng.zipf(1.2, shape) % 150_000).astype(np.int64)),
        "response_mask": mask,
        "prompt_mask": torch.ones(PROMPTS, 700, dtype=torch.long),
        "advantages": torch.from_numpy(rng.normal(size=shape[:2])).float(),
        "rollout_log_probs": log_probs,
        "old_log_probs": log_probs + 0.01 * torch.randn(shape),
        "ref_log_probs": log_probs + 0.05 * torch.randn(shape),
        "entropy_mean": torch.rand(shape[:2]),
    }
    columns = {
        "uid": as_objects([f"{i} (image_id {row.image_id})" for i, row in enumerate(chosen)]),
        "problem": as_objects([row.problem for row in chosen]),
        "ground_truth": as_objects([row.answer_option_text for row in chosen]),
        "images": as_objects([[draw_picture(rng)] if draws else [] for _ in chosen]),
    }
    names = ("overall", "format", "count", "accuracy", "spatial_score")
    return Answered(DataProto.from_dict(tensors, columns), texts, {name: torch.rand(shape[:2]) for name in names})


def record_steps(folder: Path, options: argparse.Namespace, draws: bool, with_tokens: bool) -> tuple[float, float]:
    """Records whole steps and prints what they take; returns the bytes of a picture, 0 without any, and of a row."""
    from functools import partial

    from spatialthinker.matching import check_ready
    from spatialthinker.rewards.describe import describe
    from spatialthinker.synthetic import generate
    from verl.trainer.recording.recorder import Recorder

    check_ready()
    rng = np.random.default_rng(5)
    rows = [row for _, row in generate(PROMPTS, seed=9)]
    prose = " ".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    words = sorted({word for word in prose.split() if word.isalpha()}, key=lambda word: -prose.count(f" {word} "))
    recorder = Recorder(
        folder, "all", with_tokens, partial(describe, "spatial_sgg"), max_response_length=2 * options.tokens
    )
    recorder.background = inline = Inline()  # type: ignore[assignment]
    recorder.begin(-1)
    given = characters = 0
    for step in range(1, options.steps + 1):
        answered = make_step(rows, words, options.tokens, draws, rng)
        for number, uid in enumerate(answered.column("uid")):
            answered.groups.non_tensor_batch["uid"][number] = f"{step} {uid}"  # prompts of a first epoch
        given += sum(len(picture) for row in answered.column("images") for picture in row)
        characters += sum(map(len, answered.texts))
        recorder.read("train", step, [answered])
        recorder.write()
        while recorder.num_written < step:
            time.sleep(0.1)
    assert recorder.thread is not None and recorder.num_failed == 0, "a step was not recorded in full"
    (own,) = (each for each in psutil.Process().threads() if each.id == recorder.thread.native_id)
    recorder.close()
    pictures = [path.stat().st_size for path in (folder / "rollouts" / "images").rglob("*") if path.is_file()]
    num_rows = options.steps * PROMPTS * SAMPLES
    row_bytes = sum(path.stat().st_size for path in (folder / "rollouts").glob("*.parquet")) / num_rows
    print(f"{options.steps} steps of {PROMPTS} x {SAMPLES}, {'with all tokens' if with_tokens else 'by default'}:")
    if pictures:
        sizes = statistics.mean(pictures), max(pictures), given / len(pictures)
        mean_kb, most_kb, given_kb = (size / 1000 for size in sizes)
        print(f"  {len(pictures)} pictures of {given_kb:.1f} kB, stored as {mean_kb:.1f} kB, at most {most_kb:.1f} kB")
    print(f"  {num_rows} rows of {row_bytes:.0f} bytes, {characters / num_rows:.0f} characters")
    beside = own.user_time + own.system_time - sum(inline.seconds.values())
    cpu = {"driver's recording thread": beside, **inline.seconds}
    cpu = {name: seconds / options.steps for name, seconds in cpu.items()}
    print(f"  CPU seconds a step: {', '.join(f'{name} {seconds:.1f}' for name, seconds in cpu.items())}", flush=True)
    return statistics.mean(pictures) if pictures else 0.0, row_bytes


def measure_size(options: argparse.Namespace, folder: Path) -> int:
    found = []
    for draws, with_tokens in ((True, False), (False, True)):
        try:
            found.append(record_steps(folder / "size", options, draws, with_tokens))
        finally:
            shutil.rmtree(folder / "size", ignore_errors=True)
    picture_gb = RUN_STEPS * PROMPTS * found[0][0] / 1e9
    for name, (_, row_bytes) in zip(("by default", "with all tokens"), found, strict=True):
        row_gb = RUN_STEPS * PROMPTS * SAMPLES * row_bytes / 1e9
        total_gb = picture_gb + row_gb
        print(
            f"{RUN_STEPS} steps {name}: {picture_gb:.2f} GB of pictures + {row_gb:.2f} GB of rows = {total_gb:.2f} GB"
        )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "same", "size"))
    parser.add_argument("--pairs", type=int, default=60, help="of blocks with recording and without, at most (step)")
    parser.add_argument("--minutes", type=float, default=15, help="after which no further pair begins (step)")
    parser.add_argument("--steps", type=int, default=2, help="steps of a run (same, size)")
    parser.add_argument("--tokens", type=int, default=400, help="mean tokens of a response (size)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the blocks")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_recording"))
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return {"step": measure_step, "same": compare, "size": measure_size}[options.what](options, folder)


if __name__ == "__main__":
    sys.exit(main())
