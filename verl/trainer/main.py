"""`python3 -m verl.trainer.main config=FILE a.b=value ...`: the only place where the parts are wired together.

`--help [SECTION | KEY]` prints the keys, `--list` the recipes, the rewards and the choices.
"""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spatialthinker.network import use_cache_without_network
from spatialthinker.output import print_any_text
from spatialthinker.versions import find_version_faults
from verl.config.loading import config_to_dict, load_config
from verl.config.records import Config, ConfigError, TrainerConfig
from verl.config.sources import COLUMN, list_sources, name_source
from verl.distributed.watchdog import Watchdog
from verl.trainer.rewards import (
    GoldReader,
    GoldScore,
    build_recorder,
    build_reward,
    check_filter_key,
    first_prompts,
    reward_key,
    row_check,
)
from verl.trainer.worker_groups import CPUS_PER_ACTOR, Laps, build_workers, cluster_address

USER_ERROR = 2
INTERRUPTED = 130
HELP_OPTIONS = {"--help", "-h", "--list"}
PROMPT_KEYS = ("prompt_key", "answer_key", "format_prompt")
RAY_TIMEOUT_S = 30
END_TIMEOUT_S = 60


def main(argv: list[str] | None = None) -> int:
    """Runs the training that the arguments describe, or prints the help they ask for; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    print_any_text()
    if HELP_OPTIONS & set(arguments):
        return print_help(arguments)
    from spatialthinker.rewards import REWARDS

    try:
        config = load_config(arguments, tuple(REWARDS))
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return USER_ERROR
    use_cache_without_network(hub_names(config))
    from verl.trainer.interrupt import Interrupted

    try:
        train(config)
    except user_errors() as error:
        print(f"\nError: {error}", file=sys.stderr)  # noqa: T201
        return USER_ERROR
    except KeyboardInterrupt as interrupt:
        print(f"\nInterrupted; the same command goes on from {config.trainer.save_checkpoint_path}", file=sys.stderr)  # noqa: T201
        return interrupt.exit_code if isinstance(interrupt, Interrupted) else INTERRUPTED
    return 0


def print_help(arguments: Sequence[str]) -> int:
    """Prints the keys of the sections and keys named, all without a name, or the list; returns the exit code."""
    from verl.config.docs import render_help, render_list

    try:
        if {"--help", "-h"} & set(arguments):
            text = render_help([name for name in arguments if "=" not in name and name not in HELP_OPTIONS])
        else:
            from spatialthinker.rewards import REWARDS

            text = render_list(REWARDS)
    except ValueError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return USER_ERROR
    print(text, end="")  # noqa: T201
    return 0


def hub_names(config: Config) -> list[str | None]:
    """Names of the run's models and data, which may be those of the hub."""
    model, critic = config.worker.actor.model, config.worker.critic.model
    files = [list_sources(files) for files in (config.data.train_files, config.data.val_files)]
    data = [source.path for sources in files for source in sources]
    return [model.model_path, model.tokenizer_path, critic.model_path, *data]


