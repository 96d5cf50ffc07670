import json
from pathlib import Path

import pytest

from spatialthinker.rewards import REWARDS, RewardInput

GOLDEN = [json.loads(line) for line in (Path(__file__).parent / "data" / "golden_rewards.jsonl").open()]


@pytest.mark.parametrize("name", list(REWARDS))
def test_golden_scores(name):
    truth = "answer" if name in ("r1v", "math") else "ground_truth"
    inputs = [RewardInput(row["response"], row[truth], row["problem"]) for row in GOLDEN]
    for row, result in zip(GOLDEN, REWARDS[name](inputs), strict=True):
        assert result == pytest.approx(row["scores"][name], abs=1e-6)
