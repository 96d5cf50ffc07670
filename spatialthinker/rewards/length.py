"""Reward of length: a term that keeps responses below their limit, for sums and gates with others.

    overall = min(1, max(0, (max_tokens - tokens) / buffer_tokens))

It is 1 up to max_tokens - buffer_tokens, falls linearly, and is 0 from max_tokens on. Source: the soft overlong
punishment of DAPO, https://arxiv.org/abs/2503.14476, equation 13, plus 1.
"""

from collections.abc import Iterator, Sequence

from spatialthinker.rewards.record import RewardInput

MAX_TOKENS = 2048
BUFFER_TOKENS = 512
"""The limit, and the tokens before it in which the reward falls."""


def length(
    inputs: Sequence[RewardInput], *, max_tokens: int = MAX_TOKENS, buffer_tokens: int = BUFFER_TOKENS
) -> list[dict[str, float]]:
    """Returns 1 for each response well below `max_tokens`, falling to 0 over the last `buffer_tokens`.

    The ground truth is not read. Raises ValueError for a response whose length in tokens is not known, and for
    limits that are not 0 < buffer_tokens <= max_tokens. An empty response scores 1, so it is a part of a sum or what
    a gate lets through, not a reward of its own.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(f"got max_tokens {max_tokens} and buffer_tokens {buffer_tokens}; 0 < buffer <= max is needed")
    scores = (min(1.0, max(0.0, (max_tokens - _num_tokens(item)) / buffer_tokens)) for item in inputs)
    return [{"overall": score} for score in scores]


def _num_tokens(item: RewardInput) -> int:
    if item.response_length is None:
        raise ValueError("the reward length needs the number of tokens of each response, response_length; got none")
    return item.response_length


def explain_length(item: RewardInput) -> Iterator[str]:
    """Yields a line on the number of tokens."""
    yield f"tokens:   {_num_tokens(item)}"
