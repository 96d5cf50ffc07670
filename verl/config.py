"""The configuration: one frozen record per section.

Names and meanings are EasyR1's, defaults the paper's run (SpatialThinker-3B, 75 steps on four GPUs); a key is here
if something reads it. `verl.config_loading` fills in files and overrides, `verl.config_checks` finds what is wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

TrainDtype = Literal["bf16", "fp32"]
RolloutDtype = Literal["bf16", "fp16", "fp32"]
Logger = Literal["console", "file", "tensorboard", "wandb", "mlflow", "swanlab"]


@dataclass(frozen=True)
class DataConfig:
    train_files: str = "hunarbatra/STVQA-7K@train"
    """Training rows: a folder, a file, a saved data set or a hub name, with an optional `@split`."""
    val_files: str = "hunarbatra/STVQA-7K@val"
    """Validation rows, named as the training rows are."""
    prompt_key: str = "problem"
    """Column with the prompt text; one `<image>` in it per image."""
    answer_key: str = "answer_option_text"
    """Column with the ground truth that the reward is given."""
    image_key: str = "images"
    """Column with the image or images: bytes, paths or pictures; it may be missing or empty."""
    image_dir: str | None = None
    """Folder of images that are given by relative paths."""
    mixed_data: bool = False
    """Whether every second training row, the first included, goes without its images."""
    text_only: bool = False
    """Whether all training rows go without their images; with a text model, validation rows too."""
    max_prompt_length: int = 6144
    """P: longest prompt in tokens, image tokens included."""
    max_response_length: int = 2048
    """R: longest response in tokens."""
    rollout_batch_size: int = 512
    """Prompts per training step."""
    mini_rollout_batch_size: int | None = None
    """Prompts per call of the engines; null is rollout_batch_size."""
    val_batch_size: int = 512
    """Prompts per validation batch; -1 takes the whole validation set at once."""
    format_prompt: str | None = None
    """File with a Jinja template (variable `content`) that wraps the prompt, or a text to put before it."""
    override_chat_template: str | None = None
    """File with a chat template that replaces the model's own."""
    shuffle: bool = True
    """Whether training rows are drawn in a random order, a new one each epoch."""
    seed: int = 1
    """Seed of that order."""
    min_pixels: int | None = 262_144
    """Smaller images are enlarged to this many pixels; null leaves them."""
    max_pixels: int | None = 4_194_304
    """Larger images are reduced to this many pixels; null leaves them."""
    filter_overlong_prompts: bool = True
    """Whether rows longer than max_prompt_length are dropped before training; otherwise one such row is an error."""


@dataclass(frozen=True)
class AlgorithmConfig:
    adv_estimator: Literal["grpo", "grpo_passk", "dr_grpo", "rloo", "remax", "reinforce_plus_plus", "gae"] = "grpo"
    """How scores become advantages, see `verl.advantages`; gae trains a critic."""
    gamma: float = 1.0
    """Discount of later rewards, for gae and reinforce_plus_plus."""
    lam: float = 1.0
    """Lambda of gae: 0 trusts the critic, 1 the rewards."""
    disable_kl: bool = False
    """Whether to train without a reference model; wins over the other KL keys."""
    use_kl_loss: bool = True
    """Whether the divergence from the reference is a term of the loss; otherwise the rewards are reduced by it."""
    kl_penalty: Literal["kl", "abs", "mse", "low_var_kl", "chi2", "full"] = "low_var_kl"
    """Estimator of that divergence, see `verl.divergences`; full is exact and computes both distributions anew."""
    kl_coef: float = 1e-2
    """Weight of that divergence; at the start of the run, if it is adaptive."""
    kl_type: Literal["fixed", "adaptive"] = "fixed"
    """`fixed`, or `adaptive`: the weight moves until the divergence is kl_target."""
    kl_target: float = 0.1
    """Divergence per token that an adaptive weight aims at."""
    kl_horizon: float = 10000.0
    """Responses in which an adaptive weight moves by at most a fifth."""
    online_filtering: bool = False
    """Whether only groups whose mean filter_key lies between filter_low and filter_high are trained on."""
    filter_key: str = "overall"
    """Part of the reward that online_filtering looks at."""
    filter_low: float = 0.01
    """Groups are kept whose mean is above this."""
    filter_high: float = 0.99
    """Groups are kept whose mean is below this."""


