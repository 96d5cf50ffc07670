"""Drives the quickstart: data, training, merge, evaluation, report, then the table of before and after.

Every stage is a program of its own. A stage that is done is not run again; an interrupted training goes on from its
newest checkpoint, which is the trainer's own work. `--fresh` starts over. No shell script could end the daemons that
a killed run left, measure the peak memory of all processes, and keep progress bars out of the logs.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's packages before installed ones

from toy.before_after import format_table, summarize_validation
from toy.process_tree import BYTES_PER_GB, MemorySampler, kill_owned, owned_environment

from spatialthinker.storage.files import whole_file

CONFIG = Path("configs/toy_cpu.yaml")
STAGES = {
    "data": "drawing synthetic scenes with exact boxes, relations and questions",
    "train": "GRPO with the dense spatial reward: two FSDP ranks, vLLM rollouts, validation before and after",
    "merge": "turning the last checkpoint into a Hugging Face folder",
    "evaluate": "answering the held-out questions with the merged model",
    "report": "drawing the curves and the grounded answers",
}
TRAIN_ROWS = 2048
VAL_ROWS = 256
DATA_SEED = 7
TEMPLATE = "spatial_thinker_full"
# As long as a training response may be, and as many at a time as two cores keep up with.
EVALUATION_LIMITS = ["--max_tokens", "128", "--batch_size", "64"]


class QuickstartError(Exception):
    """Something that the user can act on; `exit_code` becomes the program's."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def copy_output(source: IO[bytes], log_path: Path) -> None:
    """Copies a program's output to the terminal as it comes, and to a log without the refreshes of progress bars."""
    pending = b""
    with log_path.open("ab") as log:
        while chunk := os.read(source.fileno(), 65536):
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                log.write(line.rstrip(b"\r").rsplit(b"\r", 1)[-1] + b"\n")
            log.flush()
        log.write(pending.rsplit(b"\r", 1)[-1])


@dataclass
class RunFolder:
    """One run folder: which stages are done, what they cost, and the processes that belong to it.

    `stages.json` holds per stage the fingerprint of its command and, when it has finished, its seconds; `usage.json`
    the seconds and the highest memory over all calls, killed ones included.
    """

    folder: Path
    started_s: float
    python: str = sys.executable
    ran_stages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.owner = str(self.folder.resolve())
        digest = hashlib.sha256(self.owner.encode()).hexdigest()[:8]
        # Ray's sockets live below this folder and allow 107 characters, which a deep run folder would exceed.
        self.ray_folder = Path(tempfile.gettempdir()) / f"spatialthinker-{digest}"

    def lock(self) -> IO[str]:
        """Returns the open lock file; raises when a living quickstart holds this folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock_file = (self.folder / "lock").open("a+")
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock_file.seek(0)
            raise QuickstartError(
                f"{self.folder} is in use by process {lock_file.read().strip() or 'unknown'}; "
                "wait for it, end it, or give another --run_dir",
                exit_code=2,
            ) from None
        lock_file.truncate(0)
        lock_file.write(str(os.getpid()))
        lock_file.flush()
        return lock_file

    def clean(self, fresh: bool) -> None:
        """Ends what a killed call left running and, for a fresh start, empties the folder."""
        if count := kill_owned(self.owner):
            print(f"[quickstart] ended {count} processes that an earlier, killed run had left behind")
        shutil.rmtree(self.ray_folder, ignore_errors=True)
        if fresh:
            for path in self.folder.iterdir():
                if path.name != "lock":
                    (shutil.rmtree if path.is_dir() else Path.unlink)(path)
        self._usage_before = {"seconds": 0.0, "peak_memory_gb": 0.0} | self.read("usage.json")

    def read(self, name: str) -> dict[str, Any]:
        """Returns the content of a JSON file of the folder; empty where there is none."""
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else {}

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Writes a JSON file of the folder in one step, not waiting for the disk: usage.json comes every second."""
        with whole_file(self.folder / name) as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n")

    def usage(self, peak_bytes: int) -> dict[str, float]:
        """Returns seconds and peak memory of all calls so far, this one included."""
        before = self._usage_before
        return {
            "seconds": round(before["seconds"] + time.time() - self.started_s, 1),
            "peak_memory_gb": round(max(before["peak_memory_gb"], peak_bytes / BYTES_PER_GB), 2),
        }

    def stage(self, name: str, arguments: list[str], output: Path) -> None:
        """Runs one stage, unless the same command has finished before and its output is still there."""
        names = list(STAGES)
        label = f"[{names.index(name) + 1}/{len(names)}] {name}"
        settings = [*arguments, CONFIG.read_text()] if name == "train" else arguments
        fingerprint = hashlib.sha256("\0".join(settings).encode()).hexdigest()
        done = self.read("stages.json")
        earlier = done.get(name, {"fingerprint": fingerprint, "seconds": None})
        is_same = earlier["fingerprint"] == fingerprint
        if is_same and earlier["seconds"] is not None and output.exists():
            print(f"{label}: done before in {earlier['seconds']} s, in {output}")
            return
        if not is_same and name == "train" and output.exists():
            print(f"{label}: goes on from checkpoints of other settings; --fresh would start over")
        kept = {other: done[other] for other in names[: names.index(name)] if other in done}
        self.write("stages.json", kept | {name: {"fingerprint": fingerprint, "seconds": None}})
        log_path = self.folder / f"{name}.log"
        print(f"\n{label}: {STAGES[name]}\n{label}: output in {output}, log in {log_path}", flush=True)

        started = time.monotonic()
        self._run(name, [self.python, *arguments], log_path, label)
        seconds = round(time.monotonic() - started, 1)
        if not output.exists():
            raise QuickstartError(f"{label}: ended without an error, but {output} does not exist; see {log_path}")
        self.write("stages.json", kept | {name: {"fingerprint": fingerprint, "seconds": seconds}})
        self.ran_stages.append(name)
        print(f"{label}: done in {seconds} s, in {output}", flush=True)

    def _run(self, name: str, command: list[str], log_path: Path, label: str) -> None:
        environment = os.environ | owned_environment(self.owner) | {"PYTHONUNBUFFERED": "1"}
        environment |= {"RAY_TMPDIR": str(self.ray_folder), "RAY_USAGE_STATS_ENABLED": "0", "VLLM_NO_USAGE_STATS": "1"}
        environment.pop("RAY_ADDRESS", None)  # a cluster of the user's is not the place for a toy run
        self.ray_folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        ) as process:
            assert process.stdout is not None
            copier = threading.Thread(target=copy_output, args=(process.stdout, log_path), daemon=True)
            copier.start()
            try:
                process.wait()
            except BaseException:
                process.terminate()
                raise
            finally:
                # Whatever the program left running holds the other end of the pipe, and memory.
                kill_owned(self.owner)
                copier.join(timeout=10)
        if process.returncode:
            code = process.returncode if process.returncode > 0 else 128 - process.returncode
            # The programs exit with 2 for what the user has to change; after anything else a second try may do.
            advice = "Change what it names." if code == 2 else "The same command again goes on from here."
            raise QuickstartError(
                f"{label}: failed with exit code {code} after {time.monotonic() - started:.0f} s; its last output is "
                f"above, all of it in {log_path}. {advice}",
                exit_code=code,
            )


