"""The configuration: one frozen record per section, which takes only values of the annotated types and bounds.

Names and meanings are EasyR1's, defaults the paper's run (SpatialThinker-3B, 75 steps on four GPUs); a key is here
if something reads it. `verl.config.loading` fills in files and overrides, `verl.config.checks` finds what does not
fit together, `verl.config.docs` prints the lines under the fields.
"""

# Choices that follow from the tables of verl.algos, where pyright wants them written out.
# pyright: reportInvalidTypeForm=false
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from pydantic.dataclasses import dataclass

from verl.config.values import (
    AUTO,
    STRICT,
    AutoCount,
    AutoShare,
    AutoSize,
    Count,
    CountOrNoLimit,
    DecayRate,
    Estimator,
    FrameCount,
    KLPenalty,
    Logger,
    LossAverage,
    LossType,
    PositiveShare,
    ReferenceDtype,
    RolloutDtype,
    Share,
    TrainDtype,
)


@dataclass(frozen=True, config=STRICT)
class SourceConfig:
    path: str
    """Rows, as data.train_files names them."""
    name: str | None = None
    """Name in metrics; null is the last part of the path."""
    weight: NonNegativeFloat | Literal["natural"] = "natural"
    """Share of each batch; natural sources share the rest by their numbers of rows."""
    reward: str | None = None
    """A reward's name, `FILE.py:NAME`, or column, for the one that each row names; null is that of worker.reward."""
    reward_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments given to that reward."""
    format_prompt: str | None = None
    """Prompt template, as data.format_prompt, which null takes."""
    prompt_key: str | None = None
    """Column with the prompt text; null is data.prompt_key."""
    answer_key: str | None = None
    """Column with the ground truth; null is data.answer_key."""
    repeat: Count = 1
    """Times that its rows count among natural ones."""
    advantage_scale: NonNegativeFloat = 1.0
    """Factor of the advantages of its groups; 0 measures its reward and learns nothing from it."""


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    train_files: str | tuple[SourceConfig, ...] = "hunarbatra/STVQA-7K@train"
    """Training rows: a folder, a file, a saved data set or a hub name, with an optional `@split`; or several."""
    val_files: str | tuple[SourceConfig, ...] = "hunarbatra/STVQA-7K@val"
    """Validation rows, named as the training rows are."""
    prompt_key: str = "problem"
    """Column with the prompt text; one `<image>` in it per image and one `<video>` per video."""
    answer_key: str = "answer_option_text"
    """Column with the ground truth that the reward is given."""
    image_key: str = "images"
    """Column with the image or images: bytes, paths or pictures; it may be missing or empty."""
    image_dir: str | None = None
    """Folder of images and videos that are given by relative paths."""
    video_key: str = "videos"
    """Column with the list of videos: each a path, bytes, or a list of frames; it may be missing or empty."""
    video_fps: PositiveFloat = 2.0
    """Frames per second that are sampled of a video file, and that a list of frames counts as."""
    max_frames: FrameCount = 768
    """Most frames of a video: fewer are sampled of a longer file, a longer list is an error."""
    mixed_data: bool = False
    """Text-only rows, every second training row from the first on; the others keep their images."""
    text_only: bool = False
    """Training rows without their images; with a text model, validation rows too."""
    max_prompt_length: Count = 6144
    """P: longest prompt in tokens, image tokens included."""
    max_response_length: Count = 2048
    """R: longest response in tokens."""
    rollout_batch_size: Count = 512
    """Prompts per training step."""
    mini_rollout_batch_size: Count | None = None
    """Prompts per call of the engines; null is rollout_batch_size."""
    val_batch_size: CountOrNoLimit = 512
    """Prompts per validation batch; -1 takes the whole validation set at once."""
    format_prompt: str | None = None
    """File with a Jinja template (variable `content`) for prompts, or a text before them and behind their image."""
    override_chat_template: str | None = None
    """File with a chat template that replaces the model's own."""
    shuffle: bool = True
    """Random order of the training rows, a new one each epoch."""
    seed: NonNegativeInt = 1
    """Seed of that order."""
    min_pixels: Count | None = 262_144
    """Fewest pixels of an image or a frame, smaller ones are enlarged; null: no bound, of a frame 128 tokens."""
    max_pixels: Count | None = 4_194_304
    """Most pixels of an image or a frame, larger ones are reduced; null: no bound, of a frame 768 tokens."""
    total_pixels: Count | None = None
    """Most pixels of the temporal patches (two frames) of a video together; null: of 115,200 tokens."""
    resize_first: bool = False
    """Scales images to these bounds before the processor rounds to whole patches, as EasyR1 does; false: one step."""
    filter_overlong_prompts: bool = True
    """Drops rows longer than max_prompt_length before training; otherwise one such row is an error."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """A row that cannot be trained on, such as one with a broken image: stop names it, skip also leaves it out."""

    @property
    def processor_bounds(self) -> tuple[int | None, int | None]:
        """`min_pixels` and `max_pixels` of the image processor; None is its own."""
        return (None, None) if self.resize_first else (self.min_pixels, self.max_pixels)


@dataclass(frozen=True, config=STRICT)
class AlgorithmConfig:
    adv_estimator: Estimator = "grpo"
    """Advantage estimator, see `verl.algos.advantages`; gae trains a critic."""
    gamma: Share = 1.0
    """Discount of later rewards, for gae and reinforce_plus_plus."""
    lam: Share = 1.0
    """Lambda of gae: 0 trusts the critic, 1 the rewards."""
    disable_kl: bool = False
    """Training without a reference model; wins over the other KL keys."""
    use_kl_loss: bool = True
    """Divergence from the reference as a term of the loss; otherwise the rewards are reduced by it."""
    kl_penalty: KLPenalty = "low_var_kl"
    """Estimator of the divergence, see `verl.algos.divergences`; full is exact, from both whole distributions."""
    kl_coef: NonNegativeFloat = 1e-2
    """Weight of the divergence from the reference; at the start of the run, if it is adaptive."""
    kl_type: Literal["fixed", "adaptive"] = "fixed"
    """Course of the weight: `fixed`, or `adaptive`, which moves it until the divergence is kl_target."""
    kl_target: float = 0.1
    """Divergence per token that an adaptive weight aims at."""
    kl_horizon: float = 10000.0
    """Responses in which an adaptive weight moves by at most a fifth."""
    online_filtering: bool = False
    """Trains only on groups whose mean filter_key lies between filter_low and filter_high."""
    filter_key: str = "overall"
    """Part of the reward that online_filtering looks at."""
    filter_low: float = 0.01
    """Lower bound of a group's mean; groups above it are kept."""
    filter_high: float = 0.99
    """Upper bound of a group's mean; groups below it are kept."""


