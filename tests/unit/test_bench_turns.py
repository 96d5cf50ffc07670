"""A choice's share is that of the steps with it, against the steps without it beside them."""

from types import SimpleNamespace

import numpy as np
import pytest

from verl.bench.inputs import lognormal
from verl.bench.measure import main
from verl.bench.turns import check_turns, compare_turns, limit_responses, print_turns, replay_in_turns
from verl.config.loading import load_config

FILES = ["data.train_files=owner/name", "data.val_files=owner/name"]


def test_every_second_step_goes_without_from_the_engine_on():
    config = load_config([*FILES, "worker.actor.routing_replay=true", "worker.rollout.seed=7"])
    seen = []
    trainer = SimpleNamespace(engines=SimpleNamespace(settings=config.worker), step=0)
    trainer.train_step = lambda: seen.append(trainer.engines.settings) or {"loss": 1.0}
    replay_in_turns(trainer)
    for trainer.step in (1, 2, 3, 4):
        assert trainer.train_step() == {"loss": 1.0}
    assert [settings.actor.routing_replay for settings in seen] == [True, False, True, False]
    assert {settings.rollout.seed for settings in seen} == {7} and seen[0] is config.worker


@pytest.mark.parametrize("in_turns", [False, True])
def test_drawn_lengths_and_lengths_of_their_mean_have_as_many_tokens(in_turns):
    seen = []
    engines = SimpleNamespace(generate=lambda prompts, *_: seen.append(prompts.non_tensor_batch["max_tokens"]))
    trainer = SimpleNamespace(engines=engines, config=load_config([*FILES, "data.max_response_length=900"]), step=0)
    limit_responses(trainer, lognormal("lognormal:200:0.5"), in_turns)
    for trainer.step in (1, 2, 3):
        prompts = Prompts()
        engines.generate(prompts, {"n": 8}, trainer.step)
    assert [len(np.unique(lengths)) > 1 for lengths in seen] == [True, not in_turns, True]
    assert all(lengths.shape == (64, 8) for lengths in seen)
    assert [lengths.mean() for lengths in seen] == pytest.approx([226] * 3, abs=1)  # 200 e^(0.5^2 / 2)


class Prompts:
    def __init__(self):
        self.non_tensor_batch = {}

    def __len__(self):
        return 64


def test_the_warm_up_is_left_out_and_other_phases_are_taken_off(capsys):
    def step(gen, ref, update, whole):
        timings = {"gen": gen, "weight_sync": 3.0, "sleep": 1.0, "ref": ref, "update_actor": update, "step": whole}
        return {f"timing_s/{name}": seconds for name, seconds in timings.items()}

    steps = [step(90.0, 90.0, 90.0, 300.0), step(10.0, 4.0, 12.0, 30.0), step(10.3, 4.0, 12.6, 30.9)]
    steps += [step(12.0, 4.2, 12.0, 34.0), step(12.1, 4.0, 12.6, 35.1)]
    table = compare_turns(steps)
    assert table["rollout"] == pytest.approx({"with": 7.2, "without": 7.0, "share": 0.2 / 32})
    assert table["reference"] == pytest.approx({"with": 4.0, "without": 4.1, "share": -0.1 / 32})
    assert table["update"] == pytest.approx({"with": 12.6, "without": 12.0, "share": 0.6 / 32})
    assert table["whole step"] == pytest.approx({"with": 33.0, "without": 32.0, "share": 1 / 32})
    print_turns("replay", table)
    assert capsys.readouterr().out.splitlines()[-1].split() == ["whole", "step", "33.00", "32.00", "3.12%"]


@pytest.mark.parametrize(
    ("choice", "overrides", "lengths", "words"),
    [
        ("replay", ["trainer.max_steps=9"], True, "set worker.actor.routing_replay=true"),
        ("replay", ["worker.actor.routing_replay=true", "trainer.max_steps=4"], None, "max_steps=4 must be 5 or more"),
        ("lengths", ["trainer.max_steps=9"], None, "name their distribution, --lengths"),
        ("lengths", ["trainer.max_steps=2"], True, "trainer.max_steps=2 must be 3 or more"),
    ],
)
def test_a_run_with_nothing_to_compare_is_refused(choice, overrides, lengths, words):
    with pytest.raises(SystemExit, match=words):
        check_turns(choice, load_config([*FILES, *overrides]), lengths)


@pytest.mark.parametrize(
    ("what", "choice", "words"),
    [
        ("passes", "replay", "--in_turns replay is of steps"),
        ("rollout", "replay", "--in_turns replay is of steps"),
        ("passes", "lengths", "--in_turns lengths is of steps and rollouts"),
    ],
)
def test_turns_are_of_steps_or_rollouts(capsys, what, choice, words):
    with pytest.raises(SystemExit):
        main([what, "--config", "configs/bench_toy_cpu.yaml", "--in_turns", choice])
    assert words in capsys.readouterr().err


def test_rollouts_alone_have_no_rows_of_passes():
    rollout = {"timing_s/gen": 3.0, "timing_s/weight_sync": 0.5, "timing_s/sleep": 0.5, "timing_s/step": 3.2}
    table = compare_turns([rollout, rollout, rollout | {"timing_s/gen": 4.0}])
    assert list(table) == ["rollout", "whole step"]
    assert table["rollout"] == pytest.approx({"with": 3.0, "without": 2.0, "share": 1 / 3})
    assert table["whole step"] == pytest.approx({"with": 4.0, "without": 3.0, "share": 1 / 3})
