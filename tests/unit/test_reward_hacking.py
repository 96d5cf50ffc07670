"""The figure of reward hacking is drawn whole, and its writers hack what the gates do not close."""

import numpy as np
import reward_hacking
from reward_hacking import CATEGORIES, SETTINGS, SWEPT, Writer, generate, last, train

from spatialthinker.rewards import REWARDS


def test_reward_hacking_draws_every_setting(tmp_path, capsys):
    reward_hacking.main(["--steps", "1", "--seeds", "1", "--out", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert [line[:30].strip() for line in capsys.readouterr().out.splitlines()] == list(reward_hacking.SETTINGS)


def test_reward_hacking_reads_the_right_answer_from_the_true_boxes():
    rng = np.random.default_rng(0)
    writers = [Writer(puzzle, row, 0.0, 1.0, rng) for puzzle, row in generate(100, 1, categories=CATEGORIES)]
    alone = REWARDS["spatial_sgg"]([writer.write(1, 0.0) for writer in writers])
    assert min(result["overall"] for result in alone) > 0.999
    crowded = REWARDS["spatial_sgg"]([writer.write(4, 0.0) for writer in writers])
    assert [result["accuracy"] for result in crowded] == [float(w.puzzle.category != "count") for w in writers]


def test_reward_hacking_pays_without_count_and_gate_only():
    rows = list(generate(50, 0, categories=CATEGORIES))
    constants = reward_hacking.PERCEPTION_ERROR, reward_hacking.READ_SHARE
    ungated, full = (last(train(rows, SETTINGS[name], 40, 0, *constants)) for name in SWEPT)
    assert ungated[2] > 2.0 > 1.5 > full[2]
    assert ungated[1] < full[1]
