"""Rewards: a pool of processes that scores responses, and the forms that a reward of your own may have."""

from verl.reward.coroutines import CallLimits
from verl.reward.faults import RewardError
from verl.reward.functions import FileReward
from verl.reward.mixture import MixedReward
from verl.reward.pool import PendingRewards, RewardFunction, RewardManager

__all__ = [
    "CallLimits",
    "FileReward",
    "MixedReward",
    "PendingRewards",
    "RewardError",
    "RewardFunction",
    "RewardManager",
]
