"""`python -m verl.bench step --config configs/bench_3b_h100.yaml [a.b=value ...]`: time per phase of a training step.

Runs the real trainer (Ray, FSDP2, vLLM) on random images and prompts filled to data.max_prompt_length, with responses
of exactly data.max_response_length tokens, and prints one table. Every choice is a key of the configuration. A model
folder of RANDOM_MODELS is made on the spot. `--prompt_tokens 1586` fills prompts to that, `--lengths
lognormal:330:0.6` draws the responses' lengths, up to the two keys; roofline times are then of their mean.

`python -m verl.bench passes` runs the passes alone, without an engine, with prompts shared and repeated.
`python -m verl.bench rollout` runs the rollout only, to compare engine options; `--rows 8 --rows 64` times decode
steps of so many sequences.
`python -m verl.bench ablation` disables one optimization per run, and prints one row for each.

`--gpus 4` gives each of four GPUs the load of one in the configuration (weak scaling); `--against ONE.json` adds times
relative to a run with `--dump ONE.json`.
"""

# ruff: noqa: T201  a table on the terminal is what this is for
import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from verl.bench.ablation import UNDONE, run_ablation
from verl.bench.decode import parse_rows, time_decode
from verl.bench.inputs import lognormal
from verl.bench.passes import parse_shape, print_ratio, run_passes
from verl.bench.setting import ROOFLINE_FLOPS, prepare
from verl.bench.turns import (
    COMPARED_IN,
    LEAST_STEPS,
    PLAIN_STEPS,
    check_turns,
    compare_turns,
    limit_responses,
    print_turns,
    replay_in_turns,
)

ROOFLINE_BYTES = 3e12
"""Bytes/s of an H100's memory."""
ROLLOUT_METRICS = (
    "reward/overall",
    "perf/num_response_tokens",
    "perf/total_num_tokens",
    "perf/max_host_memory_share",
)
"""Step metrics that the trainer reads, when only the rollout runs."""
LATER_STEPS = slice(1, None)
"""Steps that are summarised: those after the first, which is warm-up."""
MEMORY_IN_USE = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")


def own_gpus() -> list[str]:
    """nvidia-smi arguments that select the GPUs visible to CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [f"--id={visible}"] if visible else []


class MetricsRecorder:
    """A tracker that stores metrics in memory."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.steps.append(dict(metrics))
        print(f"step {step}: {json.dumps(self.steps[-1], default=float)}", flush=True)

    def log_generations(self, *_: Any) -> None:
        pass

    def resume(self, step: int) -> None:
        pass


