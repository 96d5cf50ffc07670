"""Experiment trackers: Weights & Biases, MLflow, SwanLab.

A resumed training continues the same run, by the run id stored in its folder. A server that fails or does not answer
holds the run up for a limited time and does not end it.
"""

import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from spatialthinker.storage.images import load_image

START_TIMEOUT_S = 120.0
TIMEOUT_S = 60.0
"""Limits of a wait for a service, at its start and for each entry."""
RUN_ID_CHARACTERS = 21  # required by SwanLab


def _stored_id(folder: Path, service: str) -> str | None:
    file = folder / f"{service}_run_id"
    return file.read_text().strip() if file.is_file() else None


def _store_id(folder: Path, service: str, run_id: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{service}_run_id").write_text(f"{run_id}\n")


def _own_id(folder: Path, service: str) -> str:
    """The run id stored in this folder; created if missing."""
    run_id = _stored_id(folder, service) or uuid.uuid4().hex[:RUN_ID_CHARACTERS]
    _store_id(folder, service, run_id)
    return run_id


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def _pictures(sample: Mapping[str, Any]) -> list[Any]:
    return [load_image(data) for data in sample.get("images", ())]


def _text_columns(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for sample in samples for name in sample if name != "images"))


class ServiceError(OSError):
    """A service failed or did not answer in time."""


class Service:
    """A logger of a service, whose calls are made in order in a thread of their own, so that none can hang the run.

    While a call that exceeded its limit goes on, later ones queue without a wait.

    Args:
        logger: class of the logger.
        run: for the logger.

    Raises:
        ServiceError: the service could not be started; later calls raise it too.
    """

    def __init__(self, logger: Callable[[Any], Any], run: Any):
        self.calls: SimpleQueue = SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()
        self.last = self._start(logger, run)
        self.logger = self._wait(START_TIMEOUT_S)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self._call(self.logger.log, metrics, step)

    def log_generations(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        self._call(self.logger.log_generations, samples, step)

    def resume(self, step: int) -> None:
        self._call(self.logger.resume, step)

    def close(self) -> None:
        self.last = self._start(self.logger.close)
        self._wait(TIMEOUT_S)

    def _serve(self) -> None:
        while True:
            future, call, args = self.calls.get()
            try:
                future.set_result(call(*args))
            except BaseException as error:  # noqa: BLE001  each service has types of its own
                future.set_exception(error)

    def _start(self, call: Callable, *args: Any) -> Future:
        future: Future = Future()
        self.calls.put((future, call, args))
        return future

    def _call(self, call: Callable, *args: Any) -> None:
        is_behind = not self.last.done()
        self.last = self._start(call, *args)
        if is_behind:
            raise ServiceError("it still waits for an answer to an earlier entry; this one is queued")
        self._wait(TIMEOUT_S)

    def _wait(self, limit_s: float) -> Any:
        try:
            return self.last.result(limit_s)
        except BaseException as error:  # noqa: BLE001
            if isinstance(error, KeyboardInterrupt):
                raise
            is_late = isinstance(error, TimeoutError) and not self.last.done()
            reason = f"no answer within {limit_s:g} s" if is_late else f"{type(error).__name__}: {error}"
            raise ServiceError(reason) from error


class WandbLogger:
    """Weights & Biases: metrics, and one table of samples with images per validation."""

    def __init__(self, run: Any):
        import wandb

        run_id = _own_id(run.folder, "wandb")
        names = {"project": run.project, "name": run.experiment, "dir": str(run.folder)}
        self.wandb = wandb
        self.run = wandb.init(**names, config=run.config, id=run_id, resume="allow")

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def log_generations(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        columns = _text_columns(samples)
        table = self.wandb.Table(columns=["step", *columns, "images"])
        for sample in samples:
            images = [self.wandb.Image(picture) for picture in _pictures(sample)]
            table.add_data(step, *(str(sample.get(name, "")) for name in columns), images)
        self.run.log({"val/generations": table}, step=step)

    def resume(self, step: int) -> None:
        """No-op: the server keeps later steps and ignores logs until they pass them."""

    def close(self) -> None:
        self.run.finish()


class MlflowLogger:
    """MLflow: metrics, and one table of all validation samples with images."""

    def __init__(self, run: Any):
        import mlflow

        self.mlflow = mlflow
        mlflow.set_experiment(run.project)
        known = _stored_id(run.folder, "mlflow")
        active = mlflow.start_run(run_id=known, run_name=run.experiment)
        _store_id(run.folder, "mlflow", active.info.run_id)
        if known is None:
            mlflow.log_params(_flat(run.config))

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self.mlflow.log_metrics(_numbers(metrics), step=step)

    def log_generations(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        if not samples:
            return
        columns: dict[str, list[Any]] = {"step": [step] * len(samples)}
        columns |= {name: [str(sample.get(name, "")) for sample in samples] for name in _text_columns(samples)}
        pictures = [_pictures(sample) for sample in samples]
        if all(pictures):  # a column holds images alone
            columns["image"] = [self.mlflow.Image(images[0]) for images in pictures]
        self.mlflow.log_table(columns, artifact_file="generations.json")

    def resume(self, step: int) -> None:
        """No-op: MLflow keeps values of later steps beside new ones."""

    def close(self) -> None:
        self.mlflow.end_run()


class SwanlabLogger:
    """SwanLab: metrics, and validation samples as texts and images."""

    def __init__(self, run: Any):
        import swanlab

        self.swanlab = swanlab
        run_id = _own_id(run.folder, "swanlab")
        names = {"project": run.project, "experiment_name": run.experiment, "logdir": str(run.folder / "swanlab")}
        swanlab.init(**names, config=run.config, id=run_id, resume="allow")

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self.swanlab.log(_numbers(metrics), step=step)

    def log_generations(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        columns = _text_columns(samples)
        texts = [
            self.swanlab.Text("\n\n".join(f"{name}: {sample.get(name, '')}" for name in columns)) for sample in samples
        ]
        images = [self.swanlab.Image(picture) for sample in samples for picture in _pictures(sample)]
        shown = {"val/generations": texts} | ({"val/images": images} if images else {})
        self.swanlab.log(shown, step=step)

    def resume(self, step: int) -> None:
        """No-op: the server ignores steps that it has."""

    def close(self) -> None:
        self.swanlab.finish()


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
