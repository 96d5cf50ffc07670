"""TRL beside this project, without TRL: its settings for a load, the table, and errors of the command line."""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import bench_peers
import pytest

from verl.bench import peers
from verl.bench.peers import ROWS, Load, Phases, attention_of, hold_memory, join_runs, trl_settings
from verl.config.loading import load_config

ROOT = Path(__file__).parents[2]
TOY = str(ROOT / "configs" / "bench_toy_cpu.yaml")
FILES = ["data.train_files=owner/name", "data.val_files=owner/name"]
PAPER = Load(128, 32, 8, 1586, 609, 400, 8)


def config_of(name, *overrides):
    model = f"worker.actor.model.model_path={ROOT / 'configs' / 'toy_model'}"
    return load_config([f"config={ROOT / 'configs' / name}", *FILES, model, *overrides])


def gpu_settings(load, gpu_gib=139.0):
    return trl_settings(load, config_of("bench_3b_h100.yaml"), True, gpu_gib, [7, 9])


@pytest.mark.parametrize(
    ("load", "passes_of_update", "passes", "updates"),
    [
        (PAPER, 32, 128, 4),
        (Load(128, 32, 8, 1586, 609, 400, 2), 128, 512, 4),
        (Load(32, 32, 8, 1586, 609, 400, 8), 32, 32, 1),
        (Load(32, 32, 8, 1586, 609, 400, 256), 1, 1, 1),
    ],
)
def test_a_generation_has_as_many_updates_as_ours(load, passes_of_update, passes, updates):
    settings = gpu_settings(load)
    micro = settings["per_device_train_batch_size"]
    assert load.updates == updates
    assert settings["steps_per_generation"] == passes == load.passes
    assert settings["gradient_accumulation_steps"] == passes_of_update
    assert micro * settings["steps_per_generation"] == load.prompts * load.samples  # responses of a generation
    assert micro * settings["gradient_accumulation_steps"] == load.update * load.samples  # of an optimizer step


def test_the_engine_has_room_for_picture_tokens_that_are_expanded_twice():
    settings = gpu_settings(PAPER)
    assert settings["vllm_max_model_length"] >= 2194 + 400
    assert settings["vllm_gpu_memory_utilization"] == 0.385
    assert settings["generation_kwargs"]["logit_bias"] == {7: -100.0, 9: -100.0}
    assert not settings["vllm_enable_sleep_mode"] and gpu_settings(PAPER, 79.6)["vllm_enable_sleep_mode"]


def test_a_part_of_a_gpu_is_shared_as_a_gpu_of_that_size():
    config = config_of("bench_3b_h100.yaml", "trainer.memory_gb=79")
    settings = trl_settings(PAPER, config, True, 139.5, [])
    assert settings["vllm_gpu_memory_utilization"] * 139.5 == pytest.approx(0.385 * 79)
    assert settings["vllm_enable_sleep_mode"]
    assert trl_settings(PAPER, config, True, 48.0, [])["vllm_gpu_memory_utilization"] == 0.385  # a smaller GPU


def test_the_rest_of_a_gpu_is_held_by_a_process_that_ends(monkeypatch):
    program = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(peers, "HOLD", program)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with hold_memory(79.0):
        assert started[0].args[-1] == "79.0" and started[0].poll() is None
    assert started[0].poll() is not None
    with hold_memory(None):
        assert len(started) == 1


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (f"print({-9 * 2**30})", "--memory_gb 79: the GPU has 70.0 GiB free"),
        ("raise SystemExit(1)", "--memory_gb 79: the rest of the GPU's memory could not be held"),
    ],
)
def test_a_gpu_with_less_than_asked_for_is_refused(monkeypatch, program, said):
    monkeypatch.setattr(peers, "HOLD", program)
    with pytest.raises(SystemExit, match=said), hold_memory(79.0):
        pass


def test_training_is_configured_as_ours():
    config = config_of("bench_3b_h100.yaml", "algorithm.kl_coef=0.02", "worker.actor.optim.lr=3e-6")
    settings = trl_settings(PAPER, config, True, 139.0, [])
    assert settings["beta"] == 0.02 and settings["learning_rate"] == 3e-6 and settings["bf16"]
    without = trl_settings(PAPER, config_of("bench_3b_h100.yaml", "algorithm.use_kl_loss=false"), True, 139.0, [])
    assert without["beta"] == 0.0