@dataclass(frozen=True, config=STRICT)
class AdapterConfig:
    rank: NonNegativeInt = 0
    """Rank of LoRA adapters, which alone are trained; 0 trains the whole model."""
    alpha: Count = 64
    """Scale of an adapter: its output counts alpha / rank times."""
    target_modules: str = "all-linear"
    """Layers with adapters: their names, separated by commas, or all-linear."""
    exclude_modules: str | None = None
    """Regular expression for whole names of layers without adapters, such as `.*visual.*`."""
    experts: bool = False
    """Adapters on the experts of a mixture of experts too, one for each expert."""


@dataclass(frozen=True, config=STRICT)
class LoadedModelConfig:
    trust_remote_code: bool = False
    """Permission to run code that comes with the model."""
    override_config: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's config.json with other values, for training and engine alike; sections may be nested."""
    enable_gradient_checkpointing: bool = True
    """Activation checkpointing: activations are computed again in the backward pass instead of kept."""
    freeze_vision_tower: bool = False
    """Keeps the weights of the vision encoder."""


@dataclass(frozen=True, config=STRICT)
class ModelConfig(LoadedModelConfig):
    model_path: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    """Folder or hub name of the model to train, with its tokenizer and processor."""
    tokenizer_path: str | None = None
    """Folder or hub name of another tokenizer and processor; null takes those of model_path."""
    random_weights: bool = False
    """Random weights of the shape in config.json, in training and engine, for benchmarks that need no checkpoint."""
    activation_budget_gb: AutoSize = AUTO
    """Memory for activations that gradient checkpointing keeps all the same, GiB per micro-batch; auto probes it."""
    use_fused_layers: bool = True
    """Liger's norm, SwiGLU and rotary kernels on a GPU, where that package is there and knows the model."""
    lora: AdapterConfig = field(default_factory=AdapterConfig)


