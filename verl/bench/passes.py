"""Passes of a training step alone: seconds with prompts and images shared by a group, and repeated."""

# ruff: noqa: T201  a table on the terminal is what this is for
import json
import time
from pathlib import Path
from typing import Any

from verl.bench.setting import ROOFLINE_FLOPS, prepare

WARM_GROUPS = 4
"""Groups of the passes before the timed ones, in which kernels are compiled."""


def time_passes(actor: Any, groups: Any, shared: bool, kl_coef: float = 0.01) -> dict[str, float]:
    """Seconds of old and reference log-probs and update over the groups."""
    import torch

    from verl.trainer.ray_trainer import GROUP_COLUMNS, GROUP_KEYS

    loaded = groups.select(list(GROUP_KEYS), GROUP_COLUMNS)
    loaded.meta_info = {"shared_prompt": shared, "images_once": shared}
    actor.load_groups(loaded)
    seconds = {}
    carrier = groups.select(["response_mask"], [])
    carrier.batch["advantages"] = torch.randn(carrier.batch["response_mask"].shape[:2])
    carrier.meta_info |= {"step": 1, "kl_coef": kl_coef}
    for name, method in (
        ("old", actor.compute_log_probs),
        ("ref", actor.compute_ref_log_probs),
        ("update", actor.update_actor),
    ):
        start = time.perf_counter()
        out = method(carrier)
        seconds[name] = time.perf_counter() - start
        if name != "update":
            carrier.batch[f"{name}_log_probs"] = out.batch[f"{name}_log_probs"]
    return seconds


def print_ratio(actor: Any, groups: Any) -> dict[str, dict[str, float]]:
    """Seconds of each pass with and without shared prompts and images, and the speedup."""
    shared = time_passes(actor, groups, shared=True)
    print(f"\n{len(groups)} groups, shared: {json.dumps(shared)}", flush=True)
    repeated = time_passes(actor, groups, shared=False)
    ratio = {name: repeated[name] / shared[name] for name in shared}
    ratio["all"] = sum(repeated.values()) / sum(shared.values())
    print(f"repeated: {json.dumps(repeated)}\nratio: {json.dumps(ratio)}", flush=True)
    return {"shared": shared, "repeated": repeated, "ratio": ratio}


def random_groups(config: Any, train_set: Any, num_groups: int, pad_token_id: int) -> Any:
    """The first prompts with responses of random tokens, all of data.max_response_length."""
    import torch

    from verl.data.dataset import collate_prompts

    prompts = [train_set[index] for index in range(num_groups)]
    groups = collate_prompts(prompts, pad_token_id)
    shape = num_groups, config.worker.rollout.n, config.data.max_response_length
    letters = prompts[0].ids[-8:]
    chosen = torch.randint(len(letters), shape, generator=torch.Generator().manual_seed(0))
    groups.batch["responses"] = letters[chosen]
    groups.batch["response_mask"] = torch.ones(shape, dtype=torch.bool)
    return groups


def run_passes(arguments: Any) -> None:
    """Loads the training ranks alone, and prints their passes' times and share of the roofline."""
    import ray
    import torch
    from transformers import AutoConfig

    from verl.model.flops import group_flops
    from verl.trainer.dry_run import read_data_shape
    from verl.trainer.main import build_datasets, start_ray
    from verl.trainer.model_checks import measure_checked_model
    from verl.trainer.placement import find_place, place_ranks
    from verl.trainer.plan import make_plan, measure_gpu, probe_passes

    setting = prepare(arguments)
    config, device, pad = setting.config, setting.device, setting.processor.tokenizer.pad_token_id
    train_set, _ = build_datasets(config, setting.processor)
    gpu = measure_gpu(config, device)
    plan = make_plan(config, measure_checked_model(config), read_data_shape(train_set), gpu, device == "cuda")
    config = plan.config
    start_ray(config, device)
    try:
        actor = place_ranks(config, device, 1, find_place(config, device))
        actor.load(*actor.run_on(0, "open_store"))
        print("\n".join([*plan.lines, *probe_passes(plan, actor, train_set, pad)]), flush=True)
        num_groups = min(arguments.ratio_groups * config.num_ranks, config.data.rollout_batch_size)
        groups = random_groups(config, train_set, num_groups, pad)
        for shared in (True, False):
            time_passes(actor, groups[: min(WARM_GROUPS * config.num_ranks, num_groups)], shared)
        ratio = print_ratio(actor, groups)
    finally:
        ray.shutdown()
    name = f"{config.num_ranks} x {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}"
    model, lengths = (
        AutoConfig.from_pretrained(config.worker.actor.model.model_path),
        (setting.prompt_tokens, config.data.max_response_length, config.worker.rollout.n),
    )
    num_images, patches = setting.pictures
    forward = group_flops(model, patches, *lengths, num_images=num_images).total * num_groups / config.num_ranks
    print(f"\n{name}: {num_groups} groups of {lengths[2]} responses of {lengths[1]} tokens to {lengths[0]}")
    print(f"{'pass':10s}" + "".join(f"{title:>15}" for title in ("shared, s", "repeated, s", "times less", "mfu")))
    for key, passes in {"old": 1, "ref": 1, "update": 3, "all": 5}.items():
        taken = [ratio[kind].get(key) or sum(ratio[kind].values()) for kind in ("shared", "repeated")]
        cells = *(f"{seconds:.2f}" for seconds in taken), f"{taken[1] / taken[0]:.2f}"
        share = passes * forward / taken[0] / ROOFLINE_FLOPS
        print(f"{key:10s}" + "".join(f"{cell:>15}" for cell in (*cells, f"{share:.3f}")), flush=True)
    if arguments.dump:
        Path(arguments.dump).write_text(json.dumps({"device": name, "lengths": lengths} | ratio, indent=1))
