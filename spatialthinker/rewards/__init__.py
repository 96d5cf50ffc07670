"""Rewards for visual question answering with and without scene graphs.

    REWARDS[name](inputs: Sequence[RewardInput], **kwargs) -> list[dict[str, float]]

Every result has `overall`, every value lies in [0, 1] at the default weights, and no response raises.
"""

from collections.abc import Callable

from spatialthinker.rewards.accuracy import math, r1v, r1v_scene
from spatialthinker.rewards.record import RewardInput
from spatialthinker.rewards.spatial_sgg import check_ground_truth, format_failure, spatial_sgg

REWARDS: dict[str, Callable[..., list[dict[str, float]]]] = {
    "spatial_sgg": spatial_sgg,
    "r1v": r1v,
    "r1v_scene": r1v_scene,
    "math": math,
}

__all__ = ["REWARDS", "RewardInput", "check_ground_truth", "format_failure"]