@dataclass(frozen=True, config=STRICT)
class OptimConfig:
    lr: NonNegativeFloat = 1e-6
    """Peak learning rate."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    weight_decay: NonNegativeFloat = 1e-2
    """Decoupled weight decay."""
    strategy: Literal["adamw", "adamw_bf16"] = "adamw_bf16"
    """Optimizer: `adamw`, or `adamw_bf16`, which keeps parameters in bf16 and the rest of their bits beside them."""
    lr_warmup_ratio: Share = 0.0
    """Warm-up: share of the training steps over which the rate rises linearly."""
    lr_warmup_steps: NonNegativeInt | None = None
    """Warm-up as a number of steps; wins over the ratio."""
    lr_scheduler_type: Literal["constant", "cosine"] = "constant"
    """Course of the rate after the warm-up."""
    min_lr_ratio: Share | None = None
    """Floor of the cosine as a share of lr; null is 0."""


@dataclass(frozen=True, config=STRICT)
class FSDPConfig:
    torch_dtype: TrainDtype = "bf16"
    """Type in which parameters are kept; null is fp32, as is a missing key with `optim.strategy: adamw`."""
    mp_param_dtype: TrainDtype = "bf16"
    """Type in which the forward and backward passes compute."""
    mp_reduce_dtype: TrainDtype = "fp32"
    """Type in which gradients are summed over ranks."""
    enable_cpu_offload: bool = False
    """CPU offload of parameters, gradients and optimizer; a layer is on its GPU while it computes."""


@dataclass(frozen=True, config=STRICT)
class OffloadConfig:
    offload_params: bool = False
    """CPU offload of the parameters between passes."""
    offload_optimizer: bool = False
    """CPU offload of the optimizer's states between updates."""


@dataclass(frozen=True, config=STRICT)
class ReferenceFSDPConfig:
    enable_cpu_offload: bool = False
    """CPU offload of the reference's parameters; a layer is on its GPU while it computes."""
    mp_param_dtype: ReferenceDtype = None
    """Type in which the reference computes, which must be the actor's; null is that."""


@dataclass(frozen=True, config=STRICT)
class ReferenceOffloadConfig:
    offload_params: bool = False
    """CPU offload of the reference's parameters between passes."""


@dataclass(frozen=True, config=STRICT)
class ReferenceConfig:
    fsdp: ReferenceFSDPConfig = field(default_factory=ReferenceFSDPConfig)
    offload: ReferenceOffloadConfig = field(default_factory=ReferenceOffloadConfig)


@dataclass(frozen=True, config=STRICT)
class ActorConfig:
    global_batch_size: Count = 128
    """Prompts per optimizer step, over all ranks; each brings its `worker.rollout.n` responses."""
    micro_batch_size_per_device_for_update: AutoCount = AUTO
    """Sequences per forward and backward pass of a rank: its token budget is this times (P + R)."""
    micro_batch_size_per_device_for_experience: AutoCount = AUTO
    """Sequences per pass without gradients (old and reference log-probs), likewise a token budget."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient norm above which gradients are scaled down to it."""
    clip_ratio_low: Share = 0.2
    """Lower clip range: the probability ratio is clipped at 1 minus this; 1 leaves it without a lower bound."""
    clip_ratio_high: PositiveFloat = 0.3
    """Upper clip range: the probability ratio is clipped at 1 plus this."""
    clip_ratio_dual: Annotated[float, Field(gt=1)] = 3.0
    """Dual clip: with a negative advantage A the loss of a token is at most -A times this."""
    loss_type: LossType = "default"
    """Surrogate loss, see `verl.algos.losses.compute_policy_loss`; default with two clip ranges is DAPO's."""
    tau_positive: PositiveFloat = 1.0
    """Temperature of sapo's gate for advantages of 0 and above."""
    tau_negative: PositiveFloat = 1.05
    """Temperature of sapo's gate for advantages below 0."""
    loss_avg_mode: LossAverage = "token"
    """Unit of equal weight in a mini-batch: every token, every response (seq), or a token in units of R."""
    tis_imp_ratio_cap: PositiveFloat | None = None
    """Bound of the weights p(training) / p(engine) that correct for the engine's rounding; null: no weights."""
    ppo_epochs: Count = 1
    """Passes over each rollout batch."""
    shared_prompt: bool = True
    """Prefix sharing: the prompt is computed once per group instead of once per response."""
    routing_replay: bool = False
    """Routing replay in a mixture of experts: training sends each token to the experts that the engine chose."""
    load_balancing_coef: NonNegativeFloat = 0.0
    """Weight of the load-balancing loss of a mixture of experts in the actor's loss; 0 leaves it out."""
    images_once: bool = True
    """Image sharing: an image is encoded once per micro-batch instead of once for every prompt that shows it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)


@dataclass(frozen=True, config=STRICT)
class CriticModelConfig(LoadedModelConfig):
    model_path: str | None = None
    """Folder or hub name of the model that the critic starts from; null is the actor's. Token ids must agree."""


