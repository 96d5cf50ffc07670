"""Passes of a training step alone: seconds with prompts and images shared by a group, and repeated."""

# ruff: noqa: T201  a table on the terminal is what this is for
import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from verl.bench.kernels import KernelTable
from verl.bench.setting import ROOFLINE_FLOPS, Setting, prepare

WARM_GROUPS = 8
"""Groups of the passes before the timed ones, as many as a micro-batch may hold: its size, too, is met a first time.

With 4 groups, and 8 in a micro-batch, the first timed update took 12.3 s on an H200, and later ones 8.2 s.
"""
KL_COEF = 0.01
TITLES = "prompt response n groups old reference update all group mfu repeated times".split()


class Shape(NamedTuple):
    """Tokens of a prompt with its picture, tokens of each response, and responses of a group."""

    prompt: int
    response: int
    n: int

    @property
    def tokens(self) -> int:
        """Of a group with a shared prompt."""
        return self.prompt + self.n * self.response


def parse_shape(text: str) -> Shape:
    """The shape that `PROMPT:RESPONSE:N` names."""
    try:
        shape = Shape(*map(int, text.split(":")))
    except (TypeError, ValueError):
        shape = None
    if shape is None or min(shape) < 1:
        raise argparse.ArgumentTypeError(
            f"{text} is not PROMPT:RESPONSE:N, three numbers of at least 1, as 1586:400:8"
        )
    return shape


def share_groups(shapes: Sequence[Shape], num_groups: int, num_ranks: int) -> list[int]:
    """Groups of each shape, a multiple of the ranks: so many of the first, and about as many tokens of the others."""
    tokens = num_groups * shapes[0].tokens
    return [max(1, round(tokens / shape.tokens)) * num_ranks for shape in shapes]


def time_passes(
    actor: Any, groups: Any, shared: bool, watch: Callable[[str], AbstractContextManager[None]] = nullcontext
) -> dict[str, float]:
    """Seconds of old and reference log-probs and update over the groups; each runs in the context of `watch`."""
    import torch

    from verl.trainer.ray_trainer import GROUP_COLUMNS, GROUP_KEYS

    loaded = groups.select(list(GROUP_KEYS), GROUP_COLUMNS)
    loaded.meta_info = {"shared_prompt": shared, "images_once": shared}
    actor.load_groups(loaded)
    seconds = {}
    carrier = groups.select(["response_mask"], [])
    carrier.batch["advantages"] = torch.randn(carrier.batch["response_mask"].shape[:2])
    carrier.meta_info |= {"step": 1, "kl_coef": KL_COEF}
    for name, method in (
        ("old", actor.compute_log_probs),
        ("ref", actor.compute_ref_log_probs),
        ("update", actor.update_actor),
    ):
        with watch(name):
            start = time.perf_counter()
            out = method(carrier)
            seconds[name] = time.perf_counter() - start
        if name != "update":
            carrier.batch[f"{name}_log_probs"] = out.batch[f"{name}_log_probs"]
    return seconds


def print_ratio(actor: Any, groups: Any) -> dict[str, dict[str, float]]:
    """Seconds of each pass with and without shared prompts and images, and the speedup."""
    shared = print_shared(actor, groups)["shared"]
    repeated = time_passes(actor, groups, shared=False)
    ratio = {name: repeated[name] / shared[name] for name in shared}
    ratio["all"] = sum(repeated.values()) / sum(shared.values())
    print(f"repeated: {json.dumps(repeated)}\nratio: {json.dumps(ratio)}", flush=True)
    return {"shared": shared, "repeated": repeated, "ratio": ratio}


def print_shared(actor: Any, groups: Any) -> dict[str, dict[str, float]]:
    """Seconds of each pass with shared prompts and images."""
    shared = time_passes(actor, groups, shared=True)
    print(f"\n{len(groups)} groups, shared: {json.dumps(shared)}", flush=True)
    return {"shared": shared}


def random_groups(shape: Shape, prompts: Sequence[Any], pad_token_id: int, lengths: Any = None) -> Any:
    """Prompts with responses of random tokens, as many as the shape says.

    They are as long as it says, or with a distribution of lengths at most so long.
    """
    import torch

    from verl.bench.inputs import draw_lengths
    from verl.data.dataset import collate_prompts

    groups = collate_prompts(prompts, pad_token_id)
    sizes = len(prompts), shape.n, shape.response
    letters = prompts[0].ids[-8:]
    groups.batch["responses"] = letters[torch.randint(len(letters), sizes, generator=torch.Generator().manual_seed(0))]
    drawn = draw_lengths(lengths, sizes[:2], shape.response, seed=0) if lengths else shape.response
    limits = torch.as_tensor(drawn).expand(sizes[:2]).unsqueeze(-1)
    groups.batch["response_mask"] = torch.arange(shape.response) < limits
    return groups