def newest_checkpoint(folder: Path) -> Path:
    """Returns the complete checkpoint (one with a manifest) of the highest step in `folder`."""
    complete = [path.parent for path in folder.glob("global_step_*/manifest.json")]
    steps = {int(match[1]): path for path in complete if (match := re.fullmatch(r"global_step_(\d+)", path.name))}
    if not steps:
        raise QuickstartError(f"{folder} holds no complete checkpoint; see the training's log")
    return steps[max(steps)]


def run_stages(run: RunFolder, overrides: list[str]) -> dict[str, Any]:
    """Runs all stages in order and returns the summary without the costs."""
    data = run.folder / "data"
    sizes = ["--train", str(TRAIN_ROWS), "--val", str(VAL_ROWS), "--seed", str(DATA_SEED)]
    run.stage("data", ["-m", "spatialthinker.synthetic", "--out", str(data), *sizes], data)

    checkpoints = run.folder / "checkpoints"
    settings = [f"data.train_files={data}@train", f"data.val_files={data}@val"]
    settings.append(f"trainer.save_checkpoint_path={checkpoints}")
    run.stage("train", ["-m", "verl.trainer.main", f"config={CONFIG}", *settings, *overrides], checkpoints)

    checkpoint = newest_checkpoint(checkpoints)
    merged = checkpoint / "actor" / "huggingface"
    weights = merged / "model.safetensors"
    run.stage("merge", ["scripts/model_merger.py", "--local_dir", str(checkpoint / "actor")], weights)

    evaluation = run.folder / "evaluation"
    command = ["evaluation/evals.py", "--dataset", "stvqa", "--data_path", str(data), "--template", TEMPLATE]
    command += ["--model_path", str(merged), "--provider", "huggingface", *EVALUATION_LIMITS]
    command += ["--output_dir", str(evaluation), "--custom_filename", "stvqa"]
    run.stage("evaluate", command, evaluation / "stvqa.summary.json")

    report = run.folder / "report" / "index.html"
    run.stage("report", ["scripts/report.py", "--run_dir", str(run.folder), "--out", str(report.parent)], report)
    return {
        **summarize_validation(checkpoints),
        "steps": int(checkpoint.name.rsplit("_", 1)[-1]),
        "checkpoint": str(checkpoint),
        "merged_model": str(merged),
        "report": str(report),
    }


def quickstart(run: RunFolder, overrides: list[str], fresh: bool) -> None:
    """Runs what is missing in the run folder, writes summary.json and prints the table."""
    lock_file = run.lock()
    run.clean(fresh)
    sampler = MemorySampler(on_sample=lambda peak_bytes: run.write("usage.json", run.usage(peak_bytes)))
    sampler.start()
    try:
        summary = run_stages(run, overrides)
        if run.ran_stages or not run.read("summary.json"):
            run.write("summary.json", summary | run.usage(sampler.peak_bytes))
    finally:
        sampler.stop()
        kill_owned(run.owner)
    shutil.rmtree(run.ray_folder, ignore_errors=True)
    print("\n" + format_table(run.read("summary.json")))
    print(f"summary: {run.folder / 'summary.json'}", flush=True)
    lock_file.close()


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="remove what earlier runs left in the run folder first")
    parser.add_argument("--run_dir", type=Path, default=Path("runs/quickstart"), help="default: %(default)s")
    parser.add_argument("--python", default=sys.executable, help="the Python that runs the stages; default: this one")
    parser.add_argument("--started", type=float, default=None, help="when the call began, in seconds since 1970")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides for the trainer's configuration")
    arguments = parser.parse_intermixed_args()
    for override in arguments.overrides:
        if "=" not in override:
            parser.error(f"{override!r} is neither an option nor a trainer override of the form key=value")
    return arguments, arguments.overrides


def main() -> int:
    arguments, overrides = parse_arguments()
    os.chdir(Path(__file__).resolve().parent.parent)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run = RunFolder(arguments.run_dir, arguments.started or time.time(), arguments.python)
    try:
        quickstart(run, overrides, arguments.fresh)
    except (QuickstartError, ValueError) as error:
        print(f"\n[quickstart] {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        print("\n[quickstart] interrupted; the same command again goes on from here", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