@dataclass(frozen=True, config=STRICT)
class CriticConfig:
    global_batch_size: Count = 128
    """Prompts per optimizer step of the critic, over all ranks."""
    micro_batch_size_per_device_for_update: Count = 4
    """Sequences per forward and backward pass of a rank: its token budget is this times (P + R)."""
    micro_batch_size_per_device_for_experience: Count = 16
    """Sequences per pass that computes values, likewise a token budget."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient norm above which gradients are scaled down to it."""
    cliprange_value: PositiveFloat = 0.5
    """Value clip range: a value counts as moved by at most this in one training step."""
    loss_avg_mode: LossAverage = "token"
    """Unit of equal weight, as worker.actor.loss_avg_mode."""
    ppo_epochs: Count = 1
    """Passes over each rollout batch."""
    model: CriticModelConfig = field(default_factory=CriticModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)


@dataclass(frozen=True, config=STRICT)
class RewardConfig:
    score_function: str = "spatial_sgg"
    """Name of a built-in reward."""
    reward_function: str | None = None
    """`FILE.py:NAME`, a reward of your own, NAME being `main` when left out; wins over score_function."""
    reward_function_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments given to the reward at every call."""
    mixtures: dict[str, Any] = field(default_factory=dict)
    """Weighted sums and gates of rewards by name, {sum: {reward: weight}, gate: {reward.part: least}, kwargs: {}}."""
    skip_special_tokens: bool = True
    """Leaves special tokens out of the responses that the reward reads."""
    num_processes: Count = 4
    """Processes that score responses."""
    concurrency: Count = 64
    """Calls of a coroutine reward (async def) at the same time."""
    call_timeout_s: PositiveFloat = 60.0
    """Seconds after which a call of a coroutine reward has failed."""
    retries: NonNegativeInt = 5
    """Further tries of a call that failed."""
    wait_s: NonNegativeFloat = 300.0
    """Seconds that a step waits for a coroutine reward when its passes are done; what is then not back is missing."""
    missing_score: float | Literal["drop"] = "drop"
    """Score of a response that a coroutine reward gave none; drop leaves it out of its group."""
    price_per_call: NonNegativeFloat = 0.0
    """Price of a call of a coroutine reward, in any currency; what a step costs is reward_calls/price."""


@dataclass(frozen=True, config=STRICT)
class RolloutConfig:
    n: Count = 8
    """Responses per prompt: the size of a group."""
    temperature: Annotated[float, Field(gt=0), "training log-probs are divided by it"] = 1.0
    """Sampling temperature; training log-probs are those of the same distribution."""
    top_p: PositiveShare = 1.0
    """Nucleus sampling; training log-probs are those of the full distribution."""
    top_k: CountOrNoLimit = -1
    """Number of likeliest tokens to sample from; -1 samples from all."""
    ignore_eos: bool = False
    """Responses that always take max_response_length tokens, as benchmarks want."""
    seed: NonNegativeInt = 1
    """Seed of the engine."""
    limit_images: NonNegativeInt = 0
    """Most images per prompt; 0 leaves the engine's own limit."""
    dtype: RolloutDtype = "bf16"
    """Type of the engine's weights."""
    gpu_memory_utilization: AutoShare = AUTO
    """Share of a GPU's memory that the engine may take; auto is what the rank beside it leaves, up to its need."""
    enforce_eager: bool = False
    """Eager mode: the engine does without CUDA graphs."""
    enable_chunked_prefill: bool = False
    """Chunked prefill: long prompts are read in pieces."""
    tensor_parallel_size: Count = 1
    """Tensor parallelism: GPUs that share one engine."""
    max_model_len: Count | None = None
    """Longest prompt plus response the engine serves; null is P + R."""
    max_num_batched_tokens: Count = 8192
    """Most tokens in one pass of the engine."""
    max_num_seqs: Count = 1024
    """Most responses that the engine writes at the same time."""
    shared_prompt: bool = True
    """Prefix sharing: an engine reads a prompt's keys and values once for n samples (FlashAttention 3, Hopper)."""
    fast_scheduler: bool = True
    """Fast scheduling: steps that only decode take a short path, prompts are hashed once; false leaves vLLM's own."""
    disable_log_stats: bool = True
    """Engine statistics kept out of the log."""
    val_override_config: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.5, "n": 1})
    """Sampling keys of the engine (n, temperature, top_p, top_k, ...) that validation sets differently."""


