"""Every recipe starts one command whose arguments are understood, with the numbers of the paper."""

import os
import subprocess
from pathlib import Path

import pytest

from spatialthinker.rewards import REWARDS
from spatialthinker.schema import parquet_path, write_parquet
from spatialthinker.synthetic import generate
from tests.support.bare_checkout import bare_checkout
from verl.config.loading import load_config
from verl.config.records import Config
from verl.trainer import main as program

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path for path in ROOT.glob("scripts/*.sh") if path.name.endswith(("grpo.sh", "sft.sh")))
RECIPES += sorted(ROOT.glob("scripts/spatialthinker_3*b_[!g]*.sh"))

GRPO_RECIPES = [path for path in RECIPES if "sft" not in path.name]


def arguments_of(script: Path, tmp_path: Path, *given: str) -> list[str]:
    """Arguments that the recipe calls python3 with."""
    stand_in = tmp_path / "python3"
    stand_in.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" >"$CALLED_WITH"\n')
    stand_in.chmod(0o755)
    called = tmp_path / "arguments"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLED_WITH": str(called)}
    subprocess.run(["bash", str(script), *given], check=True, env=environment, cwd=tmp_path)
    return called.read_text().splitlines()


def config_of(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *given: str) -> Config:
    arguments = arguments_of(ROOT / "scripts" / name, tmp_path, *given)
    assert arguments[:2] == ["-m", "verl.trainer.main"]
    monkeypatch.chdir(bare_checkout(tmp_path))
    return load_config(arguments[2:], tuple(REWARDS))


@pytest.mark.parametrize("script", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_strict_one_command_and_passes_its_arguments_on(script, tmp_path):
    lines = script.read_text().splitlines()
    assert "set -euo pipefail" in lines and os.access(script, os.X_OK)
    assert lines[-1].endswith('"$@"') and sum(line.startswith("exec ") for line in lines) == 1
    assert arguments_of(script, tmp_path, "a b", "c=d")[-2:] == ["a b", "c=d"]


@pytest.mark.parametrize("script", GRPO_RECIPES, ids=lambda path: path.name)
def test_a_recipe_takes_its_numbers_from_the_file_of_its_name(script, tmp_path):
    assert arguments_of(script, tmp_path)[2:] == [
        f"config=configs/{script.stem.removesuffix('_grpo').replace('30b_lora', '30b')}.yaml"
    ]


@pytest.mark.parametrize("script", GRPO_RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_the_papers_run_except_for_what_its_name_says(script, tmp_path, monkeypatch):
    config = config_of(script.name, tmp_path, monkeypatch, "trainer.max_steps=75")
    assert (config.data.rollout_batch_size, config.worker.rollout.n, config.num_ranks) == (512, 8, 4)
    assert (config.data.max_prompt_length, config.data.max_response_length) == (6144, 2048)
    actor = config.worker.actor
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.clip_ratio_dual) == (0.2, 0.3, 3.0)
    assert actor.fsdp.torch_dtype == "bf16" and actor.optim.strategy == "adamw_bf16"
    sources = config.data.train_files
    assert (sources if isinstance(sources, str) else sources[0].path) == "hunarbatra/STVQA-7K@train"
    assert config.trainer.experiment_name == script.stem or script.stem.startswith("spatialthinker_3b_")


def test_what_the_recipes_change(tmp_path, monkeypatch):
    def load(name: str) -> Config:
        return config_of(name, tmp_path, monkeypatch)

    assert load("spatialthinker_3b_grpo.sh") == load_config([])
    assert load("spatialthinker_7b_grpo.sh").worker.actor.model.model_path == "Qwen/Qwen2.5-VL-7B-Instruct"
    for size in ("3b", "7b"):
        vanilla = load(f"qwen_2_5_{size}_stvqa_vanilla_grpo.sh")
        assert size.upper() in vanilla.worker.actor.model.model_path
        assert vanilla.worker.reward.score_function == "r1v"
        assert vanilla.data.prompt_key == "question_with_options"
        assert vanilla.data.answer_key == "answer_option_text_only"
    assert load("spatialthinker_3b_no_kl.sh").algorithm.disable_kl
    assert load("spatialthinker_3b_chi2.sh").algorithm.kl_penalty == "chi2"
    weights = load("spatialthinker_3b_count_weights.sh").worker.reward.reward_function_kwargs
    assert weights == {"object_count_weight": 0.5, "relation_count_weight": 0.5}
    largest = load("spatialthinker_30b_lora.sh").worker.actor
    assert (largest.model.lora.rank, largest.routing_replay) == (64, True)
    assert "Qwen3-VL-30B-A3B" in largest.model.model_path
    mixed = load("spatialthinker_3b_mixed.sh").data.train_files
    assert [source.weight for source in mixed] == [0.5, 0.125, 0.125, 0.25] and mixed[-1].reward == "column"
    hybrid = load("qwen3_5_4b_grpo.sh").worker
    assert "Qwen3.5-4B" in hybrid.actor.model.model_path and hybrid.rollout.enable_chunked_prefill
    assert "Qwen3-VL-8B" in load("qwen3_vl_8b_grpo.sh").worker.actor.model.model_path


@pytest.mark.nightly
@pytest.mark.parametrize("script", GRPO_RECIPES, ids=lambda path: path.name)
def test_a_recipe_shows_what_it_would_do(script, tmp_path, monkeypatch, capsys):
    """On the toy model and drawn rows in the public data set's columns, since neither may be fetched here."""
    for split, count in (("train", 512), ("val", 4)):
        write_parquet([row for _, row in generate(count, 3, split)], parquet_path(tmp_path / "data", split))
    given = [f"data.{split}_files={tmp_path}/data@{split}" for split in ("train", "val")]
    given += [f"worker.actor.model.model_path={ROOT / 'configs' / 'toy_model'}", "trainer.device=cpu"]
    given += ["worker.actor.model.override_config={text_config: {max_position_embeddings: 8192}}"]
    given += ["trainer.dry_run=true", f"trainer.save_checkpoint_path={tmp_path}/run", "worker.reward.num_processes=1"]
    arguments = arguments_of(script, tmp_path, *given)
    monkeypatch.chdir(ROOT)
    assert program.main(arguments[2:]) == 0
    printed = capsys.readouterr().out
    assert "512 prompts x 8 responses = 4096 responses a step" in printed and "Memory, estimated" in printed
    assert printed.count("Reward of the ground truth: overall 1.000") == 3
