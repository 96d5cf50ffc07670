"""The FSDP training worker of one rank: policy, reference and critic; log-probs, updates, checkpoints."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig
from transformers.utils.logging import disable_progress_bar

from verl.algos.divergences import FULL_KL
from verl.config.auto import without_auto
from verl.config.records import Config, FSDPConfig, OptimConfig
from verl.data.processor import load_run_processor, pixel_limits, threads_per_rank, vision_token_ids
from verl.distributed import checkpoint
from verl.distributed.allocator import expand_segments
from verl.distributed.cpu_offload import Offloader
from verl.distributed.fsdp import DTYPES, full_tensor, init_mesh, join_store, lr_factor, open_store, shard
from verl.distributed.host_memory import host_memory_metrics
from verl.distributed.optim import allocate_states, build_optimizer, state_tensors
from verl.distributed.single_controller import Dispatch, register
from verl.model.attention import compile_backward, describe_attention, import_kernels
from verl.model.checkpointing import CHECKPOINTING
from verl.model.families import critic_path, dummy_image, vision_encoder
from verl.model.fused_layers import embed_by_products, fuse_layers
from verl.model.lora import ADAPTER_FOLDER, adapters_off, add_adapters, gather_adapters, has_adapters, save_adapters
from verl.model.qwen_vl import ResponseLogProbs, ResponseValues, check_image_tokens, image_patches, load_model
from verl.model.videos import in_order
from verl.protocol import DataProto
from verl.workers.actor import Actor, Groups, PolicyBatch, UpdateSettings
from verl.workers.critic import Critic, ValueSettings
from verl.workers.probe import probe_update
from verl.workers.weight_sync import send_weights

PREPARE_DIVISOR = 4
"""Fraction of threads (1 / n) that preprocess images while the engines sample."""


def _images_of(groups: DataProto) -> list[Any]:
    """Images and videos of all groups, in their order."""
    columns = groups.non_tensor_batch
    rows = zip(columns["images"], columns.get("videos", [()] * len(groups)), strict=True)
    return [image for row in rows for image in in_order(*row)]


class FSDPWorker:
    """Actor, reference and critic of one rank.

    A step's batch is loaded once by `load_groups` and kept; later calls exchange only computed tensors.

    Args:
        rank, world_size: of the training ranks.
        config: of the run.
        device: "cpu" or "cuda".
        num_steps: training steps of the run, for the LR schedule.
    """

    def __init__(self, rank: int, world_size: int, config: Config, device: str, num_steps: int):
        self.rank = rank
        self.world_size = world_size
        self.config = without_auto(config)
        self.device = torch.device(device)
        self.num_steps = num_steps
        self.processor: Any = None
        self.read_ahead: ResponseLogProbs | None = None  # the policy before it is sharded
        self.groups: Groups | None = None
        self.prepared: dict[Any, tuple[torch.Tensor, Any]] = {}  # image or video -> patches and grid
        self.peak_memory: dict[str, float] = {}  # phase -> GiB
        self.update_tokens: int | None = None  # of an update's pass, where probing has lowered them
        self.offloader = Offloader()  # of models and optimizers
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        disable_progress_bar()

    @register(Dispatch.ONE_TO_ALL)
    def open_store(self) -> tuple[str, int]:
        """Opens the rendezvous store on rank 0; returns its host and port."""
        host = ray.util.get_node_ip_address()
        self.store, port = open_store(host)
        return host, port

    @register(Dispatch.ONE_TO_ALL)
    def read(self) -> None:
        """Reads all that needs no GPU: the processor and, unless its weights are drawn there, the policy.

        Reference and critic are left to `load`, so that host memory never holds more than one whole model of a rank.
        """
        self.processor = load_run_processor(self.config)
        if not self.config.worker.actor.model.random_weights:
            self.read_ahead = self._read_model(trainable=True)
        import_kernels(self.device)

    @register(Dispatch.ONE_TO_ALL)
    def load(self, host: str, port: int) -> None:
        """Joins the process group and builds the sharded models and optimizers; reads first, unless that is done."""
        if self.processor is None:
            self.read()
        store = self.store if self.rank == 0 else join_store(host, port)
        worker = self.config.worker
        roles = (worker.actor, worker.ref, worker.critic)
        with_cpu_backend = any(role.fsdp.enable_cpu_offload for role in roles)
        self.mesh = init_mesh(store, self.rank, self.world_size, self.device, with_cpu_backend=with_cpu_backend)
        if self.device.type == "cuda":
            expand_segments()
            if (memory_gb := self.config.trainer.memory_gb) is not None:
                total = torch.cuda.get_device_properties(self.device).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gb * 1024**3 / total))
        self.shard_writer = checkpoint.ShardWriter()
        actor = self.config.worker.actor
        self.policy, self.read_ahead = self.read_ahead or self._read_model(trainable=True), None
        self._shard(self.policy, actor, actor.fsdp)
        self.optimizer = self._add_optimizer(self.policy, actor)
        budget = actor.model.activation_budget_gb if actor.model.enable_gradient_checkpointing else None
        self.actor = Actor(self.policy, self.device, self.optimizer, actor.images_once, budget)
        self.actor.load_balancing_coef = actor.load_balancing_coef
        self.reference = None
        if not self.config.algorithm.disable_kl:
            model = self.policy
            if not has_adapters(model):
                model = self._read_model(trainable=False)
                self._shard(model, worker.ref, actor.fsdp)
            self.reference = Actor(model, self.device, images_once=actor.images_once)
            self.reference.disables_adapters = model is self.policy
        self.critic = None
        if self.config.algorithm.adv_estimator == "gae":
            model = self._build_critic()
            optimizer = self._add_optimizer(model, worker.critic)
            self.critic_writer = checkpoint.ShardWriter()
            self.critic = Critic(model, self.device, optimizer, actor.images_once)
            compile_backward(*self._attention(model, worker.critic))
        compile_backward(*self._attention(self.policy, actor))
        self._release_cache()

    @register(Dispatch.ONE_TO_ALL)
    def describe_kernels(self) -> str:
        """A description of the attention kernels in use."""
        return describe_attention(*self._attention(self.policy, self.config.worker.actor))

    def _attention(self, model: Any, settings: Any) -> tuple[torch.device, torch.dtype, Any]:
        """Device, type and decoder's configuration, on which attention kernels depend."""
        return self.device, DTYPES[settings.fsdp.mp_param_dtype], model.model.config.get_text_config()

    def _release_cache(self) -> None:
        """Frees torch's CUDA cache, before later allocations fragment it: the engine needs the memory."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _read_model(self, trainable: bool) -> ResponseLogProbs:
        """The policy or reference, not sharded yet; frozen weights have the compute dtype."""
        settings, model_config = self.config.worker.actor, self.config.worker.actor.model
        stored, computed = DTYPES[settings.fsdp.torch_dtype], DTYPES[settings.fsdp.mp_param_dtype]
        is_frozen = not trainable or model_config.lora.rank > 0
        dtype, overrides = computed if is_frozen else stored, model_config.override_config
        random_on = self.device if model_config.random_weights else None
        model = load_model(model_config.model_path, dtype, model_config.trust_remote_code, overrides, random_on)
        if self.device.type == "cuda":
            embed_by_products(model)
            if model_config.use_fused_layers:
                fuse_layers(model)
        if not trainable:
            model.requires_grad_(False)
        elif model_config.lora.rank:
            add_adapters(model, model_config.lora, stored, self.config.trainer.seed)
        if model_config.freeze_vision_tower and (encoder := vision_encoder(model)) is not None:
            encoder.requires_grad_(False)
        if trainable and model_config.enable_gradient_checkpointing:
            model.gradient_checkpointing_enable(CHECKPOINTING)
        return ResponseLogProbs(model, vision_token_ids(self.processor))

    def _shard(self, model: torch.nn.Module, settings: Any, types: FSDPConfig) -> None:
        """Shards a model with the dtypes of `types` and offloads it as `settings` ask."""
        cpu_offload = settings.fsdp.enable_cpu_offload
        if not cpu_offload:
            model.to(self.device)
        dtypes = DTYPES[types.mp_param_dtype], DTYPES[types.mp_reduce_dtype]
        shard(model, self.mesh, *dtypes, cpu_offload, settings.offload.offload_params)
        if settings.offload.offload_params and not cpu_offload:
            self.offloader.offload(model, model.parameters)

    def _add_optimizer(self, model: torch.nn.Module, settings: Any) -> torch.optim.Optimizer:
        """Builds the optimizer with its states, offloaded as `settings` ask."""
        optimizer = build_optimizer(model, settings.optim)
        with self._on_device(model):
            allocate_states(optimizer)
        if settings.offload.offload_optimizer and not settings.fsdp.enable_cpu_offload:
            self.offloader.offload(optimizer, lambda: state_tensors(optimizer))
        self._release_cache()
        return optimizer

    @contextmanager
    def _on_device(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None, changes: bool = False
    ) -> Iterator[None]:
        """Context with offloaded parameters and states on the device; `changes`: True when they may be modified."""
        with self.offloader.on_device(model, optimizer, have_changed=changes):
            try:
                yield
            finally:
                if isinstance(model, FSDPModule):
                    model.reshard()  # the root unit stays gathered without a backward pass

    def _reference_on_device(self, reference: Actor | None) -> AbstractContextManager[None]:
        """As `_on_device` for a reference that is a separate model; else an empty context."""
        if reference is None or reference.model is self.policy:
            return nullcontext()
        return self._on_device(reference.model)

    def _build_critic(self) -> ResponseValues:
        settings, path = self.config.worker.critic, critic_path(self.config)
        dtype, overrides = DTYPES[settings.fsdp.torch_dtype], settings.model.override_config
        model = load_model(path, dtype, settings.model.trust_remote_code, overrides)
        if self.device.type == "cuda":
            embed_by_products(model)
        if settings.model.freeze_vision_tower and (encoder := vision_encoder(model)) is not None:
            encoder.requires_grad_(False)
        if settings.model.enable_gradient_checkpointing:
            model.gradient_checkpointing_enable(CHECKPOINTING)
        wrapped = ResponseValues(model)
        self._shard(wrapped, settings, settings.fsdp)
        return wrapped

    @register(Dispatch.DP_COMPUTE_METRIC)
    def load_groups(self, data: DataProto) -> None:
        """Stores this rank's groups and preprocesses their images and videos.

        Meta `shared_prompt` and `images_once` override the configuration, for benchmarks.
        """
        settings = self.config.worker.actor
        self.shared_prompt = data.meta_info.get("shared_prompt", settings.shared_prompt)
        for actor in filter(None, (self.actor, self.reference, self.critic)):
            actor.images_once = data.meta_info.get("images_once", settings.images_once)
        images = _images_of(data)
        self._prepare(images)
        pixels, grids = [self.prepared[image][0] for image in images], [self.prepared[image][1] for image in images]
        self.prepared = {}
        has_vision = vision_encoder(self.policy.model) is not None
        if has_vision and not pixels and self.world_size > 1:  # FSDP gathers the vision encoder on all ranks
            patches, grid = dummy_image(self.policy.model)
            pixels, grids = [patches], [grid]
        self.groups = Groups.from_proto(data, pixels, grids)
        check_image_tokens(self.groups.prompts, self.groups.images, grids, self.processor)

    @register(Dispatch.DP_COMPUTE_METRIC)
    def prepare_images(self, prompts: DataProto) -> None:
        """Preprocesses images and videos for the next `load_groups`, while the engines need most of the processors.

        Those of an earlier call are dropped: host memory holds one batch of a step that draws several.
        """
        images = _images_of(prompts)
        self.prepared = {image: self.prepared[image] for image in images if image in self.prepared}
        self._prepare(images, PREPARE_DIVISOR)

    def _prepare(self, images: Sequence[Any], thread_divisor: int = 1) -> None:
        """Adds the patches and grids of images and videos that are not there yet, by a fraction of the threads."""
        missing = [image for image in dict.fromkeys(images) if image not in self.prepared]
        size = pixel_limits(self.processor, *self.config.data.processor_bounds)
        dtype = DTYPES[self.config.worker.actor.fsdp.mp_param_dtype]
        num_threads = threads_per_rank(self.config) // thread_divisor if self.device.type == "cuda" else 1
        by, of_videos = self.processor.image_processor, getattr(self.processor, "video_processor", None)
        pairs = zip(*image_patches(missing, by, dtype, max(1, num_threads), of_videos, **size), strict=True)
        self.prepared |= dict(zip(missing, pairs, strict=True))

    @register(Dispatch.ONE_TO_ALL)
    def probe(self) -> list[str]:
        """Sizes an update's passes by running those of the loaded groups, and returns lines on what was chosen."""
        assert self.groups is not None, "load_groups comes first"
        actor, rollout = self.config.worker.actor, self.config.worker.rollout
        planned = self._max_tokens(actor.micro_batch_size_per_device_for_update)
        with self._on_device(self.policy, self.optimizer):
            least, limit = self._max_tokens(1), self.config.trainer.memory_gb
            fit = probe_update(self.actor, self.groups, planned, least, rollout.temperature, limit)
        self.update_tokens = fit.tokens
        self.groups = None
        self._release_cache()
        return fit.describe()

    def _log_probs(self, actor: Actor, key: str, start: int = 0) -> DataProto:
        assert self.groups is not None, "load_groups comes first"
        settings = self.config.worker.actor
        self._reset_peak_memory()
        log_probs, entropies = actor.compute_log_probs(
            self.groups,
            self._max_tokens(settings.micro_batch_size_per_device_for_experience),
            self.shared_prompt,
            self.config.worker.rollout.temperature,
            start,
        )
        if actor is self.actor:
            self.groups.entropies = entropies
        self.peak_memory[key.removesuffix("_log_probs")] = self._peak_memory_gb()
        return DataProto.from_dict(tensors={key: log_probs})

    def _reset_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _peak_memory_gb(self) -> float:
        """Peak allocated GPU memory since the last reset, in GiB; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() / 1024**3 if self.device.type == "cuda" else 0.0

    def _max_tokens(self, num_sequences: int) -> int:
        """Token budget of a micro-batch: num_sequences of full length."""
        return num_sequences * (self.config.data.max_prompt_length + self.config.data.max_response_length)

    @register(Dispatch.DP_COMPUTE_PROTO)
    def compute_log_probs(self, data: DataProto) -> DataProto:
        """`old_log_probs` [G, n, R] of the loaded groups; `data` only carries the split over ranks.

        With meta `from_second_update` those of the first update, which is on-policy, are skipped (NaN).
        """
        size = self.config.worker.actor.global_batch_size // self.world_size
        with self._on_device(self.policy):
            return self._log_probs(self.actor, "old_log_probs", data.meta_info.get("from_second_update", False) * size)

    @register(Dispatch.DP_COMPUTE_PROTO)
    def mean_entropies(self, data: DataProto) -> DataProto:
        """`entropy_mean` [G, n] of the loaded groups, of the policy that sampled them, as far as the step's passes had
        it; NaN otherwise. `data` only carries the split over ranks."""
        assert self.groups is not None, "load_groups comes first"
        return DataProto.from_dict(tensors={"entropy_mean": self.groups.mean_entropies()})

    @register(Dispatch.DP_COMPUTE_PROTO)
    def compute_ref_log_probs(self, data: DataProto) -> DataProto:
        """`ref_log_probs` [G, n, R] of the loaded groups; `data` only carries the split over ranks."""
        assert self.reference is not None
        if self.reference.model is self.policy:
            with self._on_device(self.policy), adapters_off(self.policy):
                return self._log_probs(self.reference, "ref_log_probs")
        with self._on_device(self.reference.model):
            return self._log_probs(self.reference, "ref_log_probs")

    @register(Dispatch.DP_COMPUTE_PROTO)
    def compute_full_kl(self, data: DataProto) -> DataProto:
        """Full `kl` [G, n, R] of the loaded groups; `data` only carries the split over ranks."""
        assert self.groups is not None and self.reference is not None
        settings = self.config.worker.actor
        with self._on_device(self.policy), self._reference_on_device(self.reference):
            kl = self.actor.compute_full_kl(
                self.reference,
                self.groups,
                self._max_tokens(settings.micro_batch_size_per_device_for_experience),
                self.shared_prompt,
                self.config.worker.rollout.temperature,
            )
        return DataProto.from_dict(tensors={"kl": kl})

    @register(Dispatch.DP_COMPUTE_PROTO)
    def compute_values(self, data: DataProto) -> DataProto:
        """`values` [G, n, R] of the loaded groups; `data` only carries the split over ranks."""
        assert self.groups is not None and self.critic is not None
        budget = self._max_tokens(self.config.worker.critic.micro_batch_size_per_device_for_experience)
        with self._on_device(self.critic.model):
            values = self.critic.compute_values(self.groups, budget, self.shared_prompt)
        return DataProto.from_dict(tensors={"values": values})

    def _step_settings(self, settings: Any) -> dict[str, Any]:
        """Fields of StepSettings from the config section of actor or critic."""
        return {
            "num_groups_per_mini_batch": settings.global_batch_size // self.world_size,
            "max_tokens": self._max_tokens(settings.micro_batch_size_per_device_for_update),
            "shared_prompt": self.shared_prompt,
            "ppo_epochs": settings.ppo_epochs,
            "max_grad_norm": settings.max_grad_norm,
            "loss_avg_mode": settings.loss_avg_mode,
            "max_response_length": self.config.data.max_response_length,
            "temperature": self.config.worker.rollout.temperature,
        }

    @register(Dispatch.DP_COMPUTE_METRIC)
    def update_critic(self, data: DataProto) -> dict[str, tuple[float, float]]:
        """Updates the critic on the loaded groups with `values` and `returns`; metrics as (sum, weight)."""
        assert self.groups is not None and self.critic is not None and self.critic.optimizer is not None
        critic = self.config.worker.critic
        self.groups.kept = data.batch.get("kept")
        settings = ValueSettings(cliprange_value=critic.cliprange_value, **self._step_settings(critic))
        lr = self._set_lr(self.critic.optimizer, critic.optim, data.meta_info["step"])
        with self._on_device(self.critic.model, self.critic.optimizer, changes=True):
            metrics = self.critic.update(self.groups, data.batch["values"], data.batch["returns"], settings)
        return metrics | {"critic/lr": (lr, 1.0)} | host_memory_metrics()

    @register(Dispatch.DP_COMPUTE_METRIC)
    def update_actor(self, data: DataProto) -> dict[str, tuple[float, float]]:
        """Updates the policy on the loaded groups with `advantages` and, if given, old, ref and rollout log-probs.

        Meta: `step`, `kl_coef` (0: no KL term in the loss). Returns metrics as (sum, weight).
        """
        assert self.groups is not None, "load_groups comes first"
        self.groups.kept = data.batch.get("kept")
        actor = self.config.worker.actor
        sizes = self._step_settings(actor)
        sizes["max_tokens"] = self.update_tokens or sizes["max_tokens"]
        settings = UpdateSettings(
            loss_type=actor.loss_type,
            clip_ratio_low=actor.clip_ratio_low,
            clip_ratio_high=actor.clip_ratio_high,
            clip_ratio_dual=actor.clip_ratio_dual,
            tau_positive=actor.tau_positive,
            tau_negative=actor.tau_negative,
            tis_imp_ratio_cap=actor.tis_imp_ratio_cap,
            kl_penalty=self.config.algorithm.kl_penalty,
            kl_coef=data.meta_info["kl_coef"],
            **sizes,
        )
        self._reset_peak_memory()
        lr = self._set_lr(self.optimizer, actor.optim, data.meta_info["step"])
        keys = ("advantages", "old_log_probs", "ref_log_probs", "rollout_log_probs")
        num_on_policy = settings.num_groups_per_mini_batch if actor.ppo_epochs == 1 else 0
        batch = PolicyBatch(*(data.batch.get(key) for key in keys), num_on_policy=num_on_policy)
        reference = self.reference if settings.kl_penalty == FULL_KL and settings.kl_coef else None
        with self._on_device(self.policy, self.optimizer, changes=True), self._reference_on_device(reference):
            metrics = self.actor.update(self.groups, batch, settings, reference)
        metrics["actor/lr"] = (lr, 1.0)
        metrics |= host_memory_metrics()
        if self.device.type == "cuda":
            self.peak_memory["update"] = self._peak_memory_gb()
            metrics |= {f"perf/max_memory_gb/{phase}": (peak, 1.0) for phase, peak in self.peak_memory.items()}
            metrics["perf/max_memory_allocated_gb"] = (max(self.peak_memory.values()), 1.0)
            metrics["perf/max_memory_reserved_gb"] = (torch.cuda.max_memory_reserved() / 1024**3, 1.0)
        self._release_cache()
        return metrics

    def _set_lr(self, optimizer: torch.optim.Optimizer, optim: OptimConfig, step: int) -> float:
        """Sets and returns the learning rate of training step `step`, counted from 1."""
        num_warmup_steps = optim.lr_warmup_steps
        if num_warmup_steps is None:
            num_warmup_steps = int(optim.lr_warmup_ratio * self.num_steps)
        factor = lr_factor(
            step - 1, self.num_steps, num_warmup_steps, optim.lr_scheduler_type, optim.min_lr_ratio or 0
        )
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * factor
        return optim.lr * factor

    @register(Dispatch.ONE_TO_ALL)
    def send_weights(self, engines: list[Any]) -> None:
        """Weight sync: loads the current policy into the engines."""
        with self._on_device(self.policy):
            dtype, memory_gb = DTYPES[self.config.worker.rollout.dtype], self.config.trainer.memory_gb
            send_weights(self.policy.model, engines, self.device, dtype, memory_gb)
        self._release_cache()

    @register(Dispatch.ONE_TO_ALL)
    def save(self, folder: str, model_only: bool = False) -> None:
        """Starts writing shards to `folder`/actor and `folder`/critic; returns once the state is copied."""
        actor_folder = Path(folder) / "actor"
        self.save_error = ""
        optimizer = None if model_only else self.optimizer
        with self._on_device(self.policy, optimizer):
            adapters = gather_adapters(self.policy.model, full_tensor)  # collective, so before a rank can fail
            try:
                checkpoint.save_rng(actor_folder, self.rank)
                if self.rank == 0:
                    self._save_huggingface_files(actor_folder / "huggingface")
                    if adapters:
                        save_adapters(self.policy.model, adapters, actor_folder / ADAPTER_FOLDER)
            except (OSError, RuntimeError) as error:  # reported by save_fault; the calls below are collective
                self.save_error = f"rank {self.rank} on {socket.gethostname()}: {error}"
            self.shard_writer.start(actor_folder, self.policy.model, optimizer)
        if self.critic is not None:
            optimizer = None if model_only else self.critic.optimizer
            with self._on_device(self.critic.model, optimizer):
                self.critic_writer.start(Path(folder) / "critic", self.critic.model, optimizer)
        self._release_cache()

    def _save_huggingface_files(self, folder: Path) -> None:
        """Writes the Hugging Face files except weights: config, processor, generation config."""
        self.policy.model.config.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        source = self.config.worker.actor.model.model_path
        if (Path(source) / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(source).save_pretrained(folder)

    @register(Dispatch.ONE_TO_ALL)
    def save_fault(self) -> str | None:
        """None while `save` is writing, "" after success, else the error message."""
        writers = [self.shard_writer] if self.critic is None else [self.shard_writer, self.critic_writer]
        faults = [writer.fault() for writer in writers]
        return None if None in faults else self.save_error or next(filter(None, faults), "")

    @register(Dispatch.ONE_TO_ALL)
    def restore(self, folder: str, model_only: bool = False) -> None:
        """Loads a checkpoint of any number of ranks; with `model_only` the optimizer is not loaded."""
        actor_folder = Path(folder) / "actor"
        with self._on_device(self.policy, self.optimizer, changes=True):
            checkpoint.load_shards(actor_folder, self.policy.model, None if model_only else self.optimizer)
        checkpoint.load_rng(actor_folder, self.rank)
        if self.critic is not None:
            optimizer = None if model_only else self.critic.optimizer
            with self._on_device(self.critic.model, self.critic.optimizer, changes=True):
                checkpoint.load_shards(Path(folder) / "critic", self.critic.model, optimizer)
        self._release_cache()
