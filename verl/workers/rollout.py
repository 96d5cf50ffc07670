"""The rollout worker: a vLLM engine in its own Ray actor, colocated with the training worker of its device."""

import operator
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spatialthinker.storage.images import load_image
from verl.distributed.single_controller import Dispatch, register
from verl.model.log_probs import BANNED_LOGIT_BIAS
from verl.model.videos import Video, engine_inputs
from verl.protocol import DataProto
from verl.workers.routing import group_experts, record_routing, switch_routing

CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCH_COMPILE_DISABLE": "1",  # a small model's steps save less than compiling takes, or loading
}
"""Environment of an engine on a CPU, whose process has to start with it: torch reads its own as it is imported."""
RENDER_AHEAD_DIVISOR = 4
"""Fraction of threads (1 / n) that preprocess prompts while the ranks train."""
NUM_SEEDS = 2**32
"""Seeds are below this: numpy's limit."""


class GpuMemory(NamedTuple):
    """Bytes of a GPU: free now, free when its engine started to allocate, and the share that the engine may take."""

    free: int
    at_start: int
    share: int


class RolloutWorker:
    """A vLLM engine of one group of devices.

    Args:
        rank, world_size: of the engines.
        model_path: folder or hub name.
        device: "cpu" or "cuda".
        engine: keyword arguments of vllm.LLM.
        max_response_length: R.
        banned_token_ids: never sampled: image and video tokens, since a response has no images.
        image_size: min_pixels and max_pixels of the image processor, as in training.
        num_threads: for image preprocessing.
        memory_gb: GiB of each GPU of which the engine takes its share; None: all.
        with_timestamps: prompts state the times of a video's frames, see verl.model.videos.writes_timestamps.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        model_path: str,
        device: str,
        engine: dict[str, Any],
        max_response_length: int,
        banned_token_ids: list[int],
        image_size: dict[str, int],
        num_threads: int = 1,
        memory_gb: float | None = None,
        with_timestamps: bool = False,
    ):
        self.rank = rank
        self.world_size = world_size
        self.model_path = model_path
        self.device = device
        self.engine_kwargs = engine
        self.max_response_length = max_response_length
        self.banned = {token: BANNED_LOGIT_BIAS for token in banned_token_ids}
        self.image_size = image_size
        self.num_threads = num_threads
        self.memory_gb = memory_gb
        self.with_timestamps = with_timestamps
        self.is_receiving = False
        self.rendered: dict[Any, Any] = {}

    @register(Dispatch.ONE_TO_ALL)
    def load(self) -> dict[str, float]:
        """Starts the engine in this process, in sleep mode on a GPU; returns the seconds of imports and engine."""
        start = time.perf_counter()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if self.device == "cpu":
            os.environ.update(CPU_ENVIRONMENT)  # for one that is no actor, as far as nothing has read it yet
        from vllm import LLM

        imported = time.perf_counter()
        is_cuda = self.device == "cuda"
        if is_cuda and self.memory_gb is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            self.engine_kwargs["gpu_memory_utilization"] *= min(1.0, self.memory_gb * 1024**3 / total)
        self.llm = LLM(
            self.model_path,
            mm_processor_kwargs=self.image_size,
            mm_processor_cache_gb=0,  # not thread-safe, and a step's images occur once
            enable_sleep_mode=is_cuda,
            skip_mm_profiling=not is_cuda,
            weight_transfer_config={"backend": "ipc"} if is_cuda else None,
            **self.engine_kwargs,
        )
        if "scheduler_cls" in self.engine_kwargs:
            core = self.llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]  # of an in-process client
            core.request_block_hasher = hash_prompts_once(core.request_block_hasher)
        if self.engine_kwargs.get("enable_return_routed_experts"):
            self.llm.collective_rpc(record_routing)
        self.warn_without_shared_prompt()
        self.sleep()
        return {"imports": imported - start, "engine": time.perf_counter() - imported}

    @register(Dispatch.ONE_TO_ALL)
    def memory(self) -> list[GpuMemory]:
        """Memory of the engine's GPUs."""
        return self.llm.collective_rpc(_memory)

    def warn_without_shared_prompt(self) -> None:
        """Prints a warning when cascade attention was requested and is not supported."""
        if "worker_extension_cls" not in self.engine_kwargs:
            return
        for fault in sorted(set(self.llm.collective_rpc("shared_prompt_fault")) - {""}):
            print(  # noqa: T201
                f"worker.rollout.shared_prompt=true has no effect: the engine's {fault}, and only FlashAttention 3 on "
                "Hopper GPUs reads a prompt once; every sample reads its own",
                flush=True,
            )

    @register(Dispatch.ONE_TO_ALL)
    def sleep(self) -> None:
        """Sleep mode: frees the engine's GPU memory for training; no-op on a CPU."""
        if self.device == "cuda":
            self.llm.sleep(level=2)

    @register(Dispatch.ONE_TO_ALL)
    def wake_up(self, tags: list[str] | None = None) -> None:
        """Allocates the GPU memory of "weights" or "kv_cache" (default both) again."""
        if self.device == "cuda":
            self.llm.wake_up(tags=tags)

    @register(Dispatch.ONE_TO_ALL)
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Weight sync on a CPU: replaces the weights and resets the caches."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(weights)})
        self._reset_caches()

    def receive_weights(self, update: dict[str, Any]) -> None:
        """Weight sync on GPUs: loads a chunk of weights from the training ranks' memory by CUDA IPC.

        Args:
            update: names, dtype_names, shapes and ipc_handles, as in vLLM's weight transfer.
        """
        if not self.is_receiving:
            self.llm.start_weight_update()
            self.is_receiving = True
        self.llm.update_weights({"update_info": update})

    def finish_weights(self) -> None:
        """Ends the weight sync of receive_weights and resets the caches."""
        self.llm.finish_weight_update()
        self.is_receiving = False
        self._reset_caches()

    def _reset_caches(self) -> None:
        """Resets encoder cache and prefix cache, which older weights computed."""
        self.llm.llm_engine.reset_encoder_cache()
        self.llm.reset_prefix_cache()

    @register(Dispatch.DP_COMPUTE_METRIC)
    def render_ahead(self, prompts: DataProto) -> None:
        """Preprocesses prompts for the next call of `generate`; drops unused earlier ones.

        Args:
            prompts: non-tensors as of `generate`.
        """
        self.rendered.clear()
        keys = [_prompt_key(*row) for row in zip(*self._columns(prompts), strict=True)]
        # Training needs CPU time for kernel launches.
        with ThreadPoolExecutor(max(1, self.num_threads // RENDER_AHEAD_DIVISOR)) as pool:
            self.rendered.update(zip(keys, pool.map(self._render, *self._columns(prompts)), strict=True))

    @staticmethod
    def _columns(prompts: DataProto) -> list[Any]:
        videos = prompts.non_tensor_batch.get("videos", [()] * len(prompts))
        return [*(prompts.non_tensor_batch[key] for key in ("raw_prompt_ids", "images")), videos]

    @register(Dispatch.DP_COMPUTE_PROTO)
    def generate(self, prompts: DataProto) -> DataProto:
        """Generates n responses per prompt.

        Args:
            prompts: non-tensors `raw_prompt_ids` (image tokens not expanded), `images` (encoded bytes), `videos` (may
                be missing) and, if each response has a limit of its own, `max_tokens` (n numbers); meta `sampling`
                (vLLM's SamplingParams fields), `seed`, `log_probs` and `experts` (True returns them).

        Returns:
            `responses`, `response_mask` (by the engine's lengths, not by EOS) and, with `log_probs`,
            `rollout_log_probs`: [G, n, R], right-padded. With `experts` a column of that name: per prompt the experts
            [P + sum of R, layers, K] that its tokens and then those of its responses were sent to.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self.engine_kwargs.get("enable_return_routed_experts"):
            switch_routing(self.llm, prompts.meta_info.get("experts", False))
        sampling = dict(prompts.meta_info["sampling"])
        with_log_probs = prompts.meta_info.get("log_probs", False)
        parameters = SamplingParams(
            **sampling,
            max_tokens=self.max_response_length,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            logit_bias=self.banned or None,
            logprobs=0 if with_log_probs else None,
        )
        # In all processes of the engine, which must sample alike. Samples then depend on the step alone, not on
        # earlier calls.
        seed = prompts.meta_info["seed"] * self.world_size + self.rank
        self.llm.collective_rpc(_seed, args=(seed % NUM_SEEDS,))
        limits = prompts.non_tensor_batch.get("max_tokens")
        requests = [[parameters]] * len(prompts) if limits is None else [_split(parameters, each) for each in limits]
        responses = self._run(self._columns(prompts), requests)
        shape = len(prompts), sampling.get("n", 1)
        padded = self._pad(responses, shape, with_log_probs)
        if prompts.meta_info.get("experts", False):
            padded.non_tensor_batch["experts"] = group_experts(responses, shape[1])
        return padded

    def _run(self, columns: Iterable[Any], requests: list[list[Any]]) -> list[Any]:
        """Responses of all prompts in order; generation overlaps with image preprocessing.

        A prefill step starts whenever max_num_batched_tokens are queued, so batches do not depend on thread timing.
        """
        engine = self.llm.llm_engine
        finished, num_tokens = [], 0

        def step() -> None:
            finished.extend(output for output in engine.step() if output.finished)

        with ThreadPoolExecutor(self.num_threads) as pool:
            for engine_input, each in zip(pool.map(self._rendered, *columns), requests, strict=True):
                for parameters in each:
                    engine.add_request(str(next(self.llm.request_counter)), engine_input, parameters)
                num_tokens += len(engine_input["prompt_token_ids"])
                if num_tokens >= self.engine_kwargs["max_num_batched_tokens"]:
                    step()
                    num_tokens = 0
        while engine.has_unfinished_requests():
            step()
        finished.sort(key=lambda output: int(output.request_id))
        return [
            response for output in finished for response in sorted(output.outputs, key=operator.attrgetter("index"))
        ]

    def _rendered(self, ids: Sequence[int], images: Sequence[bytes], videos: Sequence[Video] = ()) -> Any:
        """A preprocessed prompt, from `render_ahead` if it is there."""
        ready = self.rendered.pop(_prompt_key(ids, images, videos), None) if self.rendered else None
        return self._render(ids, images, videos) if ready is None else ready

    def _render(self, ids: Sequence[int], images: Sequence[bytes], videos: Sequence[Video] = ()) -> Any:
        """Preprocesses a prompt for the engine; LLM.generate would do so serially while the GPU idles."""
        prompt: Any = {"prompt_token_ids": list(ids)}
        if len(images):
            prompt["multi_modal_data"] = {"image": [load_image(data) for data in images]}
        if len(videos):
            data, options = engine_inputs(videos, self.with_timestamps)
            prompt["multi_modal_data"] = prompt.get("multi_modal_data", {}) | {"video": data}
            prompt["mm_processor_kwargs"] = options
        return self.llm.renderer.render_cmpl([prompt])[0]

    def _pad(self, completions: list[Any], counts: tuple[int, int], with_log_probs: bool) -> DataProto:
        shape = (*counts, self.max_response_length)
        responses = np.zeros(shape, dtype=np.int64)
        mask = np.zeros(shape, dtype=bool)
        log_probs = np.zeros(shape, dtype=np.float32)
        for (group, sample), completion in zip(np.ndindex(counts), completions, strict=True):
            ids = list(completion.token_ids)
            index = (group, sample, slice(len(ids)))
            responses[index] = ids
            mask[index] = True
            if with_log_probs:
                log_probs[index] = [
                    entry[token].logprob for entry, token in zip(completion.logprobs, ids, strict=True)
                ]
        tensors = {"responses": torch.from_numpy(responses), "response_mask": torch.from_numpy(mask)}
        if with_log_probs:
            tensors["rollout_log_probs"] = torch.from_numpy(log_probs)
        return DataProto.from_dict(tensors=tensors)


def _split(parameters: Any, limits: Iterable[int]) -> list[Any]:
    """Settings of a request for each response, with its own limit of tokens."""
    requests = []
    for limit in limits:
        own = copy(parameters)
        own.n, own.max_tokens = 1, int(limit)
        requests.append(own)
    return requests


def _prompt_key(ids: Sequence[int], images: Sequence[bytes], videos: Sequence[Video]) -> tuple[tuple[Any, ...], ...]:
    """The cache key of a preprocessed prompt."""
    return tuple(ids), tuple(images), tuple(videos)


def hash_prompts_once(hash_blocks: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
    """Wraps vLLM's block hasher for prefix caching: hashes the prompt of n samples once, not n times.

    Samples of a prompt are consecutive and hold the same objects.
    """
    last: tuple[Any, ...] = ()
    hashes: list[Any] = []

    def hash_or_reuse(request: Any) -> list[Any]:
        nonlocal last, hashes
        if request.num_tokens > request.num_prompt_tokens:
            return hash_blocks(request)  # with generated tokens
        prompt = (request.prompt_token_ids, request.cache_salt, request.lora_request, *request.mm_features)
        if len(prompt) != len(last) or not all(map(operator.is_, prompt, last)):
            last, hashes = prompt, hash_blocks(request)
        return list(hashes)

    return hash_or_reuse


def _memory(worker: Any) -> GpuMemory:
    """Memory of the GPU of one process of the engine, by what vLLM noted when it started."""
    free, _ = torch.cuda.mem_get_info(worker.device)
    return GpuMemory(free, worker.init_snapshot.free_memory, worker.requested_memory)


def _seed(worker: Any, seed: int) -> None:
    """Seeds an engine worker's generators: sampling uses torch's on a CPU, and seeds from numpy's on a GPU."""
    from vllm.utils.torch_utils import set_random_seed

    set_random_seed(seed)