class GpuMemory(threading.Thread):
    """Samples used memory of the run's GPUs by nvidia-smi: training ranks and engines together."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, float]] = []  # (seconds, GiB)

    def run(self) -> None:
        command = [*MEMORY_IN_USE, *own_gpus(), "-lms", "100"]
        try:
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                for line in process.stdout or ():
                    self.samples.append((time.perf_counter(), float(line) / 1024))
        except FileNotFoundError:
            return

    def peak(self, spans: list[tuple[float, float]]) -> float:
        """Peak memory of any GPU within the spans, in GiB; 0 without a GPU."""
        return max((gb for at, gb in self.samples if any(a <= at <= b for a, b in spans)), default=0.0)


def make_trainer(config: Any, recorder: MetricsRecorder, processor: Any, device: str, is_step: bool) -> Any:
    """The trainer of verl.trainer.main without validation, with recorded time spans of each phase.

    Checkpoints are written only if trainer.save_freq is positive, and not always at the last step. Without `is_step`
    only the rollout of each step runs.
    """
    from verl.trainer.dry_run import read_data_shape
    from verl.trainer.main import build_datasets, start_ray
    from verl.trainer.metrics import PhaseTimer
    from verl.trainer.model_checks import measure_checked_model
    from verl.trainer.plan import make_plan, measure_gpu, probe_passes
    from verl.trainer.ray_trainer import GRPOTrainer
    from verl.trainer.rewards import build_reward
    from verl.trainer.saver import TrainState
    from verl.trainer.worker_groups import Laps, build_workers

    class SpanTimer(PhaseTimer):
        """Phases with the times at which they began and ended, printed as they end."""

        def __init__(self) -> None:
            super().__init__()
            self.spans: dict[str, list[tuple[float, float]]] = {}

        @contextmanager
        def __call__(self, name: str) -> Iterator[None]:
            start = time.perf_counter()
            with super().__call__(name):
                yield
            self.spans.setdefault(name, []).append((start, time.perf_counter()))
            print(f"step {trainer.step} {name}: {time.perf_counter() - start:.2f} s", flush=True)

    class BenchTrainer(GRPOTrainer):
        groups: Any

        def _validate(self) -> dict[str, float]:
            return {}

        def _save(self, score: float | None = None) -> None:
            if self.config.trainer.save_freq > 0:
                super()._save(score)
            self.saver.saved_step = self.trained.step  # nothing is worth keeping

        def train_step(self) -> dict[str, Any]:
            if is_step:
                return super().train_step()
            with self.timer("gen"), self.engines.awake():
                groups = self.batches.make(self.engines.generate).groups
            if self.step < self.num_steps:
                self.engines.render_ahead(self.batches.upcoming())
                self.engines.finish_rendering()  # not timed: in training it overlaps with the update
            num_tokens = float(groups.batch["response_mask"].sum())
            self.unlogged = dict.fromkeys(ROLLOUT_METRICS, 0.0) | {"perf/num_response_tokens": num_tokens}
            self.trained = TrainState(self.step, self.batches.position, self.kl.coef)
            return self.unlogged

        def _finish_step(self, groups: Any, scores: Any, metrics: dict[str, Any]) -> dict[str, Any]:
            self.groups = groups
            return super()._finish_step(groups, scores, metrics)

    laps, reward = Laps(), build_reward(config)
    train_set, val_set = build_datasets(config, processor)
    gpu = measure_gpu(config, device)
    plan = make_plan(
        config,
        measure_checked_model(config),
        read_data_shape(train_set),
        gpu,
        device == "cuda",
    )
    config = plan.config
    laps.mark("data")
    start_ray(config, device)
    laps.mark("Ray")
    actor, rollout = build_workers(config, device, processor, config.trainer.max_steps, None, laps)
    print(
        "\n".join([*plan.lines, *probe_passes(plan, actor, train_set, processor.tokenizer.pad_token_id)]), flush=True
    )
    laps.mark("probe")
    print(laps, flush=True)
    arguments = (config, actor, rollout, reward, train_set, val_set, processor.tokenizer.pad_token_id, recorder)
    trainer = BenchTrainer(*arguments)  # type: ignore[arg-type]
    trainer.timer = trainer.engines.timer = SpanTimer()
    return trainer


def length_distribution(text: str) -> Any:
    """The distribution of response lengths that the command line names."""
    try:
        return lognormal(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text} is not lognormal:MEDIAN:SIGMA, a median of at least 1 token and a deviation of its logarithm"
        ) from None


def summarise(
    config: Any,
    trainer: Any,
    recorder: MetricsRecorder,
    memory: GpuMemory,
    pictures: tuple[int, int],
    prompt_tokens: int,
    shown: slice = LATER_STEPS,
) -> dict[str, Any]:
    """Phase -> seconds, and per rank tokens/s, MFU, roofline times in seconds, and peak memory, of the steps `shown`.

    Roofline of a rollout: prefill and decode FLOPs with shared prompts at ROOFLINE_FLOPS, and decode memory traffic at
    ROOFLINE_BYTES; the two hardly overlap.
    """
    from transformers import AutoConfig

    from verl.model.flops import group_flops, rollout_bytes
    from verl.trainer.ray_trainer import num_old_prompts

    steps = recorder.steps[shown] or recorder.steps
    data, rollout, actor = config.data, config.worker.rollout, config.worker.actor
    ranks = config.num_ranks
    num_responses = data.rollout_batch_size * rollout.n
    written = statistics.median(step["perf/num_response_tokens"] for step in steps) / num_responses
    lengths, (num_images, patches) = (prompt_tokens, round(written)), pictures
    model = AutoConfig.from_pretrained(actor.model.model_path)
    forward, sampling = (
        group_flops(model, patches, *lengths, rollout.n, is_shared, num_images).total * data.rollout_batch_size / ranks
        for is_shared in (actor.shared_prompt, True)
    )
    num_sequences = num_responses * rollout.tensor_parallel_size // ranks
    num_prompts = num_sequences // rollout.n if rollout.shared_prompt else num_sequences
    read = rollout_bytes(model.get_text_config(), *lengths, num_sequences, num_prompts) / rollout.tensor_parallel_size
    outputs = num_responses * written / ranks
    inputs = data.rollout_batch_size * prompt_tokens / ranks + outputs
    old = num_old_prompts(config) / data.rollout_batch_size

    spans = trainer.timer.spans

    def seconds(name: str) -> float:
        return statistics.median(step.get(f"timing_s/{name}", 0.0) for step in steps)

    whole, sync = seconds("step"), seconds("weight_sync")
    rows = {
        "rollout": (seconds("gen") - sync - seconds("sleep"), outputs, sampling, "gen"),
        "weight sync + wake": (sync, 0.0, 0.0, "weight_sync"),
        "sleep": (seconds("sleep"), 0.0, 0.0, "sleep"),
        "images": (seconds("load"), 0.0, 0.0, "load"),
        "old": (seconds("old"), old * inputs, old * forward, "old"),
        "reference": (seconds("ref"), inputs, forward, "ref"),
        "update": (seconds("update_actor"), inputs, 3 * forward, "update_actor"),
    }
    if not seconds("update_actor"):  # nothing was trained
        whole, forward = seconds("gen"), 0.0
        rows = {name: rows[name] for name in ("rollout", "weight sync + wake", "sleep")}
    rows["rest"] = (whole - sum(row[0] for row in rows.values()), 0.0, 0.0, "")
    rows["whole step"] = (whole, inputs if forward else 0.0, (4 + old) * forward, "step")
    return {
        name: {
            "seconds": round(time_s, 3),
            "tokens_per_s": round(tokens / time_s) if tokens and time_s else None,
            "mfu": round(flops / time_s / ROOFLINE_FLOPS, 3) if flops and time_s and name != "rollout" else None,
            "flops_floor_s": round(flops / ROOFLINE_FLOPS, 2) if flops else None,
            "bytes_floor_s": round(read / ROOFLINE_BYTES, 2) if name == "rollout" else None,
            "peak_gib": round(memory.peak(spans.get(span, [])[shown] or spans.get(span, [])), 1),
        }
        for name, (time_s, tokens, flops, span) in rows.items()
    }


def print_table(table: dict[str, dict[str, Any]]) -> None:
    """One aligned line per phase."""
    for name, cells in {"phase": {c: c for c in next(iter(table.values()))}, **table}.items():
        print(f"{name:20s}" + "".join(f"{'' if cell is None else cell:>15}" for cell in cells.values()), flush=True)


def read_table(file: str) -> dict[str, dict[str, Any]]:
    """The table of an earlier run with `--dump`, for comparison."""
    try:
        return json.loads(Path(file).read_text())["table"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{file} is not what a step or rollout wrote with --dump: {error}") from None


def file_to_read(file: str) -> str:
    """The path of an existing file."""
    if not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"{file}: there is no such file")
    return file


def file_to_write(file: str) -> str:
    """The path of a file in an existing folder, checked before the measurement."""
    if not Path(file).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{file}: there is no folder {Path(file).parent}; make it first")
    return file


def add_times(table: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> None:
    """Adds the column `times`: seconds relative to another table."""
    for name, row in table.items():
        seconds = other[name]["seconds"] if name in other else 0.0
        row["times"] = round(row["seconds"] / seconds, 3) if seconds else None


def run_benchmark(arguments: argparse.Namespace) -> None:
    """Runs the configured steps and prints the table, and then the speedup by prompt sharing."""
    import ray
    import torch

    from verl.config.loading import config_to_dict

    setting, dump = prepare(arguments), arguments.dump
    device, is_step = setting.device, arguments.what == "step"
    if arguments.in_turns:
        check_turns(arguments.in_turns, setting.config, arguments.lengths)
    memory, recorder = GpuMemory(), MetricsRecorder()
    memory.start()
    trainer = make_trainer(setting.config, recorder, setting.processor, device, is_step)
    config = trainer.config
    if arguments.lengths:
        limit_responses(trainer, arguments.lengths, arguments.in_turns == "lengths")
    if arguments.in_turns == "replay":
        replay_in_turns(trainer)
    try:
        if arguments.rows:
            decode = time_decode(trainer, arguments.rows)
            if dump:
                Path(dump).write_text(json.dumps({"config": config_to_dict(config), "decode": decode}, indent=1))
            return
        trainer.fit()
        shown = PLAIN_STEPS if arguments.in_turns else LATER_STEPS
        table = summarise(config, trainer, recorder, memory, setting.pictures, setting.prompt_tokens, shown)
        name = f"{config.num_ranks} x {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}"
        which = "those of even numbers" if arguments.in_turns else "those after the first"
        print(f"\n{name}: {len(recorder.steps)} steps, medians of {which}")
        if arguments.against:
            add_times(table, arguments.against)
        print_table(table)
        result = {"device": name, "config": config_to_dict(config), "table": table, "steps": recorder.steps}
        if arguments.in_turns:
            result["in_turns"] = compare_turns(recorder.steps)
            print_turns(arguments.in_turns, result["in_turns"])
        if dump:
            Path(dump).write_text(json.dumps(result, indent=1))
        if is_step and arguments.ratio_groups:
            num_groups = min(arguments.ratio_groups * config.num_ranks, config.data.rollout_batch_size)
            result["ratio"] = print_ratio(trainer.actor, trainer.groups[:num_groups])
            if dump:
                Path(dump).write_text(json.dumps(result, indent=1))
    finally:
        trainer.reward.close()
        ray.shutdown()


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and runs the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m verl.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["step", "passes", "rollout", "ablation"])
    parser.add_argument("--config", required=True, type=file_to_read)
    parser.add_argument(
        "--undo", choices=list(UNDONE), action="append", help="a row of an ablation; all if none is named"
    )
    parser.add_argument("--image", default="800x600", help="width x height of the pictures")
    parser.add_argument("--frames", type=int, default=0, help="a video of so many of these pictures in place of one")
    parser.add_argument(
        "--prompt_tokens",
        type=int,
        help="tokens of every prompt; max_prompt_length, which also bounds it, if left out",
    )
    parser.add_argument(
        "--lengths",
        type=length_distribution,
        help="lognormal:MEDIAN:SIGMA, of the responses up to max_response_length, or up to a shape's",
    )
    parser.add_argument(
        "--ratio_groups", type=int, default=16, help="groups of a rank for shared against repeated; 0: skip it"
    )
    parser.add_argument("--shared_only", action="store_true", help="passes with shared prompts alone")
    parser.add_argument(
        "--shape",
        type=parse_shape,
        action="append",
        default=[],
        help="PROMPT:RESPONSE:N of passes, once for each: tokens of a prompt and of a response, responses of a group",
    )
    parser.add_argument(
        "--rows",
        type=parse_rows,
        action="append",
        default=[],
        help="sequences of an engine's decode steps, whose time a rollout then prints for each number",
    )
    parser.add_argument(
        "--in_turns",
        choices=list(LEAST_STEPS),
        help="every second step without routing replay, or with responses of equal length; prints the difference",
    )
    parser.add_argument("--kernels", action="store_true", help="what passes spend their time on, by kind of kernel")
    parser.add_argument("--memory_gb", type=float, help="GiB of each GPU that the run may take: trainer.memory_gb")
    parser.add_argument("--gpus", type=int, help="GPUs of this machine that have the configuration's load of one each")
    parser.add_argument(
        "--against", type=read_table, help="what a run with --dump wrote; each phase's time as a multiple of its time"
    )
    parser.add_argument("--dump", type=file_to_write, help="JSON file for everything that was measured")
    parser.add_argument("overrides", nargs="*", help="keys of the configuration, a.b=value")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.undo and arguments.what != "ablation":
        parser.error("--undo names rows of an ablation; give the key itself, a.b=value")
    if arguments.shape and arguments.what != "passes":
        parser.error("--shape is of passes; name the lengths by keys, data.max_prompt_length=1586")
    if (choice := arguments.in_turns) and arguments.what not in COMPARED_IN[choice]:
        parser.error(f"--in_turns {choice} is of {'s and '.join(COMPARED_IN[choice])}s")
    if arguments.shared_only and arguments.what != "passes":
        parser.error("--shared_only is of passes; --ratio_groups 0 leaves the comparison out of a step")
    if arguments.kernels and arguments.what != "passes":
        parser.error("--kernels is of passes")
    if arguments.rows and (arguments.what != "rollout" or arguments.lengths or arguments.against):
        parser.error("--rows is of rollouts, whose responses are all as long, and compares with nothing")
    if arguments.frames < 0:
        parser.error(f"--frames {arguments.frames}: a video has at least one frame; 0 shows a picture")
    if arguments.what == "passes" and arguments.against:
        parser.error("--against is of steps; a run of passes compares shapes, --shape 1586:400:8")
    if arguments.against and arguments.what == "ablation":
        parser.error("--against is of one run; an ablation compares its rows with its first")
    if arguments.what == "ablation":
        step = ["--config", arguments.config, "--image", arguments.image, *arguments.overrides]
        step += ["--gpus", str(arguments.gpus)] if arguments.gpus else []
        step += ["--frames", str(arguments.frames)] if arguments.frames else []
        step += ["--prompt_tokens", str(arguments.prompt_tokens)] if arguments.prompt_tokens else []
        step += ["--memory_gb", str(arguments.memory_gb)] if arguments.memory_gb else []
        return run_ablation(step, arguments.undo or list(UNDONE), arguments.dump)
    from verl.trainer.main import user_errors

    try:
        run_passes(arguments) if arguments.what == "passes" else run_benchmark(arguments)
    except user_errors() as error:
        print(error, file=sys.stderr)
        return 2
    return 0
