"""Setting of a benchmark: the configuration of its command line, its random model, and its rows."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from verl.bench import inputs
from verl.bench.random_models import RANDOM_MODELS, describe_random_model, draw_weights

FOLDER = Path("runs/bench")
"""Of the rows, and of the random models that configurations name."""
ROOFLINE_FLOPS = 800e12
"""FLOP/s of an H100 on large bf16 matmuls: the roofline that bounds times from below."""


def scale_load(config: Any, num_gpus: int) -> list[str]:
    """Overrides for num_gpus GPUs of one machine, each with the load of one rank in `config` (weak scaling)."""
    keys = [f"data.{name}" for name in ("rollout_batch_size", "mini_rollout_batch_size", "val_batch_size")]
    keys += ["worker.actor.global_batch_size", "worker.critic.global_batch_size"]
    sizes = {key: attrgetter(key)(config) for key in keys}
    scaled = {key: size * num_gpus // config.num_ranks for key, size in sizes.items() if size and size > 0}
    scaled |= {"trainer.nnodes": 1, "trainer.n_gpus_per_node": num_gpus}
    return [f"{key}={value}" for key, value in scaled.items()]


@dataclass(frozen=True)
class Setting:
    """Configuration, rows and model that a benchmark runs on.

    Attributes:
        config: checked.
        device: "cuda" or "cpu".
        processor: of the model.
        prompt_tokens: of every prompt.
        pictures: that the vision encoder sees apart in a prompt, and the patches of each.
        write: writes the rows with prompts of so many tokens; returns `pictures`.
    """

    config: Any
    device: str
    processor: Any
    prompt_tokens: int
    pictures: tuple[int, int]
    write: Callable[[int], tuple[int, int]]

    def with_prompts(self, num_tokens: int) -> Any:
        """The data set with prompts of so many tokens in place of those that are there."""
        from verl.trainer.main import build_datasets

        self.write(num_tokens)
        return build_datasets(self.config, self.processor)[0]


def prepare(arguments: argparse.Namespace) -> Setting:
    """The configuration of the command line, after its random models and rows have been written."""
    from verl.config.loading import load_config
    from verl.data.processor import load_run_processor
    from verl.trainer.main import check_versions, choose_device, video_settings

    config_file, overrides = arguments.config, arguments.overrides
    rows = FOLDER / "rows.parquet"
    random_models = [FOLDER / name for name in RANDOM_MODELS if name in f"{Path(config_file).read_text()} {overrides}"]
    for model in random_models:
        describe_random_model(model)
    chosen = [f"config={config_file}", f"data.train_files={rows}", f"data.val_files={rows}"]
    chosen += [f"worker.reward.reward_function={inputs.__file__}:{inputs.score_by_digest.__name__}", *overrides]
    if arguments.shape:
        largest = [max(sizes) for sizes in zip(*arguments.shape, strict=True)]
        keys = ("data.max_prompt_length", "data.max_response_length", "worker.rollout.n")
        chosen += [f"{key}={size}" for key, size in zip(keys, largest, strict=True)]
        chosen += [f"worker.rollout.max_num_batched_tokens={largest[0] + largest[1]}"]
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.touch()
    config = load_config(chosen)
    if arguments.memory_gb:
        chosen = [*chosen, f"trainer.memory_gb={arguments.memory_gb}"]
        config = load_config(chosen)
    if arguments.gpus:
        config = load_config([*chosen, *scale_load(config, arguments.gpus)])
    check_versions(config)
    device = choose_device(config)
    for model in random_models:
        if not config.worker.actor.model.random_weights:
            draw_weights(model)
    processor = load_run_processor(config)
    width, height = map(int, arguments.image.split("x"))
    prompt_tokens = min(arguments.prompt_tokens or config.data.max_prompt_length, config.data.max_prompt_length)
    videos, size = video_settings(config, processor), (width, height)

    def write(num_tokens: int) -> tuple[int, int]:
        return inputs.write_rows(rows, processor, config.data, size, num_tokens, arguments.frames, videos)

    if arguments.shape:
        write(min(shape.prompt for shape in arguments.shape))  # what is too short is said before anything loads
    return Setting(config, device, processor, prompt_tokens, write(prompt_tokens), write)