@dataclass(frozen=True)
class AdapterConfig:
    rank: int = 0
    """Rank of LoRA adapters, which alone are trained; 0 trains the whole model."""
    alpha: int = 64
    """An adapter's output counts alpha / rank times."""
    target_modules: str = "all-linear"
    """Layers with adapters: their names, separated by commas, or all-linear."""
    exclude_modules: str | None = None
    """Regular expression for whole names of layers without adapters, such as `.*visual.*`."""


@dataclass(frozen=True)
class LoadedModelConfig:
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""
    override_config: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's config.json with other values, for training and engine alike; sections may be nested."""
    enable_gradient_checkpointing: bool = True
    """Whether activations are computed again in the backward pass instead of kept."""
    freeze_vision_tower: bool = False
    """Whether the vision tower keeps its weights."""


@dataclass(frozen=True)
class ModelConfig(LoadedModelConfig):
    model_path: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    """Folder or hub name of the model to train, with its tokenizer and processor."""
    tokenizer_path: str | None = None
    """Folder or hub name of another tokenizer and processor; null takes those of model_path."""
    activation_budget_gb: float = 0.0
    """Memory for activations that gradient checkpointing keeps all the same, in GiB per micro-batch."""
    use_fused_layers: bool = True
    """Whether a GPU runs Liger's norm, SwiGLU and rotary kernels where that package is there and knows the model."""
    lora: AdapterConfig = field(default_factory=AdapterConfig)


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-6
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    weight_decay: float = 1e-2
    """Decoupled weight decay."""
    strategy: Literal["adamw", "adamw_bf16"] = "adamw_bf16"
    """`adamw`, or `adamw_bf16`: states in bf16 with Kahan compensation, for parameters kept in bf16."""
    lr_warmup_ratio: float = 0.0
    """Share of the training steps over which the rate rises linearly."""
    lr_warmup_steps: int | None = None
    """The same as a number of steps; wins over the ratio."""
    lr_scheduler_type: Literal["constant", "cosine"] = "constant"
    """Course of the rate after the rise."""
    min_lr_ratio: float | None = None
    """Floor of the cosine as a share of lr; null is 0."""


@dataclass(frozen=True)
class FSDPConfig:
    torch_dtype: TrainDtype = "bf16"
    """Type in which parameters are kept; null is fp32."""
    mp_param_dtype: TrainDtype = "bf16"
    """Type in which the forward and backward passes compute."""
    mp_reduce_dtype: TrainDtype = "fp32"
    """Type in which gradients are summed over ranks."""
    enable_cpu_offload: bool = False
    """Whether parameters, gradients and optimizer live in host memory; a layer is on its GPU while it computes."""


@dataclass(frozen=True)
class OffloadConfig:
    offload_params: bool = False
    """Whether parameters wait in host memory between passes."""
    offload_optimizer: bool = False
    """Whether the optimizer's states wait in host memory between updates."""


@dataclass(frozen=True)
class ReferenceFSDPConfig:
    enable_cpu_offload: bool = False
    """Whether the reference's parameters live in host memory; a layer is on its GPU while it computes."""


@dataclass(frozen=True)
class ReferenceOffloadConfig:
    offload_params: bool = False
    """Whether the reference's parameters wait in host memory between passes."""


@dataclass(frozen=True)
class ReferenceConfig:
    fsdp: ReferenceFSDPConfig = field(default_factory=ReferenceFSDPConfig)
    offload: ReferenceOffloadConfig = field(default_factory=ReferenceOffloadConfig)


