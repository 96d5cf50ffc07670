import inspect
import pickle
import random

import pytest

from spatialthinker.rewards import REWARDS, RewardInput, adapters
from spatialthinker.rewards.adapters import TrlReward, easyr1_score, verl_batch_score, verl_score
from spatialthinker.rewards.bench import random_input

ROWS = [random_input(random.Random(seed)) for seed in range(6)]
SCORES = REWARDS["spatial_sgg"](ROWS)
COLUMNS = {"ground_truth": [row.ground_truth for row in ROWS], "trainer_state": None, "completion_ids": [[1]] * 6}
RESPONSES = [row.response for row in ROWS]
PROBLEMS = [row.problem for row in ROWS]


def message(role, content):
    return [{"role": role, "content": content}]


def test_trl_plain_and_conversational():
    overall = [scores["overall"] for scores in SCORES]
    reward = TrlReward("spatial_sgg")
    assert reward.__name__ == "spatial_sgg"
    assert reward(prompts=PROBLEMS, completions=RESPONSES, **COLUMNS) == overall
    assert reward(prompts=["?"] * 6, completions=RESPONSES, problem=PROBLEMS, **COLUMNS) == overall
    prompts = [
        message("system", "Look.") + message("user", [{"type": "image"}, {"type": "text", "text": problem}])
        for problem in PROBLEMS
    ]
    completions = [message("assistant", response) for response in RESPONSES]
    assert reward(prompts=prompts, completions=completions, **COLUMNS) == overall
    assert pickle.loads(pickle.dumps(reward))(prompts=prompts, completions=completions, **COLUMNS) == overall


def test_trl_keywords_and_logged_terms():
    logged = {}
    reward = TrlReward("spatial_sgg", accuracy_gate=False, overlap="iou")
    expected = REWARDS["spatial_sgg"](ROWS, accuracy_gate=False, overlap="iou")
    scores = reward(prompts=PROBLEMS, completions=RESPONSES, log_metric=logged.__setitem__, **COLUMNS)
    assert scores == [row["overall"] for row in expected]
    assert logged == {f"spatial_sgg/{key}": pytest.approx(sum(r[key] for r in expected) / 6) for key in expected[0]}
    with pytest.raises(ValueError, match="got reward 'spatial'; known: spatial_sgg, r1v"):
        TrlReward("spatial")
    answers = TrlReward("r1v")(prompts=["?"], completions=["(B)"], ground_truth=["b"])
    assert answers == [0.5]


def test_verl():
    assert list(inspect.signature(verl_score).parameters)[:4] == [
        "data_source",
        "solution_str",
        "ground_truth",
        "extra_info",
    ]
    infos = [{"problem": problem, "num_turns": 2} for problem in PROBLEMS]
    one = verl_score("stvqa", RESPONSES[0], ROWS[0].ground_truth, infos[0])
    assert one["score"] == SCORES[0]["overall"]
    assert set(one) == {"score", "format", "count", "accuracy", "spatial_score"}
    batch = verl_batch_score(
        data_sources=["stvqa"] * 6,
        solution_strs=RESPONSES,
        ground_truths=COLUMNS["ground_truth"],
        extra_infos=infos,
        strict_boxes=False,
    )
    expected = REWARDS["spatial_sgg"](ROWS, strict_boxes=False)
    assert [row["score"] for row in batch] == [row["overall"] for row in expected]
    with pytest.raises(ValueError, match="Image size"):
        verl_score("stvqa", RESPONSES[0], ROWS[0].ground_truth)
    assert verl_score("stvqa", "<think>t</think><answer>b</answer>", "B", reward="r1v")["score"] == 1.0


def test_easyr1():
    assert (adapters.REWARD_NAME, adapters.REWARD_TYPE) == ("spatialthinker", "batch")
    items = [
        {
            "response": row.response,
            "response_length": 9,
            "ground_truth": f"Image size: (800 x 600)\n{row.ground_truth}",
        }
        for row in ROWS
    ]
    assert easyr1_score(items) == SCORES
    with_problems = [item | {"problem": problem} for item, problem in zip(items, PROBLEMS, strict=True)]
    without = easyr1_score(with_problems, accuracy_weight=0.0)
    assert [row["overall"] for row in without] == pytest.approx([row["overall"] - 0.5 for row in SCORES])


@pytest.mark.e2e
def test_trl_trains_with_the_reward(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM, set_seed
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("configs/toy_model")
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": PROBLEMS, "ground_truth": COLUMNS["ground_truth"]})
    settings = trl.GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=2, max_completion_length=8,
        max_steps=1, report_to=[], use_cpu=True, bf16=False, logging_steps=1,
    )  # fmt: skip
    seen = []

    def watch(prompts, completions, ground_truth, **_):
        columns = zip(completions, ground_truth, prompts, strict=True)
        seen.extend(RewardInput(*column) for column in columns)
        return [0.0] * len(completions)

    set_seed(0)
    trainer = trl.GRPOTrainer(
        model=Qwen2ForCausalLM(config),
        reward_funcs=[TrlReward("spatial_sgg"), TrlReward("r1v"), watch],
        args=settings,
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "rewards/spatial_sgg/mean" in entry]
    assert len(seen) == 4
    for name in ("spatial_sgg", "r1v"):  # not always 0: the toy tokenizer has long tokens
        scores = [parts["overall"] for parts in REWARDS[name](seen)]
        assert logs[0][f"rewards/{name}/mean"] == pytest.approx(sum(scores) / 4)
