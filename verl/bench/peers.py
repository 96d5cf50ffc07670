"""TRL's GRPOTrainer on a benchmark's model and rows: its settings, and its phases timed from outside."""

# ruff: noqa: T201  a step is printed as it ends
import io
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from verl.bench.inputs import score_by_digest
from verl.bench.setting import FOLDER

ROWS: tuple[str, ...] = (
    "rollout",
    "weight sync + wake",
    "sleep",
    "images",
    "old",
    "reference",
    "update",
    "rest",
    "whole step",
)
"""Phases, named as those of verl.bench.measure. Images: rows are loaded, pictures read twice, their patches copied."""
ROOMY_GIB = 100
"""Memory of a GPU on which engine and trainer fit side by side; on a smaller one the engine sleeps meanwhile."""
HOLD = """
import sys, torch
rest = torch.cuda.mem_get_info()[0] - int(float(sys.argv[1]) * 2**30)
held = torch.empty(max(0, rest), dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
print(rest, flush=True)
sys.stdin.read()
"""
"""Program that holds a GPU's memory but for so many GiB until its input ends, and prints how many bytes it holds."""


@dataclass(frozen=True)
class Load:
    """Sizes of a step: a generation, and all optimizer steps on it.

    Attributes:
        prompts: of a generation.
        update: prompts of an optimizer step.
        samples: responses of a prompt.
        prompt_tokens, picture_tokens, response_tokens: of each; those of the picture are among the prompt's.
        micro: responses of a forward and backward pass.
    """

    prompts: int
    update: int
    samples: int
    prompt_tokens: int
    picture_tokens: int
    response_tokens: int
    micro: int

    def __post_init__(self) -> None:
        if self.prompts % self.update:
            raise SystemExit(f"{self.prompts} prompts are no multiple of an update's {self.update}; change --prompts")
        if self.update * self.samples % self.micro:
            raise SystemExit(
                f"--micro {self.micro} does not divide an update's {self.update * self.samples} responses"
            )

    @property
    def updates(self) -> int:
        """Optimizer steps of a generation."""
        return self.prompts // self.update

    @property
    def passes(self) -> int:
        """Forward and backward passes of a generation."""
        return self.prompts * self.samples // self.micro


