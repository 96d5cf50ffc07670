"""Calls of a step to the workers, KL in the reward, and the guards that end a run."""

import dataclasses
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl.config.records import Config
from verl.protocol import DataProto
from verl.protocol.row_values import as_objects
from verl.trainer.guards import DivergenceError, MemoryLimitError, check_memory
from verl.trainer.ray_trainer import GRPOTrainer

# Two prompts with two responses of 1 and 2 tokens; the policy's log-probs lie 0.5 above the reference's.
MASK = torch.tensor([[[1, 0], [1, 1]]] * 2)
SCORES = torch.tensor([[1.0, 0.0], [0.5, 0.5]])


class Workers:
    """Training ranks that answer with known values and remember what they were asked."""

    def __init__(self, **metrics: float):
        self.asked: list[str] = []
        self.updates: dict[str, DataProto] = {}
        self.notes: dict[str, dict[str, Any]] = {}
        self.metrics = {"actor/kl_loss": 0.05} | metrics

    def __len__(self) -> int:
        return 1

    def __getattr__(self, method: str) -> Any:
        def call(data: DataProto) -> Any:
            if method in ("load_groups", "send_weights"):
                return None
            self.asked.append(method)
            self.notes[method] = dict(data.meta_info)
            if method.startswith("update_"):
                self.updates[method] = data
                return [{name: (value, 1.0) for name, value in self.metrics.items()}]
            key, value = {
                "compute_log_probs": ("old_log_probs", -1.0),
                "compute_ref_log_probs": ("ref_log_probs", -1.5),
                "compute_full_kl": ("kl", 0.25),
                "compute_values": ("values", 0.1),
            }[method]
            return DataProto.from_dict({key: torch.full(MASK.shape, value)})

        return call


def make_trainer(
    workers: Workers, algorithm: dict[str, Any], batch_size: int = 2, num_epochs: int = 1, **trainer: Any
) -> GRPOTrainer:
    config = Config()
    actor = dataclasses.replace(config.worker.actor, global_batch_size=2, ppo_epochs=num_epochs)
    rollout = dataclasses.replace(config.worker.rollout, n=2)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, rollout_batch_size=batch_size),
        algorithm=dataclasses.replace(config.algorithm, **algorithm),
        worker=dataclasses.replace(config.worker, actor=actor, rollout=rollout),
        trainer=dataclasses.replace(config.trainer, **trainer),
    )
    nothing: Any = None
    group: Any = workers
    engines: Any = SleepingEngines()
    rows: Any = range(8)
    loop = GRPOTrainer(config, group, engines, nothing, rows, nothing, 0, nothing)
    loop.step = 1
    return loop


def run(loop: GRPOTrainer) -> tuple[DataProto, dict[str, float]]:
    """One step on two prompts whose responses and scores are known."""
    prompt_mask = torch.ones(2, 1, dtype=torch.long)
    groups = DataProto.from_dict({"response_mask": MASK, "prompt_mask": prompt_mask})
    rollout: Any = SimpleNamespace(groups=groups, metrics={}, scores=lambda: {"overall": SCORES})
    loop.batches.make = lambda generate: rollout
    loop.batches.upcoming = lambda: DataProto.from_dict(
        non_tensors={"raw_prompt_ids": as_objects([[7], [8], [9]]), "images": as_objects([[], [], []])}
    )
    return groups, loop.train_step()


class SleepingEngines:
    """Engines that remember which prompts they were to render ahead, and when someone waited for it."""

    actors: list[Any] = []

    def __init__(self):
        self.events: list[Any] = []

    def __len__(self) -> int:
        return 2

    def start(self, method: str, prompts: DataProto) -> Any:
        self.events.append((method, prompts.non_tensor_batch["raw_prompt_ids"].tolist()))
        return lambda: self.events.append("waited")

    def wake_up(self, tags: list[str]) -> None:
        self.events.append(tags)

    def sleep(self) -> None:
        self.events.append("asleep")


IN_REWARD = {"use_kl_loss": False, "kl_penalty": "kl", "kl_coef": 0.1, "adv_estimator": "dr_grpo"}