def user_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is for the user: bad input, a failed worker, a full disk or memory, divergence."""
    from verl.data.dataset import DataError
    from verl.distributed.single_controller import WorkerError
    from verl.reward import RewardError
    from verl.trainer.guards import DivergenceError, MemoryLimitError
    from verl.trainer.saver import CheckpointError

    return ConfigError, DataError, RewardError, WorkerError, CheckpointError, DivergenceError, MemoryLimitError


def train(config: Config) -> None:
    """Builds data, rewards and worker groups, in the order in which their faults are cheapest to find, and trains."""
    import psutil
    import ray

    from verl.trainer.dry_run import describe_prompt, host_memory_warning, plan_memory, print_dry_run, read_data_shape
    from verl.trainer.plan import make_plan, measure_gpu, plan_dry_run, probe_passes
    from verl.trainer.ray_trainer import GRPOTrainer, count_steps
    from verl.trainer.resume import check_resume, identify
    from verl.trainer.tracking import Tracker

    laps = Laps(psutil.Process().create_time())
    device, processor, model_shape, start = prepare(config)
    laps.mark("checks")
    stall_s = config.trainer.watchdog_timeout_s
    watchdog = Watchdog(stall_s, Path(config.trainer.save_checkpoint_path) / "stacks") if stall_s else None
    reward, recorder = build_reward(config), None
    try:
        reward.start()
        train_set, val_set = build_datasets(config, processor)
        num_steps = count_steps(config, len(train_set))
        is_needed = start is not None or not config.trainer.dry_run
        identity = identify(config, processor, train_set, val_set) if is_needed else {}
        for note in check_resume(start, config, identity) if start else []:
            print(f"Going on from {start}: {note}")  # noqa: T201
        gpu = measure_gpu(config, device)
        planning = plan_dry_run if config.trainer.dry_run else make_plan
        plan = planning(config, model_shape, read_data_shape(train_set), gpu, device == "cuda")
        config = plan.config
        phases = plan_memory(config, model_shape, train_set)
        score_gold = GoldScore(reward, config.worker.reward)
        scores = [score_gold(prompt) for rows in (train_set, val_set) for prompt in first_prompts(rows)][0]
        check_filter_key(config, scores)
        if config.trainer.dry_run:
            print_dry_run(
                config, train_set, num_steps, phases, score_gold, GoldReader(config.worker.reward), plan.lines
            )
            return
        laps.mark("data")
        print(describe_prompt(train_set, 0, scores))  # noqa: T201
        if warning := host_memory_warning(phases, device == "cpu", config.trainer.n_gpus_per_node):
            print(f"Warning: {warning}")  # noqa: T201
        tracker = Tracker(
            config.trainer.logger,
            config.trainer.project_name,
            config.trainer.experiment_name,
            Path(config.trainer.save_checkpoint_path),
            config_to_dict(config),
        )
        start_ray(config, device)
        laps.mark("Ray")
        actor, rollout = build_workers(config, device, processor, num_steps, watchdog, laps)
        print(f"Attention: {actor.run_on(0, 'describe_kernels')}", flush=True)  # noqa: T201
        pad_token_id = processor.tokenizer.pad_token_id
        print("\n".join([*plan.lines, *probe_passes(plan, actor, train_set, pad_token_id)]), flush=True)  # noqa: T201
        laps.mark("probe")
        print(laps, flush=True)  # noqa: T201
        sets = (train_set, val_set)
        recorder = build_recorder(config, *sets)
        trainer = GRPOTrainer(config, actor, rollout, reward, *sets, pad_token_id, tracker, start, identity, recorder)
        trainer.fit()
        tracker.close()
        if config.trainer.ray_timeline:
            ray.timeline(config.trainer.ray_timeline)
    finally:
        if recorder is not None:
            recorder.close()
        reward.close()
        ray.shutdown()
        if watchdog is not None:
            watchdog.remove_empty()


def prepare(config: Config) -> tuple[str, Any, Any, Path | None]:
    """Device, processor, shape of the model and checkpoint to go on from, all that is known before data are read.

    Raises:
        ConfigError: every fault of the machine, the models and the checkpoint together.
    """
    from verl.data.processor import load_run_processor
    from verl.trainer.model_checks import measure_checked_model
    from verl.trainer.saver import find_start, lock_folder
    from verl.trainer.tracking import check_loggers

    faults: list[str] = []

    def find(part: Callable[[], Any]) -> Any:
        try:
            return part()
        except ConfigError as error:
            faults.extend(error.faults)

    cluster = ThreadPoolExecutor(1).submit(check_ray_address)  # beside the rest, since what else listens there is slow
    find(lambda: check_versions(config))
    find(lambda: check_loggers(config.trainer.logger))
    device = find(lambda: choose_device(config))
    model_shape = find(lambda: measure_checked_model(config))
    processor = find(lambda: load_run_processor(config))
    has_folders = find(lambda: check_folders(config.trainer) or True)
    find(cluster.result)
    if not faults and not config.trainer.dry_run:
        find(lambda: lock_folder(Path(config.trainer.save_checkpoint_path)))
    start = find(lambda: find_start(config.trainer)) if has_folders else None
    if faults:
        raise ConfigError(faults)
    return device, processor, model_shape, start


def check_versions(config: Config) -> None:
    """Passes when the packages are those that were tried, or trainer.check_versions is off; ConfigError otherwise."""
    if config.trainer.check_versions and (faults := find_version_faults(knob="trainer.check_versions=false")):
        raise ConfigError(faults)


def check_folders(trainer: TrainerConfig) -> None:
    """Passes when files can be written into the folders of the run, which are left as they were.

    Raises:
        ConfigError: naming the key of each folder that cannot be made or written to.
    """
    folders = {"save_checkpoint_path": Path(trainer.save_checkpoint_path)}
    if trainer.ray_timeline:
        folders["ray_timeline"] = Path(trainer.ray_timeline).absolute().parent
    faults = []
    for key, folder in folders.items():
        missing = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except (OSError, ValueError) as error:
            given = getattr(trainer, key)
            faults.append(f"trainer.{key} = {given!r}: cannot be written to ({error}); name another place")
        for place in filter(os.path.isdir, missing):
            os.rmdir(place)
    if faults:
        raise ConfigError(faults)


def choose_device(config: Config) -> str:
    """The device that ranks compute on; ConfigError when this machine, being the only one, lacks the GPUs."""
    import torch

    wanted, found = config.trainer.device, torch.cuda.device_count()
    device = ("cuda" if found else "cpu") if wanted == "auto" else wanted
    if device == "cuda" and found < config.trainer.n_gpus_per_node and cluster_address() is None:
        number = config.trainer.n_gpus_per_node
        raise ConfigError(
            [f"trainer.n_gpus_per_node = {number}: this machine has {found} GPUs; lower it, or set trainer.device=cpu"]
        )
    return device


def build_datasets(config: Config, processor: Any) -> tuple[Any, Any]:
    """The training and the validation prompts, every row checked."""
    from verl.data.mixture import MixedSet, build_order, describe_shares
    from verl.trainer.ray_trainer import count_steps

    data = config.data
    options = {
        "processor": processor,
        "image_key": data.image_key,
        "image_dir": data.image_dir,
        "max_prompt_length": data.max_prompt_length,
        "min_pixels": data.min_pixels,
        "max_pixels": data.max_pixels,
        "resize_first": data.resize_first,
        "filter_overlong_prompts": data.filter_overlong_prompts,
        "on_bad_row": data.on_bad_row,
        "max_images": config.worker.rollout.limit_images,
        "videos": video_settings(config, processor),
    }
    train = {"text_only": data.text_only, "mixed_data": data.mixed_data}
    train_set = open_sources(config, data.train_files, **train, **options)
    build_order(train_set, data.rollout_batch_size, data.shuffle, data.seed)  # too few rows are named here
    if isinstance(train_set, MixedSet):
        size, num_steps = data.rollout_batch_size, count_steps(config, len(train_set))
        print("\n".join(describe_shares(train_set, size, num_steps)), flush=True)  # noqa: T201
    reads_text_alone = data.text_only and processor.image_processor is None
    return train_set, open_sources(config, data.val_files, text_only=reads_text_alone, **options)


def video_settings(config: Config, processor: Any) -> Any:
    """Settings of the videos of all data sets."""
    from verl.data.videos import VideoSettings
    from verl.model.families import read_config

    data, model, tokens_per_second = config.data, config.worker.actor.model, 1.0
    if processor.image_processor is not None:
        settings = read_config(model.model_path, model.trust_remote_code, model.override_config)
        tokens_per_second = float(getattr(settings.vision_config, "tokens_per_second", 1.0))
    names = ("video_key", "video_fps", "max_frames", "min_pixels", "max_pixels", "total_pixels")
    return VideoSettings(**{name: getattr(data, name) for name in names}, tokens_per_second=tokens_per_second)


def open_sources(config: Config, files: Any, **options: Any) -> Any:
    """The prompts of a path, or of several sources one behind the other."""
    from verl.data.dataset import RLHFDataset
    from verl.data.mixture import MixedSet

    sets = []
    for source in list_sources(files):
        own = {key: getattr(source, key) or getattr(config.data, key) for key in PROMPT_KEYS}
        own["row_check"] = row_check(config, source)
        if not isinstance(files, str):
            own["source"] = name_source(source)
            own["reward"] = None if source.reward == COLUMN else reward_key(source.reward or "", source)
        sets.append(RLHFDataset(source.path, **own, **options))
    return sets[0] if isinstance(files, str) else MixedSet(sets, list_sources(files))


def check_ray_address() -> None:
    """Passes if RAY_ADDRESS is not set or a cluster answers there; ray.init itself would wait for minutes.

    Raises:
        ConfigError: it does not answer, with Ray's reason.
    """
    address = cluster_address()
    if address is None:
        return
    program = "import ray, sys; ray.init(sys.argv[1], logging_level='ERROR', log_to_driver=False)"
    try:
        tried = subprocess.run(
            [sys.executable, "-c", program, address], capture_output=True, text=True, timeout=RAY_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        reason = f"no answer within {RAY_TIMEOUT_S} s"
    else:
        reason = tried.stderr.strip().rpartition("\n")[2] if tried.returncode else None
    if reason is not None:
        raise ConfigError(
            [f"RAY_ADDRESS = {address!r}: no Ray cluster can be joined there ({reason}); unset it, or start Ray"]
        )


def start_ray(config: Config, device: str) -> None:
    """Joins the cluster of RAY_ADDRESS or starts a local one that is large enough for the actors.

    Job systems send SIGTERM to all processes, and a closed terminal SIGHUP. Ray's inherit a mask in which these wait,
    so that the driver, which alone answers them, can still save; it ends them with ray.shutdown, or they end with it.

    Raises:
        ConfigError: Ray did not start.
    """
    import ray

    address = cluster_address()
    local: dict[str, Any] = {}
    if address is None:
        check_this_machine(config, device)
        needed = int(2 * CPUS_PER_ACTOR * config.num_ranks) + 1
        local = {"num_cpus": max(needed, len(os.sched_getaffinity(0))), "include_dashboard": False}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
    try:
        # Not None, which would join a cluster that somebody else has left on this machine.
        ray.init(address=address or "local", logging_level=logging.WARNING, **local)
    except Exception as error:  # noqa: BLE001  of many types; what Ray lacks on this machine is the user's to mend
        raise ConfigError([f"Ray could not be started ({address or 'on this machine'}): {error}"]) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def check_this_machine(config: Config, device: str) -> None:
    """Passes if one machine is enough for the run.

    Raises:
        ConfigError: it asks for more machines or GPUs.
    """
    import torch

    trainer = config.trainer
    faults = []
    if trainer.nnodes > 1:
        faults.append(
            f"trainer.nnodes = {trainer.nnodes}: several machines need a running Ray cluster; start Ray on each and "
            "set RAY_ADDRESS, or set trainer.nnodes=1"
        )
    num_gpus = torch.cuda.device_count()
    if device == "cuda" and trainer.n_gpus_per_node > num_gpus:
        faults.append(
            f"trainer.n_gpus_per_node = {trainer.n_gpus_per_node}: this machine has {num_gpus} GPUs; lower it, or set "
            "trainer.device=cpu"
        )
    if faults:
        raise ConfigError(faults)


if __name__ == "__main__":
    from verl.trainer.main import main as imported_main  # so that pickled classes have an importable home

    exit_code = imported_main()
    # Python waits for all threads, and one may never return: of a folder or a service that does not answer.
    deadline = threading.Timer(END_TIMEOUT_S, os._exit, (exit_code,))
    deadline.daemon = True
    deadline.start()
    sys.exit(exit_code)