def trl_settings(load: Load, config: Any, is_gpu: bool, gpu_gib: float, banned: list[int]) -> dict[str, Any]:
    """GRPOConfig's arguments for a load, without the model's.

    Args:
        config: the benchmark's.
        is_gpu: with vLLM; else transformers generates.
        gpu_gib: memory of the GPU.
        banned: token ids that are never sampled.
    """
    actor, rollout, algorithm = config.worker.actor, config.worker.rollout, config.algorithm
    optim, engine_share = actor.optim, rollout.gpu_memory_utilization
    usable_gib = min(config.trainer.memory_gb or gpu_gib, gpu_gib)
    settings: dict[str, Any] = {
        # TRL counts a generation and an optimizer step in passes, and loads the whole generation's rows for each pass:
        # passes of single responses would load them eight times as often as those of a prompt's responses.
        "per_device_train_batch_size": load.micro,
        "gradient_accumulation_steps": load.passes // load.updates,
        "steps_per_generation": load.passes,
        "num_generations": load.samples,
        "num_iterations": 1,
        "max_completion_length": load.response_tokens,
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        # The pass of a reference model, which this project's step has too.
        "beta": algorithm.kl_coef if algorithm.use_kl_loss else 0.0,
        # This project's loss has no such correction, for which TRL would compute the old log-probs of a single update.
        "vllm_importance_sampling_correction": False,
        "bf16": is_gpu,
        "use_cpu": not is_gpu,
        # Without it each token of a 3B model keeps 4 to 5 MB of activations, so that passes had to be smaller.
        "gradient_checkpointing": is_gpu,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "optim": "adamw_torch_fused" if is_gpu else "adamw_torch",
        "learning_rate": optim.lr,
        "adam_beta1": optim.betas[0],
        "adam_beta2": optim.betas[1],
        "weight_decay": optim.weight_decay,
        "max_grad_norm": actor.max_grad_norm,
        "lr_scheduler_type": "constant",
        # Fused norms and products; log-probs have a kernel of TRL's own. Its rotation is for an older transformers.
        "use_liger_kernel": is_gpu and find_spec("liger_kernel") is not None,
        "liger_kernel_config": {"rope": False},
        "shuffle_dataset": False,
        "dataloader_num_workers": 0,  # keep_rows has them decoded; other processes would have to pickle pictures
        "dataloader_pin_memory": False,
        "log_multimodal": False,  # would keep a generation's pictures
        "logging_strategy": "no",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if not is_gpu:
        return settings | {"generation_kwargs": {"min_new_tokens": load.response_tokens, "suppress_tokens": banned}}
    return settings | {
        "use_vllm": True,
        "vllm_mode": "colocate",
        # As much as this project's engine; TRL's own default where that is worked out at the start of a run.
        "vllm_gpu_memory_utilization": (0.3 if engine_share == "auto" else engine_share) * usable_gib / gpu_gib,
        # The picture's tokens twice: TRL expands them, and vLLM expands the first of them again.
        "vllm_max_model_length": load.prompt_tokens + load.picture_tokens + load.response_tokens,
        # An engine that slept has its memory mapped again in every step.
        "vllm_enable_sleep_mode": usable_gib < ROOMY_GIB,
        # TRL decodes the ids itself, so text that vLLM makes token by token is thrown away. A sampled picture token
        # would be one without a picture in the passes, which transformers refuses.
        "generation_kwargs": {
            "ignore_eos": True,
            "detokenize": False,
            "logit_bias": {token: -100.0 for token in banned},
        },
    }


@contextmanager
def hold_memory(all_but_gib: float | None) -> Iterator[None]:
    """A GPU of which another process holds all but so many GiB; without a number, the GPU as it is.

    PyTorch's own limit would count an engine's memory while the engine sleeps and the memory is free.

    Raises:
        SystemExit: fewer are free.
    """
    if all_but_gib is None:
        yield
        return
    command = [sys.executable, "-c", HOLD, str(all_but_gib)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout
            answer = holder.stdout.readline()
            if not answer:
                raise SystemExit(f"--memory_gb {all_but_gib:g}: the rest of the GPU's memory could not be held")
            if int(answer) < 0:
                free = all_but_gib + int(answer) / 2**30
                raise SystemExit(f"--memory_gb {all_but_gib:g}: the GPU has {free:.1f} GiB free; give at most these")
            yield
        finally:
            holder.kill()


def attention_of(choice: str, is_gpu: bool) -> str:
    """TRL's attn_implementation, or `varlen`, of use_varlen; `auto` is FlashAttention 2 where it is installed."""
    if choice != "auto":
        return choice
    return "sdpa" if not is_gpu else "flash_attention_2" if find_spec("flash_attn") else "varlen"


def use_varlen(trainer: Any) -> None:
    """Gives TRL's models torch's variable-length flash attention in the vision encoder, as this project registers it.

    SDPA is called once for each window of each picture there: 1,348 times for a picture of 800 x 600 in a forward pass
    of Qwen2.5-VL. FlashAttention takes all windows of a layer in one call, and so does this. The decoder keeps SDPA,
    whose rows without padding are flash attention.
    """
    from verl.model.attention import VISION_ATTENTION

    for model in filter(None, (trainer.model, trainer.ref_model)):
        model.set_attn_implementation({"vision_config": VISION_ATTENTION})


class Phases:
    """Seconds of each phase of each step, without those of the phases inside it; what no phase is in is the update.

    Args:
        sync: waits for the device, so that its work counts where it was asked for.

    Attributes:
        steps: phase -> seconds, of each step.
        counts: of tokens of a prompt and of responses, and of this step's passes.
    """

    def __init__(self, sync: Callable[[], Any]) -> None:
        self.sync, self.names = sync, ["start"]
        self.seconds: dict[str, float] = dict.fromkeys(ROWS, 0.0)
        self.steps: list[dict[str, float]] = []
        self.counts: Counter[str] = Counter()
        self.since = time.perf_counter()

    def lap(self) -> None:
        """Adds the time since the last lap to the innermost phase."""
        self.sync()
        now = time.perf_counter()
        name = self.names[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.lap()
        self.names.append(name)
        try:
            yield
        finally:
            self.lap()
            self.names.pop()

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Times a method of an object as a phase."""
        inner = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self(name):
                return inner(*arguments, **options)

        setattr(owner, method, timed)

    def start(self) -> None:
        """Begins the first step, and forgets what came before."""
        self.lap()
        self.names, self.seconds = ["update"], dict.fromkeys(ROWS, 0.0)

    def end_step(self) -> None:
        """Ends a step, and prints it."""
        self.lap()
        ended = self.seconds | {"whole step": sum(self.seconds.values())}
        self.steps.append(ended)
        print(f"step {len(self.steps)}, seconds: {list_seconds(ended)}", flush=True)
        self.seconds, self.counts["passes"] = dict.fromkeys(ROWS, 0.0), 0

    def medians(self) -> dict[str, float]:
        """Phase -> seconds of the steps after the first; of the first where there is no other."""
        steps = self.steps[1:] or self.steps
        return {name: statistics.median(step[name] for step in steps) for name in ROWS}

    def describe(self, load: Load) -> str:
        """The point that a step has reached, in words."""
        now = f"in {self.names[-1]} for {time.perf_counter() - self.since:.1f} s"
        passes = f"{self.counts['passes']} of {load.passes} backward passes"
        return f"step {len(self.steps) + 1}, {now}; {passes}; seconds before: {list_seconds(self.seconds) or 'none'}"


def list_seconds(seconds: dict[str, float]) -> str:
    """The phases that took time, on a line."""
    return ", ".join(f"{name} {time_s:.2f}" for name, time_s in seconds.items() if time_s)


def make_trainer(load: Load, setting: Any, phases: Phases, given: Any) -> Any:
    """TRL's trainer on the setting's model and rows.

    Args:
        given: the command line of scripts/bench_peers.py.

    Raises:
        SystemExit: TRL's prompts have other tokens than the benchmark's.
    """
    import torch
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl.data_utils import prepare_multimodal_messages

    from verl.data.processor import vision_token_ids

    config, processor, is_gpu = setting.config, setting.processor, setting.device == "cuda"
    model = write_model(Path(config.worker.actor.model.model_path), processor, config.data)
    gpu_gib = torch.cuda.mem_get_info()[1] / 2**30 if is_gpu else 0.0
    settings = trl_settings(load, config, is_gpu, gpu_gib, vision_token_ids(processor)) | given.trl
    dtype, attention = "bfloat16" if is_gpu else "float32", attention_of(given.attention, is_gpu)
    settings["model_init_kwargs"] = {"dtype": dtype, "attn_implementation": attention.replace("varlen", "sdpa")}
    print(f"TRL {version('trl')}, {attention} attention: {json.dumps(settings)}", flush=True)

    class TimedTrainer(GRPOTrainer):
        def get_batch_samples(self, *arguments: Any) -> Any:
            with phases("images"):
                return super().get_batch_samples(*arguments)

        def _prepare_inputs(self, generation_batch: Any) -> Any:
            if self._step % load.passes:
                return super()._prepare_inputs(generation_batch)  # a slice; the device is not waited for
            with phases("images"):
                return super()._prepare_inputs(generation_batch)

        def _generate(self, prompts: Any) -> Any:
            with phases("rollout"):
                answer = super()._generate(prompts)
            lengths = [len(ids) for ids in answer[1]]
            phases.counts |= {"shortest response": min(lengths), "longest response": max(lengths)}
            return answer

        def _get_per_token_logps_and_entropies(self, model: Any, *arguments: Any, **options: Any) -> Any:
            if torch.is_grad_enabled():
                return super()._get_per_token_logps_and_entropies(model, *arguments, **options)
            with phases("reference" if model is self.ref_model else "old"):
                return super()._get_per_token_logps_and_entropies(model, *arguments, **options)

        def training_step(self, *arguments: Any) -> Any:
            loss = super().training_step(*arguments)
            phases.counts["passes"] += 1
            return loss

    class Steps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            phases.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % load.updates == 0:
                phases.end_step()

    def digest(completions: list[Any], **_: Any) -> list[float | None]:
        scores = score_by_digest([{"response": completion[0]["content"]} for completion in completions])
        return [score["overall"] for score in scores]

    rows = keep_rows()
    trainer = TimedTrainer(
        model=str(model),
        reward_funcs=digest,
        args=GRPOConfig(output_dir=str(FOLDER / "trl"), max_steps=given.steps * load.updates, **settings),
        train_dataset=rows,
        processing_class=processor,
        callbacks=[Steps()],
    )
    first = prepare_multimodal_messages(rows[0]["prompt"], images=rows[0]["images"])
    ids = trainer._tokenize_prompts([first])[0][0]
    if len(ids) != load.prompt_tokens:
        raise SystemExit(f"TRL's prompts have {len(ids)} tokens, and the benchmark's {load.prompt_tokens}")
    phases.counts["tokens of a prompt"] = len(ids)
    if attention == "varlen":
        use_varlen(trainer)
    phases.wrap(trainer, "_tokenize_prompts", "images")
    phases.wrap(trainer, "_calculate_rewards", "rest")
    if settings.get("use_vllm"):
        time_engine(trainer.vllm_generation, phases, processor.image_token_id if given.raw_prompts else None)
    return trainer


def write_model(source: Path, processor: Any, data: Any) -> Path:
    """A folder of the model with the benchmark's bounds of pictures, which TRL and vLLM read from the processor."""
    from verl.data.processor import pixel_limits

    limits = pixel_limits(processor, data.min_pixels, data.max_pixels)
    processor.image_processor.size = {"shortest_edge": limits["min_pixels"], "longest_edge": limits["max_pixels"]}
    processor.tokenizer.padding_side = "left"
    folder = FOLDER / "trl_model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    processor.save_pretrained(folder)
    for part in (source / "config.json", *source.glob("generation_config.json"), *source.glob("*.safetensors*")):
        (folder / part.name).symlink_to(part.resolve())
    return folder


def keep_rows() -> Any:
    """The benchmark's rows as a data set for TRL, with pictures that are decoded once.

    TRL's sampler names all rows of a generation for each pass, and those of the first are used: 128 prompts of 8
    responses in passes of 8 load 131,072 rows, which takes minutes where each of them is decoded.
    """
    import pyarrow.parquet as pq
    from datasets import Dataset
    from PIL import Image

    rows = pq.read_table(FOLDER / "rows.parquet").to_pylist()
    pictures = [[Image.open(io.BytesIO(part["bytes"])).convert("RGB") for part in row["images"]] for row in rows]
    prompts = [[{"role": "user", "content": row["problem"].replace("<image>", "")}] for row in rows]

    def look_up(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        return {"prompt": [prompts[row] for row in batch["row"]], "images": [pictures[row] for row in batch["row"]]}

    return Dataset.from_dict({"row": list(range(len(rows)))}).with_transform(look_up)


def time_engine(engine: Any, phases: Phases, picture_token: int | None) -> None:
    """Times what TRL's VLLMGeneration does; with a picture's token id, vLLM gets one for each run of such tokens."""
    generate = engine.generate

    def generate_counted(prompts: list[list[int]], *arguments: Any, **options: Any) -> Any:
        if picture_token is not None:
            prompts = [join_runs(ids, picture_token) for ids in prompts]
        answer = generate(prompts, *arguments, **options)
        phases.counts["tokens of a prompt in the engine"] = len(answer[0][0])
        return answer

    engine.generate = generate_counted
    phases.wrap(engine, "sync_weights", "weight sync + wake")
    phases.wrap(engine.llm, "wake_up", "weight sync + wake")
    phases.wrap(engine.llm, "sleep", "sleep")


def join_runs(ids: list[int], token: int) -> list[int]:
    """The ids with one of this token in place of each run of it."""
    return [each for at, each in enumerate(ids) if not (each == token and at and ids[at - 1] == token)]
