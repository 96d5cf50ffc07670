"""Routing replay's share is that of the steps with it, against the steps without it beside them."""

from types import SimpleNamespace

import pytest

from verl.bench.measure import main
from verl.bench.replay import check_turns, compare_turns, print_turns, take_turns
from verl.config.loading import load_config

FILES = ["data.train_files=owner/name", "data.val_files=owner/name"]


def test_every_second_step_goes_without_from_the_engine_on():
    config = load_config([*FILES, "worker.actor.routing_replay=true", "worker.rollout.seed=7"])
    seen = []
    trainer = SimpleNamespace(engines=SimpleNamespace(settings=config.worker), step=0)
    trainer.train_step = lambda: seen.append(trainer.engines.settings) or {"loss": 1.0}
    take_turns(trainer)
    for trainer.step in (1, 2, 3, 4):
        assert trainer.train_step() == {"loss": 1.0}
    assert [settings.actor.routing_replay for settings in seen] == [True, False, True, False]
    assert {settings.rollout.seed for settings in seen} == {7} and seen[0] is config.worker


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
    print_turns(table)
    assert capsys.readouterr().out.splitlines()[-1].split() == ["whole", "step", "33.00", "32.00", "3.12%"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.max_steps=9"], "set worker.actor.routing_replay=true"),
        (["worker.actor.routing_replay=true", "trainer.max_steps=4"], "trainer.max_steps=4 must be 5 or more"),
    ],
)
def test_a_run_with_nothing_to_compare_is_refused(overrides, words):
    with pytest.raises(SystemExit, match=words):
        check_turns(load_config([*FILES, *overrides]))


def test_turns_are_of_steps(capsys):
    with pytest.raises(SystemExit):
        main(["passes", "--config", "configs/bench_toy_cpu.yaml", "--replay_in_turns"])
    assert "--replay_in_turns is of steps" in capsys.readouterr().err