@pytest.mark.parametrize(
    ("algorithm", "batch_size", "passes"),
    [
        ({}, 2, ["compute_ref_log_probs", "update_actor"]),
        ({}, 4, ["compute_log_probs", "compute_ref_log_probs", "update_actor"]),
        ({"disable_kl": True, "use_kl_loss": False}, 2, ["update_actor"]),
        ({"use_kl_loss": False}, 2, ["compute_log_probs", "compute_ref_log_probs", "update_actor"]),
        ({"kl_penalty": "full"}, 2, ["update_actor"]),
        ({"kl_penalty": "full", "use_kl_loss": False}, 2, ["compute_full_kl", "update_actor"]),
        (
            {"adv_estimator": "gae"},
            2,
            ["compute_ref_log_probs", "compute_values", "update_critic", "update_actor"],
        ),
    ],
)
def test_only_the_passes_that_a_choice_needs_are_run(algorithm, batch_size, passes):
    workers = Workers()
    run(make_trainer(workers, algorithm, batch_size))
    assert workers.asked == passes


@pytest.mark.parametrize(
    ("algorithm", "num_epochs", "is_partial"),
    [
        ({}, 1, True),
        ({}, 2, False),  # the second time the first update's policy is gone
        ({"use_kl_loss": False}, 1, False),  # the reward reads all
        ({"use_kl_loss": False, "kl_penalty": "full"}, 1, True),
        ({"disable_kl": True, "use_kl_loss": False}, 1, True),
    ],
)
def test_the_first_updates_own_log_probs_are_left_out_where_nothing_else_reads_them(algorithm, num_epochs, is_partial):
    workers = Workers()
    run(make_trainer(workers, algorithm, batch_size=4, num_epochs=num_epochs))
    assert workers.notes["compute_log_probs"]["from_second_update"] is is_partial


def test_a_divergence_in_the_reward_by_hand():
    workers = Workers()
    loop = make_trainer(workers, IN_REWARD)
    groups, metrics = run(loop)
    # 0.5 a token: off 1 and 0 go 0.05 and 0.1, off 0.5 and 0.5 the same.
    torch.testing.assert_close(groups.batch["rewards"], torch.tensor([[0.95, -0.1], [0.45, 0.4]]))
    torch.testing.assert_close(groups.batch["advantages"], torch.tensor([[0.525, -0.525], [0.025, -0.025]]))
    assert torch.equal(groups.batch["scores"], SCORES)
    assert metrics["actor/kl_penalty"] == pytest.approx(0.5) and metrics["actor/kl_coef"] == 0.1
    sent = workers.updates["update_actor"]
    assert sent.meta_info["kl_coef"] == 0.0 and "ref_log_probs" not in sent.batch.keys()
    assert loop.kl.coef == 0.1  # fixed


def test_the_full_divergence_in_the_reward_by_hand():
    groups, metrics = run(make_trainer(Workers(), IN_REWARD | {"kl_penalty": "full"}))
    torch.testing.assert_close(groups.batch["rewards"], torch.tensor([[0.975, -0.05], [0.475, 0.45]]))
    assert metrics["actor/kl_penalty"] == pytest.approx(0.25)


def test_an_adaptive_weight_follows_the_divergence_in_reward_and_loss():
    adaptive = {"kl_type": "adaptive", "kl_target": 0.1, "kl_horizon": 40.0, "kl_coef": 0.1}
    loop = make_trainer(Workers(), IN_REWARD | adaptive)
    _, metrics = run(loop)  # 0.5 is far above 0.1: up by 0.2 x 4 responses / 40
    assert metrics["actor/kl_coef"] == 0.1 and loop.kl.coef == pytest.approx(0.1 * 1.02)
    workers = Workers()
    loop = make_trainer(workers, {"use_kl_loss": True} | adaptive)
    _, metrics = run(loop)  # 0.05 is half of it: down by as much
    assert metrics["actor/kl_coef"] == workers.updates["update_actor"].meta_info["kl_coef"] == 0.1
    assert loop.kl.coef == pytest.approx(0.1 * 0.98)