def test_a_cpu_generates_without_vllm():
    settings = trl_settings(Load(8, 4, 8, 128, 16, 64, 8), config_of("bench_toy_cpu.yaml"), False, 0.0, [7])
    assert "use_vllm" not in settings and settings["use_cpu"] and not settings["bf16"]
    assert settings["generation_kwargs"] == {"min_new_tokens": 64, "suppress_tokens": [7]}
    assert attention_of("auto", False) == "sdpa" and attention_of("eager", True) == "eager"


def test_a_load_that_cannot_be_cut_is_refused():
    with pytest.raises(SystemExit, match="48 prompts are no multiple of an update's 32"):
        Load(48, 32, 8, 1586, 609, 400, 8)
    with pytest.raises(SystemExit, match="--micro 3 does not divide an update's 256 responses"):
        Load(128, 32, 8, 1586, 609, 400, 3)


def test_a_picture_keeps_one_of_its_tokens():
    assert join_runs([5, 5, 1, 5, 2, 2, 5, 5, 5], 5) == [5, 1, 5, 2, 2, 5]
    assert join_runs([1, 1], 5) == [1, 1] and join_runs([], 5) == []


def test_time_counts_for_the_innermost_phase_alone(monkeypatch, capsys):
    clock = iter([-90.0, 0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    monkeypatch.setattr("verl.bench.peers.time.perf_counter", lambda: next(clock))
    phases = Phases(lambda: None)
    phases.start()
    with phases("rollout"), phases("images"):
        pass
    phases.end_step()
    assert phases.steps == [
        dict.fromkeys(ROWS, 0.0) | {"update": 1.0 + 16.0, "rollout": 2.0 + 8.0, "images": 4.0, "whole step": 31.0}
    ]
    assert "rollout 10.00, images 4.00, update 17.00, whole step 31.00" in capsys.readouterr().out


def test_a_wrapped_method_is_a_phase_and_answers_as_before():
    class Owner:
        def double(self, number, *, plus=0):
            return 2 * number + plus

    owner, phases = Owner(), Phases(lambda: None)
    phases.wrap(owner, "double", "sleep")
    assert owner.double(2, plus=1) == 5 and phases.seconds["sleep"] > 0 and phases.names == ["start"]


def test_the_first_step_is_warm_up():
    phases = Phases(lambda: None)
    phases.steps = [dict.fromkeys(ROWS, seconds) for seconds in (100.0, 1.0, 2.0, 6.0)]
    assert set(phases.medians().values()) == {2.0}
    del phases.steps[1:]
    assert set(phases.medians().values()) == {100.0}


def test_a_stopped_step_says_how_far_it_is():
    phases = Phases(lambda: None)
    assert "step 1, in start for" in phases.describe(PAPER)
    phases.names.append("rollout")
    phases.seconds["images"], phases.counts["passes"] = 2.5, 3
    said = phases.describe(PAPER)
    assert "step 1, in rollout for" in said and "3 of 128 backward passes" in said and "images 2.50" in said


def ours(prompts=64):
    table = {name: {"seconds": 8.0} for name in ROWS} | {"sleep": {"seconds": 0.0}}
    rollout = {"rollout_batch_size": prompts, "max_prompt_length": 1586, "max_response_length": 400}
    worker = {"rollout": {"n": 8}, "actor": {"global_batch_size": 32}}
    return {"table": table, "config": {"data": rollout, "worker": worker}}


def test_seconds_of_a_prompt_are_compared():
    lines = bench_peers.compare(dict.fromkeys(ROWS, 16.0), 32, ours())
    rows = {line[:20].strip(): line[20:].split() for line in lines}
    assert rows["phase"] == ["TRL,", "s", "s/prompt", "ours,", "s", "s/prompt", "times"]
    assert rows["whole step"] == ["16.00", "0.5000", "8.00", "0.1250", "4.00"]
    assert rows["sleep"] == ["16.00", "0.5000", "0.00", "0.0000"]  # no ratio to nothing
    alone = bench_peers.compare(dict.fromkeys(ROWS, 16.0), 32, None)
    assert alone[-1].split() == ["whole", "step", "16.00", "0.5000"]


def test_loads_that_differ_are_named():
    assert bench_peers.differences(PAPER, None) == bench_peers.differences(PAPER, ours()) == []
    (warning,) = bench_peers.differences(Load(32, 32, 8, 1586, 609, 200, 8), ours())
    assert warning == "Warning: response tokens: 200 of TRL's, 400 of ours"
    (warning,) = bench_peers.differences(PAPER, ours(), 79.0)
    assert warning == "Warning: GiB of the GPU to be had: 79.0 of TRL's, None of ours"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("{", "Expecting"),
        ("[]", "list indices"),
        ('{"table": {"whole step": {"seconds": 1}}}', "it has no 'config'"),
        (json.dumps(ours() | {"table": {"whole step": {"seconds": 1}}}), "nothing was trained"),  # of a rollout
    ],
)
def test_what_is_not_of_a_step_is_refused(tmp_path, capsys, text, words):
    file = tmp_path / "ours.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as caught:
        bench_peers.parse(["--config", TOY, "--ours", str(file)])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "ours.json is not what a step wrote with --dump" in said and words in said


