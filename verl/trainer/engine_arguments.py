"""Constructor arguments of the rollout engines (vLLM) from the configuration."""

from functools import partial
from typing import Any

from spatialthinker.multicast import nccl_only
from verl.config.auto import without_auto
from verl.config.records import Config
from verl.data.processor import pixel_limits, threads_per_rank, vision_token_ids
from verl.model.families import override_engine_config
from verl.model.internals import is_usable
from verl.model.videos import writes_timestamps

ENGINE_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
SCHEDULERS = {
    "cpu": "verl.workers.decode_scheduler.SyncDecodeScheduler",
    "cuda": "verl.workers.decode_scheduler.DecodeScheduler",
}
SHARED_PREFIX = "verl.workers.shared_prefix.SharedPrefixWorker"


def cudagraph_sizes(most: int) -> list[int]:
    """Batch sizes with a captured CUDA graph; other decode batches are padded to the next one.

    Padding adds at most an eighth to matmuls, which below 128 rows are memory-bound anyway. Each graph costs startup
    time and memory.
    """
    sizes, size = [1, 2, 4, 8], 16
    while size < most:
        sizes.append(size)
        size += max(16, 1 << (size.bit_length() - 4))
    return [*[size for size in sizes if size < most], most]


def rollout_arguments(config: Config, device: str, processor: Any) -> dict[str, Any]:
    """Constructor arguments of the engines."""
    config = without_auto(config)
    rollout, data, model = config.worker.rollout, config.data, config.worker.actor.model
    engine: dict[str, Any] = {
        "dtype": ENGINE_DTYPES[rollout.dtype],
        "max_model_len": rollout.max_model_len or data.max_prompt_length + data.max_response_length,
        "max_num_batched_tokens": rollout.max_num_batched_tokens,
        "max_num_seqs": rollout.max_num_seqs,
        "enforce_eager": rollout.enforce_eager,
        "enable_chunked_prefill": rollout.enable_chunked_prefill,
        "enable_prefix_caching": True,
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "disable_log_stats": rollout.disable_log_stats,
        "trust_remote_code": model.trust_remote_code,
        "seed": rollout.seed,
        "logprobs_mode": "processed_logprobs",
        "mamba_ssm_cache_dtype": "float32",  # states of linear attention, as the ranks compute them
    }
    if config.worker.actor.routing_replay:
        engine["enable_return_routed_experts"] = True
    if rollout.fast_scheduler and is_usable("fast scheduler"):
        engine["scheduler_cls"] = SCHEDULERS[device]
    if device == "cuda":
        engine["gpu_memory_utilization"] = rollout.gpu_memory_utilization
        if rollout.shared_prompt and is_usable("shared-prefix attention"):
            engine["worker_extension_cls"] = SHARED_PREFIX  # the engine warns where it has no effect
        engine |= nccl_only(rollout.tensor_parallel_size)
        engine.setdefault("compilation_config", {}).update(
            cudagraph_capture_sizes=cudagraph_sizes(rollout.max_num_seqs),
            cudagraph_mode="FULL_DECODE_ONLY",  # hardly a step with prompts is as small as a graph
        )
    if rollout.tensor_parallel_size > 1:
        # Own processes: with Ray vLLM would request GPUs, which the placement group's bundles hold.
        engine["distributed_executor_backend"] = "mp"
    if rollout.limit_images and processor.image_processor is not None:
        engine["limit_mm_per_prompt"] = {"image": rollout.limit_images}
    if model.override_config:
        engine["hf_overrides"] = partial(override_engine_config, overrides=model.override_config)
    if model.random_weights:
        engine["load_format"] = "dummy"  # replaced at the first sync
    if model.tokenizer_path:
        engine["tokenizer"] = model.tokenizer_path
    return {
        "model_path": model.model_path,
        "device": device,
        "engine": engine,
        "max_response_length": data.max_response_length,
        "banned_token_ids": vision_token_ids(processor),
        "image_size": pixel_limits(processor, *data.processor_bounds),
        "with_timestamps": writes_timestamps(processor),
        "memory_gb": config.trainer.memory_gb,
        "num_threads": threads_per_rank(config) * rollout.tensor_parallel_size if device == "cuda" else 1,
    }
