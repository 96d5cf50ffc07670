"""Selection of the groups of a step that are recorded, by `trainer.rollouts_to_keep`.

Letters: G groups, n samples.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Rule = str | int
NUM_LARGEST = 8
"""Groups with the largest advantages that `odd` keeps of a step."""


def choose_groups(
    rule: Rule,
    uids: Sequence[str],
    scores: Tensor,
    advantages: Tensor | None,
    has_failed: Tensor,
    is_truncated: Tensor,
) -> list[str]:
    """Reason to keep each group, several joined by "+"; empty for one that is not.

    Args:
        rule: all, none, odd, or a number of groups. These are those with the lowest digests of their ids, so that the
            same prompts are met again in other epochs and runs.
        uids: row ids of the G groups.
        scores: [G, n].
        advantages: [G, n]; None for a validation.
        has_failed, is_truncated: [G, n] bool: the format fails; the response ends at the length limit.
    """
    if rule in ("all", "none"):
        return ["all" if rule == "all" else ""] * len(uids)
    if isinstance(rule, int):
        order = sorted(range(len(uids)), key=lambda group: hashlib.sha256(uids[group].encode()).digest())
        chosen = set(order[:rule])
        return ["sample" if group in chosen else "" for group in range(len(uids))]
    reasons: dict[str, Tensor] = {}
    if scores.shape[1] > 1:
        reasons["zero_variance"] = is_flat(scores)
    reasons |= {"format": has_failed.any(-1), "truncated": is_truncated.any(-1)}
    if advantages is not None:
        largest = advantages.abs().amax(-1)  # [G]
        places = largest.nan_to_num(-1.0).topk(min(NUM_LARGEST, len(uids))).indices
        reasons["large_advantage"] = torch.zeros(len(uids), dtype=torch.bool).index_fill(0, places, True)
    flags = {name: values.tolist() for name, values in reasons.items()}
    return ["+".join(name for name, values in flags.items() if values[group]) for group in range(len(uids))]


def is_flat(scores: Tensor) -> Tensor:
    """True [G] for groups without variance: all n scores [G, n] are equal, so that nothing is learned from them."""
    return (scores == scores[:, :1]).all(-1)
