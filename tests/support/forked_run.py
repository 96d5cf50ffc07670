"""The real training loop over real FSDP ranks in forked processes, with recorded rollouts instead of engines.

What Ray and vLLM would do is replaced: calls go through pipes, and responses are a function of prompt and seed.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoProcessor

from spatialthinker.synthetic import generate
from tests.support.tiny_model_folder import save_tiny_model
from verl.config.loading import config_to_dict, load_config
from verl.config.records import Config, ConfigError
from verl.data.dataset import RLHFDataset
from verl.distributed.fsdp import open_store
from verl.distributed.single_controller import Dispatch, WorkerError, WorkerGroup, WorkerSpec, register
from verl.protocol import DataProto
from verl.reward import RewardError
from verl.trainer.guards import DivergenceError
from verl.trainer.ray_trainer import GRPOTrainer, count_steps
from verl.trainer.resume import check_resume, identify
from verl.trainer.saver import CheckpointError, find_start, lock_folder
from verl.trainer.tracking import Tracker
from verl.workers.fsdp_worker import FSDPWorker

FORK = multiprocessing.get_context("fork")  # importing torch anew takes longer than a run
ROOT = Path(__file__).parents[2]
RESPONSE_TOKENS = 12


class Rank(FSDPWorker):
    """A rank without engines beside it."""

    @register(Dispatch.ONE_TO_ALL)
    def send_weights(self, engines: list[Any]) -> None:
        """Nobody to send them to."""


def _serve(pipe: Any, rank: int, arguments: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    worker = Rank(rank=rank, **arguments)
    if rank == 0:
        worker.store, port = open_store("127.0.0.1")
        pipe.send(port)
    while True:
        method, args, kwargs = pipe.recv()
        pipe.send(getattr(worker, method)(*args, **kwargs))


class ForkedGroup(WorkerGroup):
    """Ranks in forked processes; `before_call` sees the name of each method first."""

    def __init__(self, config: Config, num_steps: int, before_call: Callable[[str], None]):
        arguments = {"config": config, "device": "cpu", "num_steps": num_steps, "world_size": config.num_ranks}
        self.spec = WorkerSpec(cls=Rank, kwargs={}, name="actor")
        self.actors, self.before_call, self.lock = [], before_call, threading.Lock()
        for rank in range(config.num_ranks):
            here, there = FORK.Pipe()
            FORK.Process(target=_serve, args=(there, rank, arguments), daemon=True).start()
            there.close()  # or a rank that has died would be waited for
            self.actors.append(here)
        self.load("127.0.0.1", self.actors[0].recv())

    def start(self, method: str, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        def wait() -> Any:
            self.before_call(method)
            dispatch = getattr(Rank, method).dispatch
            parts = self._split(args, kwargs) if dispatch is not Dispatch.ONE_TO_ALL else [(args, kwargs)] * len(self)
            with self.lock:
                for pipe, (part, named) in zip(self.actors, parts, strict=True):
                    pipe.send((method, part, named))
                results = [pipe.recv() for pipe in self.actors]
            return DataProto.concat(results) if dispatch is Dispatch.DP_COMPUTE_PROTO else results

        return wait


class RecordedRollout:
    """An engine whose responses are known beforehand."""

    actors: list[Any] = []

    def __init__(self, before_call: Callable[[str], None]):
        self.before_call = before_call

    def __len__(self) -> int:
        return 1

    def start(self, method: str, prompts: DataProto) -> Callable[[], None]:
        assert method == "render_ahead" and len(prompts)
        return lambda: self.before_call(method)

    def wake_up(self, tags: list[str]) -> None:
        pass

    def sleep(self) -> None:
        pass

    def generate(self, prompts: DataProto) -> DataProto:
        self.before_call("generate")
        n, seed = prompts.meta_info["sampling"]["n"], prompts.meta_info["seed"]
        rows = []
        for ids in prompts.non_tensor_batch["raw_prompt_ids"]:
            generator = torch.Generator().manual_seed(seed * 7919 + sum(ids))
            rows.append(torch.randint(0, 250, (n, RESPONSE_TOKENS + 1), generator=generator))
        drawn = torch.stack(rows)
        lengths = drawn[..., -1:] % RESPONSE_TOKENS + 1
        mask = torch.arange(RESPONSE_TOKENS) < lengths
        tensors = {"responses": drawn[..., :-1] * mask, "response_mask": mask}
        if prompts.meta_info["log_probs"]:
            tensors["rollout_log_probs"] = -5.0 * mask
        return DataProto.from_dict(tensors=tensors)


class RecordedScores:
    """Scores that depend on the tokens alone, or an error."""

    def __init__(self, groups: DataProto, is_broken: bool):
        self.scores = (groups.batch["responses"].sum(-1) % 7).float() / 7
        self.texts = ["" for _ in range(self.scores.numel())]
        self.is_broken = is_broken
        self.counts: dict[str, float] = {}

    def result(self, since: float | None = None) -> dict[str, torch.Tensor]:
        if self.is_broken:
            raise RewardError("the reward function raised ZeroDivisionError: no score today")
        return {"overall": self.scores}


class RecordedReward:
    """A reward that raises in the call number `fails_at`."""

    def __init__(self, fails_at: int = 0):
        self.num_calls, self.fails_at = 0, fails_at

    def submit(self, groups: DataProto, step: int = 0) -> RecordedScores:
        self.num_calls += 1
        return RecordedScores(groups, self.num_calls == self.fails_at)

    def decode(self, groups: DataProto) -> list[str]:
        return ["" for _ in range(groups.batch["responses"][..., 0].numel())]


def make_inputs(folder: Path) -> None:
    """A tiny model and eight rows: two steps an epoch."""
    save_tiny_model(folder / "model")
    pictures = [{"bytes": row.images, "path": None} for _, row in generate(8, seed=1)]
    rows = [
        {"problem": f"<image> {number}?", "answer_option_text": "A", "images": picture}
        for number, picture in enumerate(pictures)
    ]
    Dataset.from_list(rows).to_parquet(folder / "train-0.parquet")


def make_config(folder: Path, run: Path, *overrides: str) -> Config:
    return load_config(
        [
            f"config={ROOT / 'configs' / 'toy_cpu.yaml'}",
            f"worker.actor.model.model_path={folder / 'model'}",
            f"data.train_files={folder}@train",
            f"data.val_files={folder}@train",
            f"trainer.save_checkpoint_path={run}",
            "data.rollout_batch_size=4",
            "data.max_prompt_length=64",
            f"data.max_response_length={RESPONSE_TOKENS}",
            "worker.rollout.n=2",
            "worker.actor.global_batch_size=2",
            "worker.actor.optim.lr=1e-3",
            "worker.actor.optim.lr_scheduler_type=cosine",
            "trainer.max_steps=5",
            "trainer.save_freq=1",
            "trainer.val_freq=2",
            "trainer.val_before_train=false",
            "trainer.logger=[file]",
            *overrides,
        ]
    )


def train(config: Config, before_call: Callable[[str], None], fails_at: int = 0) -> None:
    """Trains to the end in this process and children of it."""
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(config.worker.actor.model.model_path)
    prompts = RLHFDataset(config.data.train_files, processor)
    lock_folder(Path(config.trainer.save_checkpoint_path))
    start = find_start(config.trainer)
    identity = identify(config, processor, prompts, prompts)
    for note in check_resume(start, config, identity) if start else []:
        print(note, flush=True)
    tracker = Tracker(config.trainer.logger, "p", "e", config.trainer.save_checkpoint_path, config_to_dict(config))
    actor = ForkedGroup(config, count_steps(config, len(prompts)), before_call)
    rollout, reward = RecordedRollout(before_call), RecordedReward(fails_at)
    parts: Any = (actor, rollout, reward, prompts, prompts, 0, tracker, start, identity)
    GRPOTrainer(config, *parts).fit()


def fork(config: Config, on_call: Callable[[str, int], None] | None = None, fails_at: int = 0) -> Any:
    """The process of a training, leader of its group; `on_call` is told each method and how often it was called."""
    calls: list[str] = []

    def before_call(method: str) -> None:
        calls.append(method)
        if on_call is not None:
            on_call(method, calls.count(method))

    def body() -> None:
        os.setsid()
        log = Path(config.trainer.save_checkpoint_path).with_suffix(".log").open("a")
        sys.stdout = sys.stderr = log
        code = 1
        try:
            train(config, before_call, fails_at)
            code = 0
        except (RewardError, ConfigError, CheckpointError, DivergenceError, WorkerError) as error:
            print(error, flush=True)
            code = 2
        except KeyboardInterrupt as error:
            code = getattr(error, "exit_code", 130)
        except Exception:  # noqa: BLE001
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)  # without waiting for the ranks

    process = FORK.Process(target=body)
    process.start()
    return process


def kill_at(method: str, count: int) -> Callable[[str, int], None]:
    """Lets the driver and all ranks die by SIGKILL at that call."""

    def on_call(called: str, times: int) -> None:
        if (called, times) == (method, count):
            os.killpg(0, signal.SIGKILL)

    return on_call


def run(config: Config, on_call: Callable[[str, int], None] | None = None, fails_at: int = 0) -> int:
    """The exit code of a training in a process of its own."""
    return finish(fork(config, on_call, fails_at))


def finish(process: Any, timeout_s: float = 180) -> int:
    """The exit code of a forked training, once it ended; what is left of its ranks is ended."""
    _wait(process, timeout_s)
    has_ended = process.exitcode is not None
    kill(process)
    assert has_ended, f"no end after {timeout_s} s"
    return process.exitcode


def kill(process: Any) -> int:
    """Lets the driver and all ranks die by SIGKILL; the exit code, which is another if it had ended before."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it does not lead its group yet
        process.kill()
    _wait(process, 10)
    return process.exitcode


def _wait(process: Any, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while process.exitcode is None and time.monotonic() < deadline:  # join() would wait for the ranks, too
        time.sleep(0.02)
