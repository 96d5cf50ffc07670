"""The training worker of one rank: sharded policy and reference, their passes, updates and checkpoints."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig
from transformers.utils.logging import disable_progress_bar

from verl import checkpoint
from verl.activations import CHECKPOINTING
from verl.attention import describe_attention
from verl.config import Config, FSDPConfig, OptimConfig
from verl.divergences import FULL_KL
from verl.fsdp import DTYPES, init_mesh, join_store, lr_factor, open_store, shard, whole
from verl.fused_layers import fuse_layers
from verl.host_memory import WaitingRooms, host_memory_metrics
from verl.lora import ADAPTER_FOLDER, adapters_off, add_adapters, gather_adapters, has_adapters, save_adapters
from verl.model_families import critic_path, stand_in_image, vision_tower
from verl.optim import allocate_states, build_optimizer, state_tensors
from verl.processor import load_run_processor, pixel_limits, threads_per_rank, vision_token_ids
from verl.protocol import DataProto
from verl.qwen_vl import ResponseLogProbs, ResponseValues, check_image_tokens, image_patches, load_model
from verl.single_controller import Dispatch, register
from verl.workers.actor import Actor, Groups, PolicyBatch, UpdateSettings
from verl.workers.critic import Critic, ValueSettings
from verl.workers.weight_sync import send_weights


class FSDPWorker:
    """Actor and frozen reference of one rank.

    A step's batch is loaded once and stays here: the passes over it only exchange what they compute.

    Args:
        rank, world_size: of the training ranks.
        config: of the run.
        device: "cpu" or "cuda".
        num_steps: training steps of the whole run, for the schedule.
    """

    def __init__(self, rank: int, world_size: int, config: Config, device: str, num_steps: int):
        self.rank = rank
        self.world_size = world_size
        self.config = config
        self.device = torch.device(device)
        self.num_steps = num_steps
        self.groups: Groups | None = None
        self.peak_memory: dict[str, float] = {}  # phase -> GiB
        self.rooms = WaitingRooms()  # for models and optimizers between passes
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        disable_progress_bar()

    @register(Dispatch.ONE_TO_ALL)
    def open_store(self) -> tuple[str, int]:
        """Host and port of a rendezvous for all ranks; called on rank 0."""
        host = ray.util.get_node_ip_address()
        self.store, port = open_store(host)
        return host, port

    @register(Dispatch.ONE_TO_ALL)
    def load(self, host: str, port: int) -> None:
        """Joins the other ranks and builds the sharded models."""
        store = self.store if self.rank == 0 else join_store(host, port)
        worker = self.config.worker
        roles = (worker.actor, worker.ref, worker.critic)
        with_host_memory = any(role.fsdp.enable_cpu_offload for role in roles)
        self.mesh = init_mesh(store, self.rank, self.world_size, self.device, with_host_memory=with_host_memory)
        self.shard_writer = checkpoint.ShardWriter()
        actor = self.config.worker.actor
        self.processor = load_run_processor(self.config)
        self.policy = self._build_model(trainable=True)
        self.optimizer = self._add_optimizer(self.policy, actor)
        budget = actor.model.activation_budget_gb if actor.model.enable_gradient_checkpointing else None
        self.actor = Actor(self.policy, self.device, self.optimizer, actor.images_once, budget)
        self.reference = None
        if not self.config.algorithm.disable_kl:
            model = self.policy if has_adapters(self.policy) else self._build_model(trainable=False)
            self.reference = Actor(model, self.device, images_once=actor.images_once)
            self.reference.is_without_adapters = model is self.policy
        self.critic = None
        if self.config.algorithm.adv_estimator == "gae":
            model = self._build_critic()
            optimizer = self._add_optimizer(model, worker.critic)
            self.critic_writer = checkpoint.ShardWriter()
            self.critic = Critic(model, self.device, optimizer, actor.images_once)
        self._release_cache()

    @register(Dispatch.ONE_TO_ALL)
    def describe_kernels(self) -> str:
        """What this rank's passes run on, and why not on something faster."""
        return describe_attention(self.device, DTYPES[self.config.worker.actor.fsdp.mp_param_dtype])

    def _release_cache(self) -> None:
        """Gives back what torch has cached: it is room for the engine, and what is made next would lie between it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _build_model(self, trainable: bool) -> ResponseLogProbs:
        """The sharded policy or reference; what is not trained is kept in the type that passes compute in."""
        settings, model_config = self.config.worker.actor, self.config.worker.actor.model
        kept, computed = DTYPES[settings.fsdp.torch_dtype], DTYPES[settings.fsdp.mp_param_dtype]
        is_frozen = not trainable or model_config.lora.rank > 0
        dtype, overrides = computed if is_frozen else kept, model_config.override_config
        model = load_model(model_config.model_path, dtype, model_config.trust_remote_code, overrides)
        if self.device.type == "cuda" and model_config.use_fused_layers:
            fuse_layers(model)
        if not trainable:
            model.requires_grad_(False)
        elif model_config.lora.rank:
            add_adapters(model, model_config.lora, kept, self.config.trainer.seed)
        if model_config.freeze_vision_tower and (tower := vision_tower(model)) is not None:
            tower.requires_grad_(False)
        if trainable and model_config.enable_gradient_checkpointing:
            model.gradient_checkpointing_enable(CHECKPOINTING)
        wrapped = ResponseLogProbs(model, vision_token_ids(self.processor))
        self._place(wrapped, settings if trainable else self.config.worker.ref, settings.fsdp)
        return wrapped

    def _place(self, model: torch.nn.Module, settings: Any, types: FSDPConfig) -> None:
        """Shards a model, computing in `types`, and leaves it where `settings` have it wait between passes."""
        stays_in_host_memory = settings.fsdp.enable_cpu_offload
        if not stays_in_host_memory:
            model.to(self.device)
        shard(model, self.mesh, DTYPES[types.mp_param_dtype], DTYPES[types.mp_reduce_dtype], stays_in_host_memory)
        if settings.offload.offload_params and not stays_in_host_memory:
            self.rooms.let_wait(model, model.parameters)

    def _add_optimizer(self, model: torch.nn.Module, settings: Any) -> torch.optim.Optimizer:
        """The optimizer of a model, its states made, which then wait where `settings` have them wait."""
        optimizer = build_optimizer(model, settings.optim)
        with self._on_device(model):
            allocate_states(optimizer)
        if settings.offload.offload_optimizer and not settings.fsdp.enable_cpu_offload:
            self.rooms.let_wait(optimizer, lambda: state_tensors(optimizer))
        self._release_cache()
        return optimizer

    @contextmanager
    def _on_device(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None, changes: bool = False
    ) -> Iterator[None]:
        """Inside, what waits in host memory between passes is on the device; `changes` tells whether it may change."""
        with self.rooms.left_by(model, optimizer, have_changed=changes):
            try:
                yield
            finally:
                if isinstance(model, FSDPModule):
                    model.reshard()  # what its root has gathered would be kept for a backward pass that does not come

    def _reference_on_device(self, reference: Actor | None) -> AbstractContextManager[None]:
        """The same for a reference that is read beside the policy, where it is a model of its own."""
        if reference is None or reference.model is self.policy:
            return nullcontext()
        return self._on_device(reference.model)

    def _build_critic(self) -> ResponseValues:
        settings, path = self.config.worker.critic, critic_path(self.config)
        dtype, overrides = DTYPES[settings.fsdp.torch_dtype], settings.model.override_config
        model = load_model(path, dtype, settings.model.trust_remote_code, overrides)
        if settings.model.freeze_vision_tower and (tower := vision_tower(model)) is not None:
            tower.requires_grad_(False)
        if settings.model.enable_gradient_checkpointing:
            model.gradient_checkpointing_enable(CHECKPOINTING)
        wrapped = ResponseValues(model)
        self._place(wrapped, settings, settings.fsdp)
        return wrapped

    @register(Dispatch.DP_COMPUTE_METRIC)
    def load_groups(self, data: DataProto) -> None:
        """Takes this rank's groups and computes the patches of each of their images once.

        Meta `shared_prompt` and `images_once`, when there, stand in for the configured values, for benchmarks.
        """
        settings = self.config.worker.actor
        self.shared_prompt = data.meta_info.get("shared_prompt", settings.shared_prompt)
        for actor in filter(None, (self.actor, self.reference, self.critic)):
            actor.images_once = data.meta_info.get("images_once", settings.images_once)
        images = [image for row in data.non_tensor_batch["images"] for image in row]
        data_config = self.config.data
        size = pixel_limits(self.processor, data_config.min_pixels, data_config.max_pixels)
        dtype = DTYPES[settings.fsdp.mp_param_dtype]
        num_threads = threads_per_rank(self.config) if self.device.type == "cuda" else 1
        pixels, grids = image_patches(images, self.processor.image_processor, dtype, num_threads, **size)
        sees = vision_tower(self.policy.model) is not None
        if sees and not pixels and self.world_size > 1:  # other ranks may have images: the tower must run here too
            patches, grid = stand_in_image(self.policy.model)
            pixels, grids = [patches], [grid]
        self.groups = Groups.from_proto(data, pixels, grids)
        check_image_tokens(self.groups.prompts, self.groups.images, grids, self.processor)

    def _log_probs(self, actor: Actor, key: str, start: int = 0) -> DataProto:
        assert self.groups is not None, "load_groups comes first"
        settings = self.config.worker.actor
        self._reset_peak_memory()
        log_probs, _ = actor.compute_log_probs(
            self.groups,
            self._max_tokens(settings.micro_batch_size_per_device_for_experience),
            self.shared_prompt,
            self.config.worker.rollout.temperature,
            start,
        )
        self.peak_memory[key.removesuffix("_log_probs")] = self._peak_memory_gb()
        return DataProto.from_dict(tensors={key: log_probs})

    def _reset_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _peak_memory_gb(self) -> float:
        """Most memory that tensors of this process took since the last reset, in GiB; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() / 1024**3 if self.device.type == "cuda" else 0.0

    def _max_tokens(self, num_sequences: int) -> int:
        """Token budget of a micro-batch: so many sequences of full length."""
        return num_sequences * (self.config.data.max_prompt_length + self.config.data.max_response_length)

    @register(Dispatch.DP_COMPUTE_PROTO)
    def compute_log_probs(self, data: DataProto) -> DataProto:
        """`old_log_probs` [G, n, R] of the loaded groups under the current policy; `data` only carries the split.

        With meta `from_second_update` those of the first update's groups are left out (NaN): it does not read them.
        """
        size = self.config.worker.actor.global_batch_size // self.world_size
        with self._on_device(self.policy):
            return self._log_probs(self.actor, "old_log_probs", data.meta_info.get("from_second_update", False) * size)

    @register(Dispatch.DP_COMPUTE_PROTO)
    def compute_ref_log_probs(self, data: DataProto) -> DataProto:
        """`ref_log_probs` [G, n, R] of the loaded groups under the reference; `data` only carries the split."""
        assert self.reference is not None
        if self.reference.model is self.policy:
            with self._on_device(self.policy), adapters_off(self.policy):
                return self._log_probs(self.reference, "ref_log_probs")
        with self._on_device(self.reference.model):
            return self._log_probs(self.reference, "ref_log_probs")

    @register(Dispatch.DP_COMPUTE_PROTO)
    def compute_full_kl(self, data: DataProto) -> DataProto:
        """`kl` [G, n, R] of the loaded groups, exact; `data` only carries the split."""
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
        """`values` [G, n, R] of the loaded groups under the critic; `data` only carries the split."""
        assert self.groups is not None and self.critic is not None
        budget = self._max_tokens(self.config.worker.critic.micro_batch_size_per_device_for_experience)
        with self._on_device(self.critic.model):
            values = self.critic.compute_values(self.groups, budget, self.shared_prompt)
        return DataProto.from_dict(tensors={"values": values})

    def _step_settings(self, settings: Any) -> dict[str, Any]:
        """What updates of actor and critic have in common, from the section of the one or the other."""
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
        """Updates the critic on the loaded groups with the `values` it gave them and their `returns`."""
        assert self.groups is not None and self.critic is not None and self.critic.optimizer is not None
        critic = self.config.worker.critic
        settings = ValueSettings(cliprange_value=critic.cliprange_value, **self._step_settings(critic))
        lr = self._set_lr(self.critic.optimizer, critic.optim, data.meta_info["step"])
        with self._on_device(self.critic.model, self.critic.optimizer, changes=True):
            metrics = self.critic.update(self.groups, data.batch["values"], data.batch["returns"], settings)
        return metrics | {"critic/lr": (lr, 1.0)} | host_memory_metrics()

    @register(Dispatch.DP_COMPUTE_METRIC)
    def update_actor(self, data: DataProto) -> dict[str, tuple[float, float]]:
        """Updates the policy on the loaded groups with `advantages` and, when there, old, ref and rollout log-probs.

        Meta: `step`, `kl_coef` (0: the divergence is no term of the loss).
        """
        assert self.groups is not None, "load_groups comes first"
        actor = self.config.worker.actor
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
            **self._step_settings(actor),
        )
        self._reset_peak_memory()
        lr = self._set_lr(self.optimizer, actor.optim, data.meta_info["step"])
        keys = ("advantages", "old_log_probs", "ref_log_probs", "rollout_log_probs")
        num_current = settings.num_groups_per_mini_batch if actor.ppo_epochs == 1 else 0
        batch = PolicyBatch(*(data.batch.get(key) for key in keys), num_current=num_current)
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
        """Loads the current policy into the engines."""
        with self._on_device(self.policy):
            send_weights(self.policy.model, engines, self.device, DTYPES[self.config.worker.rollout.dtype])
        self._release_cache()

    @register(Dispatch.ONE_TO_ALL)
    def save(self, folder: str, model_only: bool = False) -> None:
        """Begins to write this rank's shards under `folder`/actor; returns when the state has been copied.

        A critic's go to `folder`/critic.
        """
        actor_folder = Path(folder) / "actor"
        self.save_error = ""
        optimizer = None if model_only else self.optimizer
        with self._on_device(self.policy, optimizer):
            adapters = gather_adapters(self.policy.model, whole)  # here: a fault of one rank must not part them below
            try:
                checkpoint.save_rng(actor_folder, self.rank)
                if self.rank == 0:
                    self._save_huggingface_files(actor_folder / "huggingface")
                    if adapters:
                        save_adapters(self.policy.model, adapters, actor_folder / ADAPTER_FOLDER)
            except (OSError, RuntimeError) as error:  # told by save_fault: the other ranks wait for this one below
                self.save_error = f"rank {self.rank}: {error}"
            self.shard_writer.start(actor_folder, self.policy.model, optimizer)
        if self.critic is not None:
            optimizer = None if model_only else self.critic.optimizer
            with self._on_device(self.critic.model, optimizer):
                self.critic_writer.start(Path(folder) / "critic", self.critic.model, optimizer)
        self._release_cache()

    def _save_huggingface_files(self, folder: Path) -> None:
        """Everything of the Hugging Face folder but the weights."""
        self.policy.model.config.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        source = self.config.worker.actor.model.model_path
        if (Path(source) / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(source).save_pretrained(folder)

    @register(Dispatch.ONE_TO_ALL)
    def save_fault(self) -> str | None:
        """None while `save` is still writing, "" when all is on disk, else what went wrong."""
        writers = [self.shard_writer] if self.critic is None else [self.shard_writer, self.critic_writer]
        faults = [writer.fault() for writer in writers]
        return None if None in faults else self.save_error or next(filter(None, faults), "")

    @register(Dispatch.ONE_TO_ALL)
    def restore(self, folder: str, model_only: bool = False) -> None:
        """Reads what `save` wrote, on any number of ranks; the optimizer stays new if only the model was saved."""
        actor_folder = Path(folder) / "actor"
        with self._on_device(self.policy, self.optimizer, changes=True):
            checkpoint.load_shards(actor_folder, self.policy.model, None if model_only else self.optimizer)
        checkpoint.load_rng(actor_folder, self.rank)
        if self.critic is not None:
            optimizer = None if model_only else self.critic.optimizer
            with self._on_device(self.critic.model, self.critic.optimizer, changes=True):
                checkpoint.load_shards(Path(folder) / "critic", self.critic.model, optimizer)
        self._release_cache()
