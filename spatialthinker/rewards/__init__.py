"""Rewards for visual question answering: scenes, answers, numbers, and terms to add to them.

    REWARDS[name](inputs: Sequence[RewardInput], **kwargs) -> list[dict[str, float]]

Every result has `overall`, every value lies in [0, 1] at the default weights, and no response raises. A ground truth
that cannot be scored against raises ValueError; ROW_CHECKS finds it when the data are loaded.
"""

from collections.abc import Callable
from typing import Any

from spatialthinker.rewards.accuracy import math, r1v, r1v_scene
from spatialthinker.rewards.boxes import boxes, check_boxes
from spatialthinker.rewards.choice import check_choice, choice
from spatialthinker.rewards.follows_scene import follows_scene
from spatialthinker.rewards.length import length
from spatialthinker.rewards.numeric import check_numbers, numbers
from spatialthinker.rewards.ordering import check_ordering, ordering
from spatialthinker.rewards.points import check_points, points
from spatialthinker.rewards.record import RewardInput
from spatialthinker.rewards.relations import check_relations, relations
from spatialthinker.rewards.spatial_sgg import check_ground_truth, format_failure, spatial_sgg

REWARDS: dict[str, Callable[..., list[dict[str, float]]]] = {
    "spatial_sgg": spatial_sgg,
    "r1v": r1v,
    "r1v_scene": r1v_scene,
    "math": math,
    "numbers": numbers,
    "points": points,
    "boxes": boxes,
    "relations": relations,
    "ordering": ordering,
    "choice": choice,
    "follows_scene": follows_scene,
    "length": length,
}

ROW_CHECKS: dict[str, Callable[[Any, str], None]] = {
    "spatial_sgg": check_ground_truth,
    "numbers": check_numbers,
    "points": check_points,
    "boxes": check_boxes,
    "relations": check_relations,
    "ordering": check_ordering,
    "choice": check_choice,
}
"""Reward -> its check of a row's ground truth and problem; a reward without one takes any text."""

TEXT_REWARDS = ("spatial_sgg", "r1v", "r1v_scene", "math")
"""Rewards whose ground truth is text; the others take typed values, too."""

__all__ = ["REWARDS", "ROW_CHECKS", "TEXT_REWARDS", "RewardInput", "check_ground_truth", "format_failure"]