@dataclass(frozen=True)
class ActorConfig:
    global_batch_size: int = 128
    """Prompts per optimizer step, over all ranks; each brings its `worker.rollout.n` responses."""
    micro_batch_size_per_device_for_update: int = 4
    """Sequences per forward and backward pass of a rank: its token budget is this times (P + R)."""
    micro_batch_size_per_device_for_experience: int = 16
    """The same for passes without gradients (old and reference log-probs)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    clip_ratio_low: float = 0.2
    """The probability ratio is clipped from below at 1 minus this; 1 leaves it without a lower bound."""
    clip_ratio_high: float = 0.3
    """The probability ratio is clipped from above at 1 plus this."""
    clip_ratio_dual: float = 3.0
    """With a negative advantage A the loss of a token is at most -A times this."""
    loss_type: Literal["default", "gspo", "gspo_token", "cispo", "sapo"] = "default"
    """Surrogate loss, see `verl.losses.compute_policy_loss`; default with two clip ranges is DAPO's."""
    tau_positive: float = 1.0
    """Temperature of sapo's gate for advantages of 0 and above."""
    tau_negative: float = 1.05
    """Temperature of sapo's gate for advantages below 0."""
    loss_avg_mode: Literal["token", "seq", "fixed_length"] = "token"
    """What counts the same in a mini-batch: every token, every response (seq), or a token in units of R."""
    tis_imp_ratio_cap: float | None = None
    """Bound of the weights p(training) / p(engine) that correct for the engine's rounding; null: no weights."""
    ppo_epochs: int = 1
    """Passes over each rollout batch."""
    shared_prompt: bool = True
    """Whether the prompt is computed once per group instead of once per response."""
    images_once: bool = True
    """Whether an image passes the vision tower once per micro-batch instead of once for every prompt that shows it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)


@dataclass(frozen=True)
class CriticModelConfig(LoadedModelConfig):
    model_path: str | None = None
    """Folder or hub name of the model that the critic starts from; null is the actor's. Token ids must agree."""


@dataclass(frozen=True)
class CriticConfig:
    global_batch_size: int = 128
    """Prompts per optimizer step of the critic, over all ranks."""
    micro_batch_size_per_device_for_update: int = 4
    """Sequences per forward and backward pass of a rank: its token budget is this times (P + R)."""
    micro_batch_size_per_device_for_experience: int = 16
    """The same for the pass that computes values."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    cliprange_value: float = 0.5
    """A value counts as moved by at most this in one training step."""
    loss_avg_mode: Literal["token", "seq", "fixed_length"] = "token"
    """As worker.actor.loss_avg_mode."""
    ppo_epochs: int = 1
    """Passes over each rollout batch."""
    model: CriticModelConfig = field(default_factory=CriticModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)


@dataclass(frozen=True)
class RewardConfig:
    score_function: str = "spatial_sgg"
    """Name of a reward of the house."""
    reward_function: str | None = None
    """`FILE.py:NAME`, a reward of your own, NAME being `main` when left out; wins over score_function."""
    reward_function_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments given to the reward at every call."""
    skip_special_tokens: bool = True
    """Whether the reward reads the response without special tokens."""
    num_processes: int = 4
    """Processes that score responses."""


@dataclass(frozen=True)
class RolloutConfig:
    n: int = 8
    """Responses per prompt: the size of a group."""
    temperature: float = 1.0
    """Sampling temperature; training log-probs are those of the same distribution."""
    top_p: float = 1.0
    """Nucleus sampling; training log-probs are those of the full distribution."""
    top_k: int = -1
    """Sample from this many likeliest tokens; -1 from all."""
    ignore_eos: bool = False
    """Whether responses always take max_response_length tokens, as benchmarks want."""
    seed: int = 1
    """Seed of the engine."""
    limit_images: int = 0
    """Most images per prompt; 0 leaves the engine's own limit."""
    dtype: RolloutDtype = "bf16"
    """Type of the engine's weights."""
    gpu_memory_utilization: float = 0.6
    """Share of a GPU's memory that the engine may take."""
    enforce_eager: bool = False
    """Whether the engine does without CUDA graphs."""
    enable_chunked_prefill: bool = False
    """Whether long prompts are prefilled in pieces."""
    tensor_parallel_size: int = 1
    """GPUs that share one engine."""
    max_model_len: int | None = None
    """Longest prompt plus response the engine serves; null is P + R."""
    max_num_batched_tokens: int = 8192
    """Most tokens in one pass of the engine."""
    max_num_seqs: int = 1024
    """Most responses that the engine writes at the same time."""
    shared_prompt: bool = True
    """Whether a GPU's engine reads a prompt's keys and values once for its n samples (FlashAttention 3, Hopper)."""
    disable_log_stats: bool = True
    """Whether the engine keeps its statistics to itself."""
    val_override_config: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.5, "n": 1})
    """Sampling keys of the engine (n, temperature, top_p, top_k, ...) that validation sets differently."""


