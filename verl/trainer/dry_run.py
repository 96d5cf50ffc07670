"""`trainer.dry_run=true`: prints resolved configuration, steps, memory estimate and first prompts; starts nothing."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import torch

from spatialthinker.storage.images import read_header
from verl.config.auto import without_auto
from verl.config.loading import config_to_dict
from verl.config.records import Config
from verl.data.dataset import Prompt, RLHFDataset
from verl.data.videos import Plan
from verl.model.packing import plan_micro_batches
from verl.model.qwen_vl import Grid
from verl.trainer.checks import Seen, describe_value, evaluate, find_fired, share_signs
from verl.trainer.memory_estimate import GPU_ALLOWANCE_GB, DataShape, ModelShape, Phase, estimate_memory, measure_data

NUM_SHOWN = 3
NUM_SAMPLED_IMAGES = 64
NUM_CHECKED = 256
"""Rows whose ground truths are checked, evenly spaced."""
USED_SHARE = 0.95
"""Share of a GPU's memory that advice may use; the rest covers errors of the estimate."""
GB = 1024**3


def print_dry_run(
    config: Config,
    train_set: RLHFDataset,
    num_steps: int,
    phases: list[Phase],
    score_gold: Callable[[Prompt], dict[str, float]],
    read_gold: Callable[[Sequence[Prompt]], tuple[list[str], list[dict[str, Any]]]],
    plan: Sequence[str] = (),
) -> None:
    """Prints resolved configuration, steps, batch sizes, plan, memory estimate and first prompts."""
    print(json.dumps(config_to_dict(config), indent=2))  # noqa: T201
    lines = [
        *describe_steps(config, len(train_set), num_steps),
        *describe_batch(config),
        *plan,
        *describe_memory(config, phases),
        *check_data(train_set, config.data.max_response_length, read_gold),
    ]
    print("\n".join(["", *lines]))  # noqa: T201
    for index in range(min(NUM_SHOWN, len(train_set))):
        print("\n" + describe_prompt(train_set, index, score_gold(train_set[index])))  # noqa: T201


