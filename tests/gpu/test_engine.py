"""On a GPU: the engine and the trainer that share it see the same policy, and give its memory back to each other."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.e2e.training import finish, make_data, metrics, start
from verl.config_loading import load_config
from verl.dataset import RLHFDataset, collate_prompts
from verl.processor import load_run_processor

pytestmark = pytest.mark.gpu
ON_GPU = ["trainer.device=cuda", "trainer.n_gpus_per_node=1", "worker.rollout.dtype=bf16"]
ON_GPU += ["worker.rollout.gpu_memory_utilization=0.3", "worker.reward.score_function=r1v_scene"]
NUM_CYCLES = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "rows"
    make_data(folder, num_train=512, num_val=64)
    return folder


@pytest.fixture(scope="module")
def parts(data):
    import ray

    from verl.trainer.main import build_workers, start_ray

    bf16 = ["worker.actor.fsdp.torch_dtype=bf16", "worker.actor.fsdp.mp_param_dtype=bf16"]
    config = load_config(
        ["config=configs/toy_cpu.yaml", f"data.train_files={data}@train", f"data.val_files={data}@val"] + ON_GPU + bf16
    )
    processor = load_run_processor(config)
    start_ray(config, "cuda")
    actor, rollout = build_workers(config, "cuda", processor, 10)
    rows = RLHFDataset(f"{data}@val", processor, max_prompt_length=config.data.max_prompt_length)
    yield actor, rollout, collate_prompts(list(rows), processor.tokenizer.pad_token_id)
    ray.shutdown()


def wake(actor, rollout):
    rollout.wake_up(["weights"])
    actor.send_weights(rollout.actors)
    rollout.wake_up(["kv_cache"])


def sample(rollout, prompts):
    request = prompts.select([], ["raw_prompt_ids", "images"])
    request.meta_info = {"sampling": {"n": 4, "temperature": 1.0}, "seed": 5, "log_probs": True}
    return prompts.select().union(rollout.generate(request))


def mean_gap(actor, groups) -> float:
    """Mean distance of the engine's log-probs from the actor's."""
    actor.load_groups(groups.select(None, ["images"]))
    own = actor.compute_log_probs(groups.select(["response_mask"], [])).batch["old_log_probs"]
    mask = groups.batch["response_mask"].bool()
    return float((own - groups.batch["rollout_log_probs"]).abs()[mask].mean())


def update(actor, groups, step):
    carrier = groups.select(["response_mask"], [])
    carrier.batch["advantages"] = torch.randn(carrier.batch["response_mask"].shape[:2])
    carrier.meta_info |= {"step": step, "kl_coef": 0.0}
    actor.update_actor(carrier)


def used_gib() -> float:
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024


def test_log_probs_agree_after_every_sync_and_memory_does_not_grow(parts):
    actor, rollout, prompts = parts
    asleep, awake = [], []
    old_groups = None
    for cycle in range(NUM_CYCLES):
        wake(actor, rollout)
        groups = sample(rollout, prompts)
        awake.append(used_gib())
        rollout.sleep()
        gap = mean_gap(actor, groups)
        assert gap < 0.01, f"cycle {cycle}"
        if old_groups is not None and cycle == 1:
            assert mean_gap(actor, old_groups) > 2 * gap  # the update was large enough to be seen
            actor.load_groups(groups.select(None, ["images"]))
        for _ in range(3 if cycle == 0 else 1):
            update(actor, groups, step=cycle + 1)
        asleep.append(used_gib())
        old_groups = groups
    print("asleep", asleep, "awake", awake, file=sys.stderr)
    assert max(asleep[2:]) - min(asleep[2:]) < 0.3 and max(awake[2:]) - min(awake[2:]) < 0.3


def test_ten_steps_learn(data, tmp_path):
    run = tmp_path / "run"
    sizes = ["data.rollout_batch_size=128", "worker.rollout.n=8", "worker.actor.global_batch_size=32"]
    length = ["data.max_response_length=128", "trainer.max_steps=10", "trainer.save_freq=-1"]
    finish(start(data, run, *ON_GPU, *sizes, *length), run, timeout_s=400)
    rewards = [row["reward/overall"] for _, row in sorted(metrics(run).items())]
    print("rewards", rewards, file=sys.stderr)
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.03
