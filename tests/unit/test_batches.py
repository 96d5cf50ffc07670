"""Groups of a step: order, filtering, surplus, baselines; engine and rewards have known values."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch

from verl.config.records import Config
from verl.data.dataset import DataError, Prompt
from verl.protocol import DataProto
from verl.reward import PendingRewards
from verl.trainer.batches import GREEDY, BatchMaker, join_groups

NUM_ROWS = 12


class Rows(list):
    """Prompts of which those numbered in `bad` cannot be read."""

    bad: tuple[int, ...] = ()

    def readable(self, indices, spares):
        unused = iter(spares)
        return [index if index not in self.bad else next(x for x in unused if x not in self.bad) for index in indices]


class KnownRewards:
    """The reward of a response is its first token / 10; `tens` is there only where a reward is 1 or more."""

    def submit(self, groups: DataProto, step: int = 0) -> PendingRewards:
        first = groups.batch["responses"][..., 0].float()
        scores = {"overall": first / 10}
        if (first >= 10).any():
            scores["tens"] = (first >= 10).float()
        pending = PendingRewards([], tuple(first.shape))
        pending.result = lambda since=None: scores
        pending.texts = self.decode(groups)
        return pending

    def decode(self, groups: DataProto) -> list[str]:
        return [f"text {token}" for token in groups.batch["responses"][..., 0].flatten().tolist()]


class Engine:
    """Answers row r with first tokens r - 1 and r + 1, greedily with r; remembers what it was asked."""

    def __init__(self):
        self.calls: list[tuple[list[int], dict[str, Any], int]] = []
        self.prompts: list[DataProto] = []

    def __call__(self, prompts: DataProto, sampling: dict[str, Any], seed: int) -> DataProto:
        rows = [int(uid) for uid in prompts.non_tensor_batch["uid"]]
        self.calls.append((rows, sampling, seed))
        self.prompts.append(prompts)
        shifts = [0] if sampling is GREEDY else [-1, 1]
        responses = torch.tensor([[[row + shift, 7] for shift in shifts] for row in rows])
        answers = DataProto.from_dict({"responses": responses, "response_mask": torch.ones_like(responses)})
        return prompts.select().union(answers)


def make_maker(**choices) -> tuple[BatchMaker, Engine]:
    config = Config()
    for section, values in choices.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
    rollout = dataclasses.replace(config.worker.rollout, n=2)
    actor = dataclasses.replace(config.worker.actor, global_batch_size=2)
    config = dataclasses.replace(config, worker=dataclasses.replace(config.worker, rollout=rollout, actor=actor))
    rows: Any = Rows(
        Prompt([1], torch.arange(1 + row % 3), torch.zeros(3, 1 + row % 3), [b"png"], "question", "answer", str(row))
        for row in range(NUM_ROWS)
    )
    reward: Any = KnownRewards()
    return BatchMaker(config, rows, reward, pad_token_id=0, num_ranks=1), Engine()


def rows_of(groups: DataProto) -> list[int]:
    return sorted(int(uid) for uid in groups.non_tensor_batch["uid"])


def test_mini_batches_make_the_same_step_as_one_call():
    data = {"rollout_batch_size": 6, "shuffle": False}
    whole, engine = make_maker(data=data)
    parts, small_engine = make_maker(data=data | {"mini_rollout_batch_size": 2})
    for _ in range(3):  # beyond the epoch's end
        one, many = whole.make(engine), parts.make(small_engine)
        assert torch.equal(one.groups.batch["responses"], many.groups.batch["responses"])
        assert torch.equal(one.groups.batch["prompt_ids"], many.groups.batch["prompt_ids"])
        scores = many.scores()
        assert torch.equal(one.scores()["overall"], scores["overall"])
        assert torch.equal(scores["overall"], many.groups.batch["responses"][..., 0] / 10)  # each with its own
    assert [seed for _, _, seed in small_engine.calls] == list(range(1, 10))
    assert [len(rows) for rows, _, _ in small_engine.calls] == [2] * 9


@pytest.mark.parametrize(("actor", "critic"), [(8, 8), (8, 4), (4, 8), (8, 12), (12, 8), (24, 4)])
def test_mini_batches_of_actor_and_critic_are_the_same_on_any_number_of_ranks(actor, critic):
    steps = []
    for num_ranks in (1, 2, 4):
        maker, engine = make_maker(
            data={"rollout_batch_size": 24, "mini_rollout_batch_size": 12}, algorithm={"adv_estimator": "gae"}
        )
        worker = maker.config.worker
        roles = (("actor", actor), ("critic", critic))
        sized = {role: dataclasses.replace(getattr(worker, role), global_batch_size=size) for role, size in roles}
        maker.config = dataclasses.replace(maker.config, worker=dataclasses.replace(worker, **sized))
        maker.num_ranks = num_ranks
        groups = maker.make(engine).groups
        shares = [[int(uid) for uid in part.non_tensor_batch["uid"]] for part in groups.chunk(num_ranks)]
        steps.append(
            [
                sorted(row for share in shares for row in share[start : start + size // num_ranks])
                for _, size in roles
                for start in range(0, 24 // num_ranks, size // num_ranks)
            ]
        )
    assert steps[0] == steps[1] == steps[2]


@pytest.mark.parametrize("algorithm", [{}, {"online_filtering": True, "filter_low": 0.25, "filter_high": 0.95}])
def test_prompts_drawn_ahead_are_those_that_the_step_begins_with(algorithm):
    data = {"rollout_batch_size": 4, "mini_rollout_batch_size": 2}
    plain, engine = make_maker(data=data, algorithm=algorithm)
    ahead, other_engine = make_maker(data=data, algorithm=algorithm)
    for _ in range(4):
        num_before = len(other_engine.prompts)
        upcoming = ahead.upcoming()
        assert ahead.upcoming() is upcoming
        one, two = plain.make(engine), ahead.make(other_engine)
        assert other_engine.prompts[num_before] is upcoming
        assert torch.equal(one.groups.batch["responses"], two.groups.batch["responses"])
    assert [call[0] for call in engine.calls] == [call[0] for call in other_engine.calls]


def test_a_bad_row_is_replaced_by_the_same_one_after_a_restart(tmp_path):
    data = {"rollout_batch_size": 4}
    (whole, engine), (clean, other) = make_maker(data=data), make_maker(data=data)
    whole.train_set.bad = bad = (0, 7)
    for _ in range(6):
        groups = whole.make(engine).groups
        rows = rows_of(groups)
        assert len(set(rows)) == 4 and not set(rows) & set(bad)
        assert sorted(groups.batch["row"].tolist()) == rows
        assert set(rows) >= set(rows_of(clean.make(other).groups)) - set(bad)
    resumed, engine_again = make_maker(data=data)
    resumed.train_set.bad = bad
    resumed.restore(tmp_path, 3)
    for _ in range(3):
        resumed.make(engine_again)
    assert engine.calls[3:] == engine_again.calls


def test_a_fault_of_the_next_step_waits_for_the_end_of_this_one():
    maker, engine = make_maker(data={"rollout_batch_size": 4, "shuffle": False})
    readable = maker.train_set.readable

    def fail_at_5(indices, spares):
        if 5 in indices:
            raise DataError("row 5: broken")
        return readable(indices, spares)

    maker.train_set.readable = fail_at_5
    maker.make(engine)
    assert maker.upcoming() is None
    with pytest.raises(DataError, match="row 5"):
        maker.make(engine)


class TestFiltering:
    # Rows in order; the mean of row r is r / 10. Kept: 0.25 < r / 10 < 0.9, rows 3 to 8.
    CHOICES = {
        "data": {"rollout_batch_size": 4, "mini_rollout_batch_size": 3, "shuffle": False},
        "algorithm": {"online_filtering": True, "filter_low": 0.25, "filter_high": 0.9},
    }

    def test_by_hand(self):
        maker, engine = make_maker(**self.CHOICES)
        first = maker.make(engine)  # 0 1 2 | 3 4 5 | 6 7 8
        assert rows_of(first.groups) == [3, 4, 5, 6] and len(engine.calls) == 3
        assert maker.position.surplus is not None and rows_of(maker.position.surplus) == [7, 8]
        assert first.metrics == pytest.approx(
            {
                "online_filtering/attempts": 3,
                "online_filtering/kept_share": 6 / 9,
                "online_filtering/surplus": 2,
                "online_filtering/mean_age": 0,
                "online_filtering/max_age": 0,
                "online_filtering/overall_of_all": 0.4,
            }
        )
        second = maker.make(engine)  # 9 10 11 | 0 1 2 | 3 4 5 of the next epoch; the surplus comes first
        assert rows_of(second.groups) == [3, 4, 7, 8] and len(engine.calls) == 6
        assert torch.equal(second.scores()["overall"], second.groups.batch["responses"][..., 0] / 10)
        assert second.metrics["online_filtering/mean_age"] == 0.5 and second.metrics["online_filtering/max_age"] == 1

    # Calls of 12 rows for steps of 2, 4 and 6; 10 rows are kept of each call, all but 0 and 11.
    @pytest.mark.parametrize(
        ("size", "attempts"), [(2, [1, 0, 0, 0, 0, 1]), (4, [1, 0, 1, 0, 0, 1]), (6, [1, 1, 0, 1, 0, 1])]
    )
    def test_a_surplus_that_fills_a_step_is_used_before_more_is_sampled(self, size, attempts):
        maker, engine = make_maker(
            data={"rollout_batch_size": size, "mini_rollout_batch_size": 12, "shuffle": False},
            algorithm={"online_filtering": True, "filter_low": 0.05, "filter_high": 1.05},
        )
        rows, made = [], []
        for _ in attempts:
            made.append(maker.make(engine))
            rows += rows_of(made[-1].groups)
            assert made[-1].metrics["online_filtering/max_age"] <= -(-12 // size)
        assert [rollout.metrics["online_filtering/attempts"] for rollout in made] == attempts
        assert len(engine.calls) == sum(attempts)
        assert max(Counter(rows).values()) <= sum(attempts)  # each group once
        assert ("online_filtering/kept_share" in made[1].metrics) == bool(attempts[1])

    def test_a_surplus_of_several_steps_does_not_grow(self):
        maker, engine = make_maker(
            data={"rollout_batch_size": 4, "mini_rollout_batch_size": 6, "shuffle": False},
            algorithm={"online_filtering": True, "filter_low": -1.0, "filter_high": 2.0},
        )
        surplus = [maker.make(engine).metrics["online_filtering/surplus"] for _ in range(12)]
        assert max(surplus) < 6 and surplus[:3] == [2, 4, 0]

    @pytest.mark.parametrize("num_before", [1, 2, 3, 4])
    def test_a_run_that_resumes_with_a_surplus_for_several_steps_has_the_same_steps(self, tmp_path, num_before):
        choices = {
            "data": {"rollout_batch_size": 2, "mini_rollout_batch_size": 6},
            "algorithm": {"online_filtering": True, "filter_low": 0.05, "filter_high": 1.05},
        }
        maker, engine = make_maker(**choices)
        for _ in range(num_before):
            maker.upcoming()
            maker.make(engine)
        maker.position.write_surplus(tmp_path)
        resumed, other = make_maker(**choices)
        resumed.restore(tmp_path, maker.position.num_drawn)
        num_calls = len(engine.calls)
        for _ in range(6):
            expected, actual = maker.make(engine), resumed.make(other)
            assert list(actual.groups.non_tensor_batch["uid"]) == list(expected.groups.non_tensor_batch["uid"])
            assert actual.metrics == expected.metrics
            for key in ("responses", "score/overall", "age"):
                assert torch.equal(actual.groups.batch[key], expected.groups.batch[key])
            ids = [rollout.groups.batch["prompt_ids"] for rollout in (expected, actual)]
            assert torch.equal(ids[0][:, -ids[1].shape[-1] :], ids[1])  # padding alone
        assert engine.calls[num_calls:] == other.calls

    def test_bounds_are_strict(self):
        choices = self.CHOICES | {"algorithm": {"online_filtering": True, "filter_low": 0.3, "filter_high": 0.8}}
        maker, engine = make_maker(**choices)
        assert rows_of(maker.make(engine).groups) == [4, 5, 6, 7]

    def test_a_run_that_resumes_has_the_same_steps(self, tmp_path):
        maker, engine = make_maker(**self.CHOICES)
        maker.make(engine)
        maker.position.write_surplus(tmp_path)
        resumed, other = make_maker(**self.CHOICES)
        resumed.restore(tmp_path, maker.position.num_drawn)
        for _ in range(3):
            expected, actual = maker.make(engine), resumed.make(other)
            assert rows_of(actual.groups) == rows_of(expected.groups) and actual.metrics == expected.metrics
            assert torch.equal(actual.scores()["overall"], expected.scores()["overall"])
            assert list(actual.groups.non_tensor_batch["images"]) == list(expected.groups.non_tensor_batch["images"])

    def test_the_limit_says_what_was_kept_and_what_to_change(self):
        algorithm = {"online_filtering": True, "filter_low": 0.25, "filter_high": 0.45}
        maker, engine = make_maker(**self.CHOICES | {"algorithm": algorithm, "trainer": {"max_try_make_batch": 4}})
        with pytest.raises(DataError) as caught:  # rows 3 and 4 in four attempts
            maker.make(engine)
        assert len(engine.calls) == 4
        for words in (
            "kept 2 groups of the 12 sampled in 4 attempts",
            "filter_high=0.45",
            "trainer.max_try_make_batch",
        ):
            assert words in str(caught.value)

    def test_without_a_limit_it_draws_on(self):
        algorithm = {"online_filtering": True, "filter_low": 0.25, "filter_high": 0.35}
        maker, engine = make_maker(**self.CHOICES | {"algorithm": algorithm, "trainer": {"max_try_make_batch": -1}})
        assert rows_of(maker.make(engine).groups) == [3, 3, 3, 3] and len(engine.calls) == 14

    def test_a_part_of_the_reward_that_few_responses_have_is_zero_elsewhere(self):
        algorithm = {"online_filtering": True, "filter_low": 0.75, "filter_high": 1.05}
        maker, engine = make_maker(**self.CHOICES | {"algorithm": algorithm})
        rollout = maker.make(engine)  # rows 8 9 10 and 8 again; 9 and 10 answer with 10 or 11
        rows = [int(uid) for uid in rollout.groups.non_tensor_batch["uid"]]
        assert rollout.scores()["tens"].tolist() == [[0.0, float(row >= 9)] for row in rows]


def test_remax_takes_the_reward_of_the_greedy_response_of_the_same_prompt():
    maker, engine = make_maker(
        data={"rollout_batch_size": 4, "mini_rollout_batch_size": 2}, algorithm={"adv_estimator": "remax"}
    )
    groups = maker.make(engine).groups
    rows = torch.tensor([int(uid) for uid in groups.non_tensor_batch["uid"]])
    assert torch.equal(groups.batch["baselines"], rows / 10)
    assert [sampling["temperature"] for _, sampling, _ in engine.calls] == [0.0, 1.0] * 2


def test_joined_prompts_are_padded_in_front():
    def part(width: int) -> DataProto:
        shape = (1, width)
        tensors = {
            "prompt_ids": torch.ones(shape),
            "prompt_mask": torch.ones(shape),
            "prompt_position_ids": torch.ones(1, 3, width),
            "responses": torch.zeros(1, 2, 4),
        }
        return DataProto.from_dict(tensors, {"uid": [str(width)]})

    joined = join_groups([part(1), part(3)])
    assert joined.batch["prompt_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert joined.batch["prompt_position_ids"].shape == (2, 3, 3)


def test_the_next_batch_is_read_while_a_step_is_made_and_no_other():
    maker, engine = make_maker(data={"rollout_batch_size": 4, "shuffle": False})
    read: list[list[int]] = []
    readable = maker.train_set.readable
    maker.train_set.readable = lambda indices, spares: read.append(list(indices)) or readable(indices, spares)
    maker.make(engine)
    maker._decoder.shutdown()
    assert read == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_ranks_share_groups_by_their_own_tokens():
    """Prompts of 1, 2 and 3 tokens in turn with 4 of responses: 7 and 5 go to one rank, 6 and 5 to the other."""
    maker, engine = make_maker(data={"rollout_batch_size": 4, "shuffle": False})
    worker = maker.config.worker
    worker = dataclasses.replace(worker, actor=dataclasses.replace(worker.actor, global_batch_size=4))
    maker.config, maker.num_ranks = dataclasses.replace(maker.config, worker=worker), 2
    groups = maker.make(engine).groups
    assert [int(uid) for uid in groups.non_tensor_batch["uid"]] == [2, 3, 0, 1]


@pytest.mark.parametrize("is_filtered", [False, True])
def test_texts_keep_the_order_of_their_groups(is_filtered):
    filtering = {"online_filtering": is_filtered, "filter_low": -1.0, "filter_high": 9.0}
    maker, engine = make_maker(data={"rollout_batch_size": 6}, algorithm=filtering)
    rollout = maker.make(engine)
    rollout.scores()
    first = rollout.groups.batch["responses"][..., 0].flatten().tolist()
    assert rollout.texts() == [f"text {token}" for token in first] and len(set(first)) > 6
