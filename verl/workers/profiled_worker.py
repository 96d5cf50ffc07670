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
        """Begins to note kernels."""
        on_gpu = self.device.type == "cuda"
        kernels = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        self.profile = profile(activities=[kernels], acc_events=True)
        self.profile.start()
        self.started = time.perf_counter()

    @register(Dispatch.ONE_TO_ALL)
    def kernel_seconds(self) -> tuple[dict[str, float], float]:
        """Name -> seconds of every kernel since start_kernels, and the seconds that passed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        wall = time.perf_counter() - self.started
        self.profile.stop()
        seconds: Counter[str] = Counter()
        for event in self.profile.key_averages():
            on_gpu = event.device_type != torch.autograd.DeviceType.CPU  # type: ignore[attr-defined]
            if on_gpu == (self.device.type == "cuda"):
                seconds[event.key] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        return dict(seconds), wall
