"""Whole runs of what the quickstart does not use: other families, adapters, filtering; real Ray, FSDP2 and vLLM."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch

from tests.support.tiny_model_folder import save_tiny_model
from tests.support.training import ROOT, finish, learned, make_data, metrics, start
from tests.support.videos import write_video

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]

REWARD = """
def main(items):
    return [{"overall": sum(item["response"].encode()) % 10 / 10} for item in items]
"""
TINY = [
    "data.max_prompt_length=2048",
    "data.max_response_length=16",
    "worker.rollout.max_num_batched_tokens=4096",
    "worker.actor.micro_batch_size_per_device_for_update=4",
    "worker.actor.optim.lr=1e-3",
    "trainer.max_steps=2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


def merge(run, step: int):
    """The folder of the merged model."""
    actor = run / f"global_step_{step}" / "actor"
    subprocess.run([sys.executable, "scripts/model_merger.py", "--local_dir", str(actor)], cwd=ROOT, check=True)
    return actor / "huggingface"


LINEAR = ["worker.rollout.dtype=bf16", "worker.rollout.enable_chunked_prefill=true"]
FAMILIES = ["qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen2", "qwen3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_saves_and_merges(data, tmp_path, family):
    """Engine and ranks both in float32, but for linear attention: a CPU's engine computes it in bf16."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    (tmp_path / "reward.py").write_text(REWARD)
    folder, run = save_tiny_model(tmp_path / "model", family=family), tmp_path / "run"
    chosen = [f"worker.actor.model.model_path={folder}", f"worker.reward.reward_function={tmp_path}/reward.py"]
    is_text, is_linear = family in ("qwen2", "qwen3"), family.startswith("qwen3_5")
    chosen += LINEAR if is_linear else []
    if is_text:  # limit_images is nothing for an engine that sees none
        chosen += ["data.text_only=true", "worker.rollout.limit_images=1"]
        rows = [{"problem": f"{i} + {i}?", "answer_option_text": str(2 * i)} for i in range(16)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        chosen += [f"data.train_files={tmp_path}/rows.jsonl", f"data.val_files={tmp_path}/rows.jsonl"]
    output = finish(start(data, run, *TINY, *chosen, "worker.actor.tis_imp_ratio_cap=2"), run)
    rows = metrics(run)
    assert sorted(rows) == [1, 2], output[-3000:]
    limit = 1e-3 if is_linear else 1e-5
    assert all(row["actor/grad_norm"] > 0 and row["actor/rollout_prob_gap"] < limit for row in rows.values())
    assert rows[1]["actor/tis_weight"] == pytest.approx(1, abs=limit)
    loader = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    merged, before = (loader.from_pretrained(path, dtype=torch.float32) for path in (merge(run, 2), folder))
    pairs = list(zip(merged.parameters(), before.parameters(), strict=True))
    assert any(not torch.equal(new, old) for new, old in pairs) and all(new.isfinite().all() for new, _ in pairs)


def test_a_run_over_video_files_trains_and_records_frames(tmp_path):
    rows = []
    for seed in range(8):
        video = write_video(tmp_path / f"{seed}.mp4", 12, seed=seed)
        rows.append({"problem": "<video>What moves?", "answer_option_text": "a", "videos": [str(video)]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text(REWARD)
    folder, run = save_tiny_model(tmp_path / "model", family="qwen2_5_vl"), tmp_path / "run"
    chosen = [f"worker.actor.model.model_path={folder}", f"worker.reward.reward_function={tmp_path}/reward.py"]
    chosen += [f"data.{split}_files={tmp_path}/rows.jsonl" for split in ("train", "val")]
    finish(start(tmp_path, run, *TINY, *chosen, "trainer.max_steps=1", "worker.actor.tis_imp_ratio_cap=2"), run)
    row = metrics(run)[1]
    assert row["actor/grad_norm"] > 0 and row["actor/rollout_prob_gap"] < 1e-5
    recorded = pq.read_table(run / "rollouts" / "train_step_000001.parquet").to_pylist()[0]
    images = run / "rollouts" / "images"
    assert len(recorded["images"]) == 4  # the fewest that are sampled of a file
    assert all((images / name[:2] / name).is_file() for name in recorded["images"])


def test_filtering_weights_and_a_greedy_baseline(data, tmp_path):
    """remax over groups that online filtering kept, with importance weights: resumed, it repeats the unbroken run."""
    chosen = ["algorithm.adv_estimator=remax", "algorithm.online_filtering=true", "worker.actor.tis_imp_ratio_cap=2"]
    chosen += ["data.mini_rollout_batch_size=6", "algorithm.filter_low=0.2", "algorithm.filter_high=0.95"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    finish(start(data, whole, *chosen, "trainer.max_steps=2"), whole)
    finish(start(data, again, *chosen, "trainer.max_steps=1"), again)
    finish(start(data, again, *chosen, "trainer.max_steps=2"), again)
    rows = metrics(whole)
    for row in rows.values():
        assert 0.2 < row["reward/overall"] < 0.95 and row["online_filtering/attempts"] >= 2
        assert row["actor/rollout_prob_gap"] < 1e-3 and abs(row["actor/tis_weight"] - 1) < 0.01
        assert row["critic/advantages/max"] > 0 > row["critic/advantages/min"]
    repeated, expected = learned(metrics(again)[2]), learned(rows[2])
    assert repeated == expected


def test_adapters_train_save_and_merge(data, tmp_path):
    from transformers import AutoModelForImageTextToText

    run = tmp_path / "run"
    chosen = ["worker.actor.model.lora.rank=8", "worker.actor.model.lora.exclude_modules=.*visual.*"]
    chosen += ["worker.actor.optim.lr=1e-3", "worker.actor.tis_imp_ratio_cap=2"]
    finish(start(data, run, *chosen, "trainer.max_steps=1"), run)
    finish(start(data, run, *chosen, "trainer.max_steps=3"), run)
    rows = metrics(run)
    # The engine samples from the merged policy: it agrees with the trained one also after two updates.
    assert sorted(rows) == [1, 2, 3] and all(row["actor/rollout_prob_gap"] < 1e-3 for row in rows.values())
    assert rows[3]["actor/kl_loss"] > 0
    folder = merge(run, 3)
    merged, base = (
        AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in (folder, ROOT / "configs" / "toy_model")
    )
    changed = {name for name, value in merged.items() if not torch.equal(value, base[name])}
    assert changed and all("language_model" in name and name.endswith("proj.weight") for name in changed)
    assert (folder.parent / "lora_adapter" / "adapter_model.safetensors").is_file()