def run_passes(arguments: argparse.Namespace) -> None:
    """Loads the training ranks alone, and prints their passes' times and share of the roofline for each shape."""
    import ray
    import torch

    from verl.trainer.dry_run import read_data_shape
    from verl.trainer.main import build_datasets, start_ray
    from verl.trainer.model_checks import measure_checked_model
    from verl.trainer.plan import make_plan, measure_gpu, probe_passes
    from verl.trainer.worker_groups import find_place, place_ranks

    setting = prepare(arguments)
    config, device, pad = setting.config, setting.device, setting.processor.tokenizer.pad_token_id
    train_set, _ = build_datasets(config, setting.processor)
    gpu = measure_gpu(config, device)
    plan = make_plan(config, measure_checked_model(config), read_data_shape(train_set), gpu, device == "cuda")
    config, ranks = plan.config, plan.config.num_ranks
    shapes = arguments.shape or [
        Shape(setting.prompt_tokens, config.data.max_response_length, config.worker.rollout.n)
    ]
    limit = config.data.rollout_batch_size // ranks
    counts = share_groups(shapes, min(arguments.ratio_groups or limit, limit), ranks)
    name = f"{ranks} x {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}"
    rows: list[dict[str, Any]] = []
    start_ray(config, device)
    try:
        actor = place_ranks(config, device, 1, find_place(config, device), notes_kernels=arguments.kernels)
        actor.load(*actor.run_on(0, "open_store"))
        print("\n".join([*plan.lines, *probe_passes(plan, actor, train_set, pad)]), flush=True)
        for shape, count in zip(shapes, counts, strict=True):
            train_set = setting.with_prompts(shape.prompt)
            prompts = [train_set[index % len(train_set)] for index in range(count)]
            groups = random_groups(shape, prompts, pad, arguments.lengths)
            if not rows:
                for shared in (True,) if arguments.shared_only else (True, False):
                    time_passes(actor, groups[: min(WARM_GROUPS * ranks, count)], shared)
            mean = shape._replace(response=round(float(groups.batch["response_mask"].sum()) / count / shape.n))
            if arguments.lengths:
                print(f"\nResponses of {mean.response} tokens in the mean, at most {shape.response}", flush=True)
            row = {"shape": shape._asdict(), "groups": count, "mean_response": mean.response}
            if arguments.kernels:
                row["first_kernels"] = _note_kernels(actor, groups, "sizes met for the first time")
            row |= (print_shared if arguments.shared_only else print_ratio)(actor, groups)
            whole = sum(row["shared"].values())
            row["mfu"] = round(_operations(setting, mean, count) / ranks / whole / ROOFLINE_FLOPS, 3)
            if arguments.kernels:
                row["kernels"] = _note_kernels(actor, groups, "once more")
            rows.append(row)
            if arguments.dump:  # what is measured stays, should a later shape fail
                Path(arguments.dump).write_text(json.dumps({"device": name, "rows": rows}, indent=1))
    finally:
        ray.shutdown()
        if rows:
            print(f"\n{name}, seconds of passes over groups of a shape, prompts shared and repeated")
            print("".join(f"{title:>10}" for title in TITLES))
        for row in rows:
            print("".join(f"{cell:>10}" for cell in _cells(row)), flush=True)


def _note_kernels(actor: Any, groups: Any, title: str) -> dict[str, dict[str, float]]:
    """Kernels of each pass over the groups, printed."""
    table = KernelTable(actor)
    time_passes(actor, groups, True, table.watch)
    table.print(title)
    return table.passes


def _cells(row: dict[str, Any]) -> list[Any]:
    """Cells of the row, in the order of TITLES."""
    seconds = row["shared"]
    whole, repeated = sum(seconds.values()), sum(row.get("repeated", {}).values())
    cells = [*row["shape"].values(), row["groups"], *(f"{value:.2f}" for value in (*seconds.values(), whole))]
    compared = [f"{repeated:.2f}", f"{repeated / whole:.2f}"] if repeated else ["-", "-"]
    return [*cells, f"{whole / row['groups']:.3f}", row["mfu"], *compared]


def _operations(setting: Setting, shape: Shape, num_groups: int) -> float:
    """Operations of old and reference log-probs and of the update, which takes three times those of a forward pass."""
    from transformers import AutoConfig

    from verl.model.flops import group_flops

    model = AutoConfig.from_pretrained(setting.config.worker.actor.model.model_path)
    num_images, patches = setting.pictures
    return 5 * num_groups * group_flops(model, patches, *shape, num_images=num_images).total