@dataclass(frozen=True, config=STRICT)
class WorkerConfig:
    actor: ActorConfig = field(default_factory=ActorConfig)
    ref: ReferenceConfig = field(default_factory=ReferenceConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)


@dataclass(frozen=True, config=STRICT)
class TrainerConfig:
    total_epochs: Count = 75
    """Passes over the training rows, when max_steps does not end the run earlier."""
    max_steps: Count | None = 75
    """Training steps; null trains total_epochs, as does a given total_epochs when max_steps is not given."""
    max_try_make_batch: CountOrNoLimit = 20
    """Calls of the engines after which a step whose groups were filtered away ends the run; -1: no limit."""
    critic_warmup: NonNegativeInt = 0
    """Steps before this one train the critic alone."""
    max_skipped_updates: CountOrNoLimit = 10
    """Optimizer steps in a row with a gradient that is not finite after which the run ends; -1: no limit."""
    project_name: str = "spatialthinker"
    """Name under which loggers file several runs."""
    experiment_name: str = "spatialthinker_3b_grpo"
    """Name of this run."""
    logger: Annotated[tuple[Logger, ...], Field(min_length=1)] = ("console", "file", "tensorboard")
    """Loggers of metrics and validation samples."""
    nnodes: Count = 1
    """Machines of the run."""
    n_gpus_per_node: Count = 4
    """FSDP ranks per machine, on a CPU too."""
    memory_gb: PositiveFloat | None = None
    """GiB of each GPU that the run may take, the shares of engines being of these; null: all that the GPU has."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that ranks compute on; auto takes the GPUs when there are any."""
    seed: NonNegativeInt = 1
    """Seed of everything that has no seed of its own."""
    val_freq: int = 5
    """Steps between validations; -1 validates only before and after training."""
    val_before_train: bool = True
    """Validation before the first step."""
    val_only: bool = False
    """Validates once and stops."""
    val_generations_to_log: NonNegativeInt = 3
    """Validation samples written out each time."""
    rollouts_to_keep: Literal["all", "odd", "none"] | Count = "all"
    """Recorded rollouts: all, none, groups a step, or odd (flat, failed format, truncated, largest advantages)."""
    rollouts_tokens: bool = False
    """Ids, log-probs and ratios of all tokens in the recorded rollouts, as far as the step has them."""
    save_freq: int = 5
    """Steps between checkpoints; -1 saves only after the last step."""
    save_limit: int = 1
    """Newest checkpoints kept, and the one with the best validation beside them; -1 keeps all."""
    save_model_only: bool = False
    """Checkpoints of the weights alone; a run that goes on from one starts with a new optimizer."""
    save_in_background: bool = True
    """Asynchronous checkpoints: training goes on while one is written from a copy in host memory."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """Reaction to a checkpoint that cannot be written, on a full disk for instance; the last one must be."""
    save_checkpoint_path: str = "checkpoints/{project_name}/{experiment_name}"
    """Folder of the run's checkpoints and logs; the two names in braces are filled in."""
    watchdog_timeout_s: PositiveFloat | None = 3600.0
    """Seconds after which a call to the workers has stalled: all write their stacks, the run ends; null waits."""
    max_host_memory_share: PositiveShare = 0.94
    """Share of a machine's or container's memory at which the run saves and ends, before the system kills it."""
    load_checkpoint_path: str | None = None
    """Checkpoint folder `.../global_step_N` to start from, unless a newer one of that start is there; null: none."""
    find_last_checkpoint: bool = True
    """Goes on from the newest complete checkpoint in save_checkpoint_path; false sets those there aside."""
    check_versions: bool = True
    """Requires the versions of torch, transformers, vLLM and the like that this trainer was tried with."""
    dry_run: bool = False
    """Prints what the run would do and need, with its first prompts, and stops before anything starts."""
    ray_timeline: str | None = None
    """File for Ray's timeline of the run, written at its end; needs RAY_PROFILING=1 in the environment."""


@dataclass(frozen=True, config=STRICT)
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