def test_the_critic_warms_up_alone():
    workers = Workers()
    loop = make_trainer(workers, {"adv_estimator": "gae"}, critic_warmup=3)
    for step in (1, 2, 3):
        loop.step = step
        run(loop)
    assert [name for name in workers.asked if name.startswith("update_")] == ["update_critic"] * 3 + ["update_actor"]
    sent = workers.updates["update_critic"]
    assert sorted(sent.batch.keys()) == ["returns", "values"] and sent.meta_info["step"] == 3


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus"])
def test_steps_before_critic_warmup_train_nothing_without_a_critic(estimator):
    workers = Workers()
    loop = make_trainer(workers, {"adv_estimator": estimator}, critic_warmup=2)
    _, metrics = run(loop)
    check_memory(metrics, 0.9, 1)
    assert not workers.updates and loop.trained.step == 1
    loop.step = 2
    run(loop)
    assert list(workers.updates) == ["update_actor"]


@pytest.mark.parametrize("algorithm", [{"kl_coef": 0.0}, {"kl_coef": 0.0, "kl_type": "adaptive"}, {"kl_coef": 0.1}])
def test_the_full_divergence_may_weigh_nothing(algorithm):
    workers = Workers()
    if not algorithm["kl_coef"]:
        del workers.metrics["actor/kl_loss"]  # the ranks do not measure it then
    loop = make_trainer(workers, {"kl_penalty": "full"} | algorithm)
    _, metrics = run(loop)
    assert metrics["actor/kl_coef"] == loop.kl.coef == algorithm["kl_coef"]
    assert workers.notes["update_actor"]["kl_coef"] == algorithm["kl_coef"]


def test_updates_that_were_left_out_are_said_and_end_the_run_in_the_end(capsys):
    skipped = {"actor/skipped_steps": 2.0, "actor/skipped_in_a_row": 3.0}
    run(make_trainer(Workers(**skipped), {}, max_skipped_updates=4))
    assert "2 optimizer steps of the actor were left out" in capsys.readouterr().out
    run(make_trainer(Workers(**skipped), {}, max_skipped_updates=-1))
    with pytest.raises(DivergenceError) as caught:
        run(make_trainer(Workers(**skipped), {}, max_skipped_updates=3))
    message = str(caught.value)
    assert "3 in a row" in message and "trainer.max_skipped_updates=3" in message and "optim.lr" in message
    run(make_trainer(Workers(**{"actor/skipped_steps": 0.0, "actor/skipped_in_a_row": 0.0}), {}))
    assert "left out" not in capsys.readouterr().out.rpartition("3 in a row")[2]


def test_a_machine_that_is_nearly_full_ends_the_run_with_what_to_lower():
    filled = {"perf/max_host_memory_share": 0.9, "perf/max_rank_memory_gb": 3.0, "perf/driver_memory_gb": 1.5}
    check_memory(filled, 0.9, 1)
    with pytest.raises(MemoryLimitError) as caught:
        check_memory(filled | {"perf/max_host_memory_share": 0.953}, 0.9, 1)
    message = str(caught.value)
    for words in ("95% of a machine's memory", "trainer.max_host_memory_share=0.9", "3.0 GiB", "data.max_pixels"):
        assert words in message


def test_engines_render_the_next_prompts_while_the_ranks_train():
    loop = make_trainer(Workers(), {}, max_steps=2)
    engines: Any = loop.engines.group
    run(loop)
    first = [["weights"], ["kv_cache"], "asleep", ("render_ahead", [[7], [8], [9], [7]])]  # as many for each engine
    assert engines.events == first
    loop.step = 2
    run(loop)
    assert engines.events == [*first, "waited", ["weights"], ["kv_cache"], "asleep"]  # nothing after the last step


def test_a_step_leaves_the_record_that_a_resumed_run_starts_from():
    loop = make_trainer(Workers(), {})
    run(loop)
    assert (loop.trained.step, loop.trained.kl_coef) == (1, loop.kl.coef)
    assert loop.trained.to_json() == {"kl_coef": 0.01, "num_drawn": 0, "global_step": 1}


def test_fit_and_a_step_fit_on_one_screen():
    source = inspect.getsource(GRPOTrainer.fit) + inspect.getsource(GRPOTrainer.train_step)
    assert source.count("\n") <= 60