@dataclass(frozen=True)
class WorkerConfig:
    actor: ActorConfig = field(default_factory=ActorConfig)
    ref: ReferenceConfig = field(default_factory=ReferenceConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)


@dataclass(frozen=True)
class TrainerConfig:
    total_epochs: int = 75
    """Passes over the training rows, when max_steps does not end the run earlier."""
    max_steps: int | None = 75
    """Training steps; null trains total_epochs."""
    max_try_make_batch: int = 20
    """Calls of the engines after which a step whose groups were filtered away ends the run; -1: no limit."""
    critic_warmup: int = 0
    """Steps before this one train the critic alone."""
    max_skipped_updates: int = 10
    """Optimizer steps in a row with a gradient that is not finite after which the run ends; -1: no limit."""
    project_name: str = "spatialthinker"
    """Name under which loggers file several runs."""
    experiment_name: str = "spatialthinker_3b_grpo"
    """Name of this run."""
    logger: tuple[Logger, ...] = ("console", "file", "tensorboard")
    """Where metrics and validation samples go."""
    nnodes: int = 1
    """Machines."""
    n_gpus_per_node: int = 4
    """FSDP ranks per machine, on a CPU too."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where ranks compute; auto takes the GPUs when there are any."""
    seed: int = 1
    """Seed of everything that has no seed of its own."""
    val_freq: int = 5
    """Steps between validations; -1 validates only before and after training."""
    val_before_train: bool = True
    """Whether to validate before the first step."""
    val_only: bool = False
    """Whether to validate once and stop."""
    val_generations_to_log: int = 3
    """Validation samples written out each time."""
    save_freq: int = 5
    """Steps between checkpoints; -1 saves only after the last step."""
    save_limit: int = 1
    """Newest checkpoints kept, and the one with the best validation beside them; -1 keeps all."""
    save_model_only: bool = False
    """Whether checkpoints hold the weights alone; a run that goes on from one starts with a new optimizer."""
    save_in_background: bool = True
    """Whether training goes on while a checkpoint is written from a copy in host memory."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """What follows when a checkpoint cannot be written, on a full disk for instance; older ones stay whole."""
    save_checkpoint_path: str = "checkpoints/{project_name}/{experiment_name}"
    """Folder of the run's checkpoints and logs; the two names in braces are filled in."""
    watchdog_timeout_s: float | None = 3600.0
    """Seconds after which a call to the workers has stalled: all write their stacks, the run ends; null waits."""
    max_host_memory_share: float = 0.94
    """Share of a machine's memory in use at which the run saves and ends, before the system kills a process."""
    load_checkpoint_path: str | None = None
    """Checkpoint folder `.../global_step_N` to start from; null lets find_last_checkpoint decide."""
    find_last_checkpoint: bool = True
    """Whether to go on from the newest complete checkpoint in save_checkpoint_path."""
    check_versions: bool = True
    """Whether torch, transformers, vLLM and the like must be the versions that this trainer was tried with."""
    dry_run: bool = False
    """Whether to print what the run would do and need, with its first prompts, and stop before anything starts."""
    ray_timeline: str | None = None
    """File for Ray's timeline of the run, written at its end; needs RAY_PROFILING=1 in the environment."""


@dataclass(frozen=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    @property
    def num_ranks(self) -> int:
        """FSDP ranks over all machines."""
        return self.trainer.nnodes * self.trainer.n_gpus_per_node


class ConfigError(ValueError):
    """Every fault found in a configuration, one line each."""

    def __init__(self, faults: Sequence[str]):
        self.faults = list(faults)
        noun = "fault" if len(self.faults) == 1 else "faults"
        super().__init__("\n  - ".join([f"{len(self.faults)} {noun} in the configuration:", *self.faults]))

    def __reduce__(self):
        return type(self), (self.faults,)