def check_data(
    train_set: RLHFDataset,
    max_response_length: int,
    read_gold: Callable[[Sequence[Prompt]], tuple[list[str], list[dict[str, Any]]]],
) -> list[str]:
    """Lines on the checks of a step that need no model, over the responses that state the ground truths of a sample.

    Args:
        read_gold: prompts -> texts and descriptions of these responses.
    """
    stride = -(-len(train_set) // NUM_CHECKED)
    prompts = [train_set.read(index, is_resized=False) for index in range(0, len(train_set), stride)]
    texts, descriptions = read_gold(prompts)
    lengths = [len(ids) for ids in train_set.processor.tokenizer(texts)["input_ids"]]
    truncated = sum(length > max_response_length for length in lengths) / len(lengths)
    values = evaluate(Seen(truncated=truncated, signs=share_signs(descriptions)))
    lines = [f"Checks over the ground truths of {len(prompts)} rows: {', '.join(values)}"]
    fired = [f"  Worth a look: {describe_value(name, values[name])}" for name in find_fired(values)]
    return lines + (fired or ["  nothing is worth a look"])


def describe_steps(config: Config, num_prompts: int, num_steps: int) -> list[str]:
    """Lines on the numbers of steps, epochs, validations and checkpoints."""
    trainer, size = config.trainer, config.data.rollout_batch_size
    per_epoch = num_prompts // size
    epochs = num_steps / per_epoch if per_epoch else 0

    def count(frequency: int) -> int:
        return num_steps // frequency + (num_steps % frequency > 0) if frequency > 0 else 1

    return [
        f"Steps: {num_steps} of {size} prompts each; {num_prompts} prompts make {per_epoch} steps an epoch, "
        f"so these are {epochs:.1f} epochs",
        f"Validations: {count(trainer.val_freq) + trainer.val_before_train}; checkpoints: {count(trainer.save_freq)}",
    ]


def describe_batch(config: Config) -> list[str]:
    """Lines on batch, mini-batch and micro-batch sizes of a step."""
    config = without_auto(config)
    data, actor, n, ranks = config.data, config.worker.actor, config.worker.rollout.n, config.num_ranks
    updates = data.rollout_batch_size // actor.global_batch_size * actor.ppo_epochs
    share = actor.global_batch_size // ranks
    longest = data.max_prompt_length + data.max_response_length
    lines = [
        f"Batch: {data.rollout_batch_size} prompts x {n} responses = {data.rollout_batch_size * n} responses a step",
        f"Updates: {updates} a step, each of {actor.global_batch_size} prompts = {actor.global_batch_size * n} "
        f"responses; {share} prompts for each of {ranks} ranks",
    ]
    for name, size, groups in (
        ("update", actor.micro_batch_size_per_device_for_update, share),
        ("log-probs", actor.micro_batch_size_per_device_for_experience, data.rollout_batch_size // ranks),
    ):
        plan = plan_micro_batches(
            [data.max_prompt_length] * groups,
            [[data.max_response_length] * n] * groups,
            size * longest,
            actor.shared_prompt,
        )
        lines.append(
            f"Micro-batches of {name}: {size} x {longest} = {size * longest} tokens; at full length {len(plan)} "
            "passes of a rank, with shorter prompts and responses fewer"
        )
    return lines


def describe_memory(config: Config, phases: list[Phase]) -> list[str]:
    """A table of memory by phase, this machine's memory, and advice on the activation budget."""
    memory = psutil.virtual_memory()
    allowance = 0.0 if config.trainer.device == "cpu" else GPU_ALLOWANCE_GB
    lines = ["Memory, estimated:          each rank's device   each machine beside devices"]
    lines += [
        f"  {phase.name:<22}{phase.device_gb + allowance:>16.1f} GiB {phase.host_gb:>20.1f} GiB" for phase in phases
    ]
    lines.append(f"This machine has {memory.total / GB:.1f} GiB, {memory.available / GB:.1f} GiB of them free")
    if torch.cuda.is_available() and config.trainer.device != "cpu":
        free, total = torch.cuda.mem_get_info()
        lines.append(f"Its first GPU has {total / GB:.1f} GiB, {free / GB:.1f} GiB of them free")
        lines += advise_budget(config, phases, total / GB)
    return lines


def advise_budget(config: Config, phases: list[Phase], gpu_gb: float) -> list[str]:
    """Advice on a larger worker.actor.model.activation_budget_gb, if the update leaves GPU memory unused."""
    model = without_auto(config).worker.actor.model
    needed = next(phase.device_gb for phase in phases if phase.name == "update") + GPU_ALLOWANCE_GB
    budget = math.floor(model.activation_budget_gb + USED_SHARE * gpu_gb - needed)
    if not model.enable_gradient_checkpointing or budget <= model.activation_budget_gb:
        return []
    return [
        f"The update leaves {gpu_gb - needed:.1f} GiB: worker.actor.model.activation_budget_gb={budget} would compute "
        "fewer activations a second time"
    ]


def host_memory_warning(phases: list[Phase], is_on_cpu: bool, ranks_per_machine: int) -> str | None:
    """A warning if host memory is likely to run out, else None; CPU ranks also use host memory."""
    needed, phase = max(
        (phase.host_gb + is_on_cpu * ranks_per_machine * phase.device_gb, phase.name) for phase in phases
    )
    total = psutil.virtual_memory().total / GB
    if needed <= total:
        return None
    return (
        f"{phase} is estimated to need {needed:.1f} GiB of host memory, and this machine has {total:.1f} GiB; lower "
        "data.rollout_batch_size, data.max_pixels or data.max_response_length; trainer.dry_run=true shows the estimate"
    )


def plan_memory(config: Config, model: ModelShape, train_set: RLHFDataset) -> list[Phase]:
    """The memory estimate of a run with this model and data set."""
    return estimate_memory(config, model, read_data_shape(train_set))


def read_data_shape(train_set: RLHFDataset) -> DataShape:
    """Patches of all prompts, and bytes of images and frames of an evenly spaced sample."""
    stride = -(-len(train_set) // NUM_SAMPLED_IMAGES)
    prompts = (train_set[index] for index in range(0, len(train_set), stride))
    sampled = [sum(map(len, [*prompt.images, *prompt.videos])) for prompt in prompts]
    return measure_data([entry.patch_grids for entry in train_set.entries], sampled)


def describe_prompt(train_set: RLHFDataset, index: int, score: dict[str, float]) -> str:
    """The prompt as tokenised, its ground truth, and the reward of the gold response."""
    prompt, processor = train_set[index], train_set.processor
    parts = ", ".join(f"{name} {value:.3f}" for name, value in score.items())
    entry = train_set.entries[index]
    num_media = len(prompt.images) + len(prompt.videos)
    num_media_tokens = len(prompt.ids) - len(prompt.raw_ids) + num_media
    of_videos = f" and {len(prompt.videos)} videos" if prompt.videos else ""
    return "\n".join(
        [
            f"Row {prompt.row_id}: {len(prompt.ids)} tokens, {num_media_tokens} of them for {len(prompt.images)} "
            f"images{of_videos}",
            *_describe_images(prompt, entry.grids, processor.image_processor),
            *map(_describe_video, entry.plans),
            processor.tokenizer.decode(prompt.raw_ids),
            f"Ground truth: {prompt.ground_truth}",
            f"Reward of the ground truth: {parts}",
        ]
    )


def _describe_video(plan: Plan) -> str:
    """Number, rate and size of the frames that are sampled of a video."""
    sampling, (width, height) = plan.sampling, plan.source_size
    return (
        f"Video of {sampling.num_source_frames} frames of {width} x {height} pixels, {sampling.fps:g} a second, of "
        f"which the model sees {len(sampling.indices)} as {plan.size[0]} x {plan.size[1]}"
    )


def _describe_images(prompt: Prompt, grids: Sequence[Grid], image_processor: Any) -> Iterator[str]:
    """Original and resized size of each image; boxes refer to the original, unless the data say otherwise."""
    for image, (_, rows, columns) in zip(prompt.images, grids, strict=True):
        (width, height), _ = read_header(image)
        patch = image_processor.patch_size
        yield f"Image of {width} x {height} pixels, which the model sees as {columns * patch} x {rows * patch}"
