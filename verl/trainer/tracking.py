"""Loggers of metrics and validation samples: console, JSON lines, TensorBoard, experiment trackers."""

import json
import math
import os
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from spatialthinker.storage.images import load_image
from verl.config.records import ConfigError
from verl.trainer.services import MlflowLogger, Service, ServiceError, SwanlabLogger, WandbLogger

SAMPLE_SEED = 42
MAX_SHOWN_CHARACTERS = 800


@dataclass(frozen=True)
class LoggerRun:
    """The run as loggers see it: project, experiment, folder, configuration."""

    project: str
    experiment: str
    folder: Path
    config: dict[str, Any]


class ConsoleLogger:
    """Prints one line per group of metrics and step, above a progress bar."""

    def __init__(self, run: LoggerRun):
        tqdm.write(f"{run.project} / {run.experiment}: checkpoints and logs in {run.folder}")

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        groups: dict[str, list[str]] = defaultdict(list)
        for name, value in metrics.items():
            group, _, rest = name.partition("/")
            groups[group].append(f"{rest or group} {value:.4g}" if _is_number(value) else f"{rest or group} {value}")
        lines = [f"  {group}: {', '.join(entries)}" for group, entries in groups.items()]
        tqdm.write("\n".join([f"step {step}", *lines]))

    def log_generations(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        for number, sample in enumerate(samples, 1):
            lines = [f"  {key}: {_shortened(value)}" for key, value in sample.items()]
            tqdm.write("\n".join([f"step {step}, validation sample {number} of {len(samples)}", *lines]))

    def resume(self, step: int) -> None:
        tqdm.write(f"going on after step {step}")

    def close(self) -> None:
        pass


class FileLogger:
    """Appends one JSON object per step to experiment_log.jsonl, and one per sample to generations.jsonl.

    A run resumed at an earlier step first drops the lines of later steps. Numbers that are not finite become null.
    """

    def __init__(self, run: LoggerRun):
        run.folder.mkdir(parents=True, exist_ok=True)
        self.files = {kind: run.folder / f"{kind}.jsonl" for kind in ("experiment_log", "generations")}
        self.is_aligned = False
        (run.folder / "experiment_config.json").write_text(json.dumps(run.config, indent=2) + "\n")

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self._append("experiment_log", [{"step": step, **metrics}])

    def log_generations(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        self._append("generations", [{"step": step, **sample} for sample in samples])

    def resume(self, step: int) -> None:
        for file in self.files.values():
            _drop_lines_after(file, step)
        self.is_aligned = True

    def close(self) -> None:
        pass

    def _append(self, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows and not self.is_aligned:
            self.resume(rows[0]["step"] - 1)
        with self.files[kind].open("a") as file:
            file.writelines(json.dumps(_finite(row)) + "\n" for row in rows)


class TensorBoardLogger:
    """Writes scalars and samples to the folder `tensorboard`."""

    def __init__(self, run: LoggerRun):
        self.folder = run.folder / "tensorboard"
        self.writer: Any = None
        self.purge_step: int | None = None

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        writer = self._open(step)
        for name, value in metrics.items():
            if _is_number(value):
                writer.add_scalar(name, value, step)
        writer.flush()

    def log_generations(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        for number, sample in enumerate(samples, 1):
            texts = {key: value for key, value in sample.items() if key != "images"}
            text = "\n\n".join(f"**{key}**\n\n{_indented(value)}" for key, value in texts.items())
            self._open(step).add_text(f"val/generation_{number}", text, step)
            for place, data in enumerate(sample.get("images", ()), 1):
                picture = np.asarray(load_image(data))
                tag = f"val/generation_{number}/image_{place}"
                self._open(step).add_image(tag, picture, step, dataformats="HWC")

    def resume(self, step: int) -> None:
        self.purge_step = step + 1

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _open(self, step: int) -> Any:
        """The SummaryWriter; purges earlier events of this and later steps."""
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            purge_step = step if self.purge_step is None else self.purge_step
            self.writer = SummaryWriter(str(self.folder), purge_step=purge_step)
        return self.writer


LOGGERS: dict[str, Any] = {
    "console": ConsoleLogger,
    "file": FileLogger,
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
    "swanlab": SwanlabLogger,
}
PACKAGES = {name: name for name in ("tensorboard", "wandb", "mlflow", "swanlab")}
"""Package that a logger needs, by logger."""
SERVICES = ("wandb", "mlflow", "swanlab")
TEXT_ONLY = (ConsoleLogger, FileLogger)


def check_loggers(names: Sequence[str]) -> None:
    """Checks that the loggers exist and are installed.

    Raises:
        ConfigError: unknown loggers, and missing packages.
    """
    faults = []
    for name in names:
        if name not in LOGGERS:
            faults.append(f"trainer.logger holds {name!r}: must be one of {', '.join(LOGGERS)}")
        elif name in PACKAGES and find_spec(PACKAGES[name]) is None:
            faults.append(f"trainer.logger holds {name!r}, which is not installed: pip install {PACKAGES[name]}")
    if faults:
        raise ConfigError(faults)


class Tracker:
    """Passes metrics and samples to the configured loggers.

    Args:
        loggers: keys of LOGGERS.
        project, experiment: names of the run.
        folder: for files.
        config: of the run, as plain dictionaries and lists.

    Raises:
        ConfigError: a logger is unknown, not installed or cannot be started.
    """

    def __init__(
        self, loggers: Sequence[str], project: str, experiment: str, folder: Path | str, config: dict[str, Any]
    ):
        check_loggers(loggers)
        self.folder = Path(folder)
        run = LoggerRun(project, experiment, Path(folder), config)
        self.loggers = [_start_logger(name, run) for name in dict.fromkeys(loggers)]

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Logs metrics of a step by name: Python or numpy numbers, or one-element tensors."""
        plain = {name: _plain(value) for name, value in metrics.items()}
        for logger in self.loggers:
            self._try(logger, logger.log, plain, step)

    def log_generations(self, samples: Sequence[Mapping[str, Any]], step: int, num_samples: int | None = None) -> None:
        """Logs some validation samples, of the same rows at every validation.

        Args:
            samples: with `problem`, encoded `images` and further fields.
            num_samples: number to log; None for all.
        """
        chosen = sorted(samples, key=lambda sample: str(sample.get("problem", "")))
        random.Random(SAMPLE_SEED).shuffle(chosen)
        chosen = [{name: _plain(value) for name, value in sample.items()} for sample in chosen[:num_samples]]
        texts = [{name: value for name, value in sample.items() if name != "images"} for sample in chosen]
        for logger in self.loggers:
            self._try(logger, logger.log_generations, texts if isinstance(logger, TEXT_ONLY) else chosen, step)

    def log_records(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes all records of a validation to the run's folder, one JSON object per line."""
        self._try(self, self._write_records, records, name)

    def _write_records(self, records: Sequence[Mapping[str, Any]], name: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def _try(self, logger: Any, method: Callable, *args: Any) -> None:
        """Calls a logger's method; an OSError (full disk, unreachable server) is printed and does not end the run."""
        try:
            method(*args)
        except OSError as error:
            entry = args[-1] if args else "its last entries"
            name = type(getattr(logger, "logger", logger)).__name__
            with suppress(OSError):  # of a closed pipe
                print(f"Warning: {name} could not write {entry}: {error}", flush=True)  # noqa: T201

    def resume(self, step: int) -> None:
        """Tells the loggers that the run resumes after this step; their later entries are void."""
        for logger in self.loggers:
            self._try(logger, logger.resume, step)

    def close(self) -> None:
        """Closes the loggers."""
        for logger in self.loggers:
            self._try(logger, logger.close)


def _start_logger(name: str, run: LoggerRun) -> Any:
    if name not in SERVICES:
        return LOGGERS[name](run)
    try:
        return Service(LOGGERS[name], run)
    except ServiceError as error:
        raise ConfigError(
            [
                f"trainer.logger holds {name!r}, which could not be started ({error}); check its address and key, or "
                "leave it out"
            ]
        ) from error


def _drop_lines_after(file: Path, step: int) -> None:
    """Keeps complete lines of steps up to this one; drops later and truncated lines."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines(keepends=True):
        try:
            is_kept = json.loads(line)["step"] <= step and line.endswith("\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            is_kept = False
        if is_kept:
            kept.append(line)
    rewritten = file.with_suffix(".tmp")
    rewritten.write_text("".join(kept))
    os.replace(rewritten, file)


def _plain(value: Any) -> Any:
    """The value with numpy and torch numbers converted to Python numbers, recursively."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _indented(value: Any) -> str:
    """The text as a Markdown code block, so that tags are shown."""
    return "\n".join(f"    {line}" for line in str(value).splitlines())


def _shortened(value: Any) -> str:
    text = str(value).replace("\n", "\n    ")
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]} ..."
