import sys
from decimal import Decimal
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoTokenizer

from spatialthinker.synthetic import generate, gold_response
from verl.data.dataset import _objects
from verl.protocol import DataProto
from verl.reward import FileReward, RewardError, RewardManager, functions, scoring
from verl.reward import pool as pools
from verl.reward.items import ScoringGroup
from verl.trainer.rewards import ScoreFunction

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


def score_text(response: str = "a", **fields) -> dict[str, float]:
    """Score of one response in this process."""
    group = ScoringGroup([response], **({"problem": "p", "ground_truth": "a", "uid": "7"} | fields))
    return scoring.score_groups([group])[1][0]


def scored(monkeypatch, path: Path, name: str = "main", **item) -> dict:
    """Score of one item by a reward file, loaded in this process, whose modules are left as they were."""
    monkeypatch.setattr(scoring, "_child", {"functions": {"": FileReward(str(path), name, {})}})
    monkeypatch.setattr(functions, "_modules", {})
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("sys.modules", dict(sys.modules))
    return score_text(**item)


def test_a_reward_file_imports_its_neighbours_also_from_another_folder(monkeypatch, tmp_path):
    folder = tmp_path / "rewards"
    (folder / "parts").mkdir(parents=True)
    (folder / "weights_beside_it.py").write_text("WEIGHT = 0.25\n")
    (folder / "parts" / "more.py").write_text("EXTRA = 0.5\n")
    (folder / "late_one.py").write_text("LATE = 1.0\n")
    (folder / "mine.py").write_text(
        "from parts.more import EXTRA\nfrom weights_beside_it import WEIGHT\n"
        "def main(items):\n    from late_one import LATE\n"
        "    return [{'overall': WEIGHT + EXTRA + LATE}] * len(items)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert scored(monkeypatch, folder / "mine.py") == {"overall": 1.75}


def test_a_neighbour_does_not_replace_a_module_of_python(monkeypatch, tmp_path):
    for name in ("math", "statistics", "json"):
        (tmp_path / f"{name}.py").write_text(
            "import math, statistics\n"
            "def main(items): return [{'overall': statistics.mean([math.sqrt(4)])}] * len(items)\n"
        )
        assert scored(monkeypatch, tmp_path / f"{name}.py") == {"overall": 2.0}


@pytest.mark.parametrize(
    "kind", ["@dataclass\nclass Part", "class Part(NamedTuple)", "@dataclass(slots=True)\nclass Part"]
)
def test_a_reward_file_may_have_records_with_deferred_annotations(monkeypatch, tmp_path, kind):
    (tmp_path / "records.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        f"from typing import NamedTuple, get_type_hints\n{kind}:\n    weight: float\n    name: str = 'x'\n"
        "def main(items):\n    is_known = get_type_hints(Part)['weight'] is float\n"
        "    return [{'overall': Part(0.5).weight, 'ok': float(is_known)}]\n"
    )
    assert scored(monkeypatch, tmp_path / "records.py") == {"overall": 0.5, "ok": 1.0}


@pytest.mark.parametrize("truth", [5, 2.5, {"x": 1, "y": [2]}, ["a"], "text"])
def test_a_reward_file_gets_the_answer_in_its_own_type(pool, tmp_path, truth):
    (tmp_path / "typed.py").write_text(
        f"def main(items): return [{{'overall': float(item['ground_truth'] == {truth!r})}} for item in items]\n"
    )
    manager = pool(FileReward(str(tmp_path / "typed.py"), "main", {}))
    assert manager.probe("a", "b", truth) == {"overall": 1.0}
    batch = sampled([row for _, row in generate(1, seed=2)], [["one"]])
    batch.non_tensor_batch["ground_truth"] = _objects([truth])
    assert manager.submit(batch).result()["overall"].tolist() == [[1.0]]


def test_a_built_in_reward_reads_a_number_as_text():
    items = [{"response": "\\boxed{5}", "ground_truth": 5, "problem": "p", "response_length": 1}]
    assert ScoreFunction("math", {})(items)[0]["accuracy"] == 1.0


def test_a_reward_without_overall_and_a_missing_function_are_named(monkeypatch, tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text(FILE)
    monkeypatch.setattr(scoring, "_child", {"functions": {"": FileReward(str(path), "shy", {})}})
    with pytest.raises(RewardError, match="row 7: the reward function returned no 'overall'"):
        score_text()
    monkeypatch.setattr(scoring, "_child", {"functions": {"": FileReward(str(path), "nothing", {})}})
    with pytest.raises(RewardError, match="has no 'nothing'"):
        score_text()


def test_scoring_processes_compute_in_one_thread(pool, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    file = tmp_path / "threads.py"
    file.write_text(
        "import os\ndef score(items):\n    return [{'overall': int(os.environ['OMP_NUM_THREADS'])}] * len(items)\n"
    )
    assert pool(FileReward(str(file), "score", {})).probe("", "", "") == {"overall": 1}


def checked(monkeypatch, function, *uids: str) -> list[dict[str, float]]:
    monkeypatch.setattr(scoring, "_child", {"functions": {"": function}})
    return scoring.score_items([{"response": "a <b>", "uid": uid} for uid in uids], [""] * len(uids))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (-float("inf"), "-inf"),
        (1e39, "1e+39"),  # infinite once it is float32
        (10**400, "1000"),
        (None, "None"),
        ("0.5", "'0.5'"),
        ([0.5], "[0.5]"),
        (1j, "1j"),
        (np.float32("nan"), "nan"),
        (torch.tensor([0.5, 1.0]), "tensor([0.5000, 1.0000])"),
        (Decimal("NaN"), "Decimal('NaN')"),
    ],
)
@pytest.mark.parametrize("part", ["overall", "extra"])
def test_a_part_that_is_no_finite_number_is_named_with_row_part_and_function(monkeypatch, value, shown, part):
    class Named:
        def __call__(self, items):
            return [{"overall": 1.0, "extra": 0.0} | ({part: value} if item["uid"] == "7" else {}) for item in items]

        def __str__(self):
            return "my_reward.py:score"

    with pytest.raises(RewardError) as caught:
        checked(monkeypatch, Named(), "6", "7", "8")
    message = str(caught.value)
    assert message.startswith("row 7: the reward function returned ") and shown in message
    assert f"as {part!r}" in message and "my_reward.py:score" in message and "a <b>" in message


def test_numbers_of_any_library_are_scores(monkeypatch):
    values = [1, True, np.float64(0.5), np.array([0.25]), torch.tensor(2), Decimal("0.5"), -1e30]
    scores = checked(monkeypatch, lambda items: [{"overall": value} for value in values], *map(str, range(7)))
    assert [score["overall"] for score in scores] == [1.0, 1.0, 0.5, 0.25, 2.0, 0.5, -1e30]
    assert {type(score["overall"]) for score in scores} == {float}


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, "returned None instead of a list of dicts"),
        ({"overall": 1.0}, "instead of a list of dicts"),
        ("ok", "returned 'ok' instead of a list of dicts"),
        ([1.0], "row 3: the reward function returned 1.0 instead of a dict"),
        ([None], "row 3: the reward function returned None instead of a dict"),
        ([{}], "row 3: the reward function returned no 'overall', only nothing"),
        ([{"overall": 1.0, 5: 1.0}], "as 5"),
        ([{"overall": 1.0}] * 2, "returned 2 scores for 1 responses (row 3)"),
    ],
)
def test_what_is_no_list_of_scores_is_named(monkeypatch, returned, words):
    with pytest.raises(RewardError) as caught:
        checked(monkeypatch, lambda items: returned, "3")
    assert words in str(caught.value)


