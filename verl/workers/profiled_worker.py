"""A training worker that notes its kernels, for benchmarks."""

import time
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from verl.distributed.single_controller import Dispatch, register
from verl.workers.fsdp_worker import FSDPWorker


class ProfiledWorker(FSDPWorker):
    """A training worker whose kernels are noted between two calls."""

    @register(Dispatch.ONE_TO_ALL)
    def start_kernels(self) -> None:
        """Begins to note kernels, and on a GPU also what the host does."""
        on_gpu = self.device.type == "cuda"
        of_gpu = [ProfilerActivity.CUDA] if on_gpu else []
        self.profile = profile(activities=[ProfilerActivity.CPU, *of_gpu], acc_events=True)
        self.profile.start()
        self.started = time.perf_counter()

    @register(Dispatch.ONE_TO_ALL)
    def kernel_seconds(self) -> tuple[dict[str, float], dict[str, float], float]:
        """Name -> seconds of every kernel since start_kernels, of every operator of the host, and all seconds.

        On a CPU its operators are the kernels.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        wall = time.perf_counter() - self.started
        self.profile.stop()
        kernels: Counter[str] = Counter()
        of_host: Counter[str] = Counter()
        for event in self.profile.key_averages():
            on_gpu = event.device_type != torch.autograd.DeviceType.CPU  # type: ignore[attr-defined]
            part = kernels if on_gpu or self.device.type != "cuda" else of_host
            part[event.key] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        return dict(kernels), dict(of_host), wall
