from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from spatialthinker.synthetic import generate, gold_response
from verl import reward
from verl.data.dataset import _objects
from verl.protocol import DataProto
from verl.reward import FileReward, RewardError, RewardManager
from verl.trainer.main import ScoreFunction

TOY_MODEL = Path(__file__).parents[2] / "configs" / "toy_model"


def sampled(rows, responses: list[list[str]]) -> DataProto:
    """A batch in which row g has the given responses."""
    tokenizer = AutoTokenizer.from_pretrained(TOY_MODEL)
    ids = [[tokenizer(text)["input_ids"] for text in group] for group in responses]
    width = max(len(row) for group in ids for row in group)
    tensor = torch.zeros(len(ids), len(ids[0]), width, dtype=torch.long)
    mask = torch.zeros_like(tensor, dtype=torch.bool)
    for g, group in enumerate(ids):
        for i, row in enumerate(group):
            tensor[g, i, : len(row)] = torch.tensor(row)
            mask[g, i, : len(row)] = True
    texts = {
        "ground_truth": _objects([row.answer_option_text for row in rows]),
        "problem": _objects([row.problem for row in rows]),
        "uid": _objects([row.image_id for row in rows]),
    }
    return DataProto.from_dict(tensors={"responses": tensor, "response_mask": mask}, non_tensors=texts)


@pytest.fixture
def pool():
    managers = []

    def start(function):
        managers.append(RewardManager(function, str(TOY_MODEL), num_processes=1))
        return managers[-1]

    yield start
    for manager in managers:
        manager.close()


def test_gold_scores_full_and_nonsense_nothing_in_the_right_places(pool):
    rows = [row for _, row in generate(3, seed=2)]
    batch = sampled(rows, [[gold_response(rows[0]), "no"], ["", gold_response(rows[1])], ["no", "nothing at all"]])
    pending = pool(ScoreFunction("spatial_sgg", {})).submit(batch)
    scores = pending.result()
    assert scores["overall"].round(decimals=3).tolist() == [[1, 0], [0, 1], [0, 0]]
    failures = {key for key in scores if key.startswith("format_failure/")}
    assert set(scores) - failures == {"overall", "format", "count", "accuracy", "spatial_score"}
    assert torch.equal(sum(scores[key] for key in failures), 1 - scores["format"])
    assert pending.texts[0] == gold_response(rows[0]) and pending.texts[1] == "no"


FILE = """
REWARD_TYPE = "sequential"
def main(item, scale=1.0):
    if item["response"] == "bad": raise KeyError("broken reward")
    return {"overall": scale * item["response_length"], "length": item["response_length"]}
def shy(item): return {"accuracy": 1.0}
"""


def test_a_reward_file_is_called_in_easyr1s_form(pool, tmp_path):
    (tmp_path / "my_reward.py").write_text(FILE)
    rows = [row for _, row in generate(1, seed=2)]
    batch = sampled(rows, [["one two three", "bad"]])
    manager = pool(FileReward(str(tmp_path / "my_reward.py"), "main", {"scale": 0.5}))
    length = int(batch.batch["response_mask"][0, 0].sum())
    assert manager.probe("a", "b", "a") == {"overall": 0.0, "length": 0.0}
    with pytest.raises(RewardError, match="KeyError: 'broken reward'"):
        manager.submit(batch).result()
    good = manager.submit(sampled(rows, [["one two three"]]))
    assert good.result()["overall"].tolist() == [[0.5 * length]]


def test_a_reward_without_overall_and_a_missing_function_are_named(monkeypatch, tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text(FILE)
    monkeypatch.setattr(reward, "_child", {"function": FileReward(str(path), "shy", {})})
    with pytest.raises(RewardError, match="row 7: the reward function returned no 'overall'"):
        reward._score_text({"response": "a", "uid": "7"})
    monkeypatch.setattr(reward, "_child", {"function": FileReward(str(path), "nothing", {})})
    with pytest.raises(RewardError, match="has no 'nothing'"):
        reward._score_text({"response": "a", "uid": "7"})


def test_scoring_processes_compute_in_one_thread(pool, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    file = tmp_path / "threads.py"
    file.write_text(
        "import os\ndef score(items):\n    return [{'overall': int(os.environ['OMP_NUM_THREADS'])}] * len(items)\n"
    )
    assert pool(FileReward(str(file), "score", {})).probe("", "", "") == {"overall": 1}