def test_what_a_step_wrote_is_taken(tmp_path):
    file = tmp_path / "ours.json"
    file.write_text(json.dumps(ours()))
    assert bench_peers.parse(["--config", TOY, "--ours", str(file)]).ours == ours()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "no_such.yaml"], "no_such.yaml: there is no such file"),
        (["--config", TOY, "--prompts", "0"], "0: give a positive whole number"),
        (["--config", TOY, "--limit", "soon"], "soon: give a positive number"),
        (["--config", TOY, "--trl", "beta"], "beta is not NAME=VALUE"),
        (["--config", TOY, "--dump", "no_folder/rows.json"], "there is no folder no_folder"),
        ([], "--config"),
    ],
)
def test_arguments_are_checked(capsys, words, said):
    with pytest.raises(SystemExit) as caught:
        bench_peers.parse(words)
    assert caught.value.code == 2 and said in capsys.readouterr().err


def test_settings_of_trl_are_values_or_words():
    words = ["--trl", "gradient_checkpointing=false", "--trl", "optim=adamw_torch", "--trl", "beta=0.5"]
    given = bench_peers.parse(["--config", TOY, *words, "data.max_response_length=8"])
    assert given.trl == {"gradient_checkpointing": False, "optim": "adamw_torch", "beta": 0.5}
    assert given.overrides == ["data.max_response_length=8"]


@pytest.mark.parametrize(("prompts", "update"), [(16, 16), (32, 32), (64, 32)])
def test_fewer_prompts_have_an_update_of_their_own(prompts, update):
    given = bench_peers.parse(["--config", str(ROOT / "configs" / "bench_3b_h100.yaml"), "--prompts", str(prompts)])
    config = config_of("bench_3b_h100.yaml", *bench_peers.scale_prompts(given))
    assert config.data.rollout_batch_size == prompts and config.worker.actor.global_batch_size == update


def test_trl_that_is_missing_or_another_is_named(monkeypatch, capsys):
    def missing(_):
        raise PackageNotFoundError

    monkeypatch.setattr(bench_peers, "version", missing)
    with pytest.raises(SystemExit, match=r"TRL 1\.16\.0 is not installed: python -m pip install .*trl==1\.16\.0"):
        bench_peers.main(["--config", TOY])
    monkeypatch.setattr(bench_peers, "version", lambda _: "1.16.3")
    bench_peers.check_trl()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(bench_peers, "version", lambda _: "1.17.0")
    bench_peers.check_trl()
    assert "Warning: this is written for TRL 1.16.0, not for 1.17.0" in capsys.readouterr().err


def test_a_limit_ends_the_process_with_where_it_is():
    program = "import bench_peers, time; bench_peers.watch(0.01, lambda: 'in rollout'); time.sleep(60)"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT / "scripts", capture_output=True, text=True)
    assert ended.returncode == bench_peers.STOPPED and ended.stdout == "stopped after 0.01 s: in rollout\n"