class Mute(Exception):
    def __repr__(self):
        raise ValueError("no text")

    __str__ = __repr__


def test_an_error_and_a_value_without_a_text_are_named(monkeypatch):
    def fails(items):
        raise Mute

    with pytest.raises(RewardError, match="raised Mute: a Mute whose text cannot be made .* scored row 3"):
        checked(monkeypatch, fails, "3")
    for returned in ([{"overall": Mute()}], [Mute()]):
        with pytest.raises(RewardError, match="row 3: .* returned a Mute whose text cannot be made"):
            checked(monkeypatch, lambda items, returned=returned: returned, "3")


def test_a_function_that_empties_what_it_is_given_is_held_to_the_rows_that_it_got(monkeypatch):
    def empties(items):
        items.clear()
        return []

    def empties_rows(items):
        return [item.clear() or {"overall": "x"} for item in items]

    with pytest.raises(RewardError, match="returned 0 scores for 2 responses"):
        checked(monkeypatch, empties, "3", "4")
    with pytest.raises(RewardError, match="row 3: the reward function returned 'x' as 'overall'"):
        checked(monkeypatch, empties_rows, "3", "4")


@pytest.mark.filterwarnings("error")
def test_a_function_that_returns_a_coroutine_without_being_one_is_named(monkeypatch):
    async def later():
        return []

    with pytest.raises(RewardError, match="returned a coroutine, and scores row 3 never; define it by async def"):
        checked(monkeypatch, lambda items: later(), "3")


