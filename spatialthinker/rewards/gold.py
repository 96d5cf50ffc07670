"""A response that earns the full reward, made of the ground truth alone."""

from spatialthinker.response import section

_THOUGHT = "The ground truth says so."


def gold_response(reward: str, ground_truth: str) -> str:
    """The ground truth in the format that a reward of `REWARDS` requires; unchanged for any other name."""
    answer = (section(ground_truth, "answer") or ground_truth).strip()
    scene = section(ground_truth, "scene") or "{}"
    think = f"<think>{_THOUGHT}</think>\n"
    forms = {
        "spatial_sgg": f"<observe>{_THOUGHT}</observe>\n<scene>{scene}</scene>\n{think}<answer>{answer}</answer>",
        "r1v": f"{think}<answer>{answer}</answer>",
        "math": f"{think}\\boxed{{{answer}}}",
    }
    forms["r1v_scene"] = forms["spatial_sgg"]
    return forms.get(reward, ground_truth)