LEAVING = """
import os, subprocess, sys, time
class Local(Exception):
    def __init__(self, a, b): super().__init__(a)
def leaves(items): sys.exit(3)
def interrupts(items): raise KeyboardInterrupt
def cannot_be_pickled(items): raise Local("secret", 2)
def dies(items): os._exit(1)
def hangs(items):
    while True: pass
def waits(items): subprocess.run(["sleep", "1000"])
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("leaves", "the reward function raised SystemExit: 3"),
        ("interrupts", "the reward function raised KeyboardInterrupt"),
        ("cannot_be_pickled", "the reward function raised Local: secret"),
        ("dies", "a scoring process died in"),
        ("hangs", "did not return within 1 s (trainer.watchdog_timeout_s=1, "),
        ("waits", "did not return within 1 s (trainer.watchdog_timeout_s=1, "),
    ],
)
def test_a_function_that_leaves_or_never_returns_is_named_and_ends(tmp_path, monkeypatch, name, words):
    path = tmp_path / "my_reward.py"
    path.write_text(LEAVING)
    manager = RewardManager(FileReward(str(path), name, {}), str(TOY_MODEL), num_processes=1)
    try:
        resource_tracker.ensure_running()
        before = set(psutil.Process().children(recursive=True))
        future = manager.pool.submit(len, ())
        future.result()  # the process has started
        if name in ("hangs", "waits"):
            manager.timeout_s = 1.0
            monkeypatch.setattr(pools, "START_S", 0.0)
        with pytest.raises(RewardError) as caught:
            manager.probe("a", "b", "c", "row 5")
        message = str(caught.value)
        assert words in message and str(path) in message
        if name in ("leaves", "cannot_be_pickled"):
            assert "line " in message and "row 5" in message
        started = set(psutil.Process().children(recursive=True)) - before
    finally:
        manager.close()
    _, alive = psutil.wait_procs(started, 20)
    assert not alive


def test_the_row_at_which_a_sequential_function_raises_is_named(monkeypatch, tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text(FILE)
    items: list[dict[str, Any]] = [
        {"response": text, "response_length": 1, "uid": uid} for text, uid in (("a", "4"), ("bad", "5"))
    ]
    monkeypatch.setattr(scoring, "_child", {"functions": {"": FileReward(str(path), "main", {})}})
    with pytest.raises(RewardError, match=r"KeyError: 'broken reward' \(.*my_reward.py, line 4\) .* row 5$"):
        scoring.score_items(items, [""] * len(items))
    with pytest.raises(RewardError, match="while it scored rows 0, 1, 2 and 2 more"):
        checked(monkeypatch, lambda items: 1 / 0, "0", "0", "1", "2", "3", "4")
