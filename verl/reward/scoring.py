"""The scoring process: it decodes responses and calls the reward function."""

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from spatialthinker.stop_signals import STOP_SIGNALS
from verl.reward.coroutines import CallLimits, CallLoop, CallResults
from verl.reward.faults import call_function
from verl.reward.items import ScoringGroup
from verl.reward.scores import check_scores

RewardFunction = Callable[[list[dict[str, Any]]], list[dict[str, float]]]
Scored = tuple[list[str], list[dict[str, float]]]

_child: dict[str, Any] = {}  # state of a scoring process: tokenizer, reward functions by name, limits, calls


def start_child(
    tokenizer_path: str, functions: Mapping[str, RewardFunction], skip_special_tokens: bool, limits: CallLimits
) -> None:
    """Prepares a scoring process, which ends soon after its driver."""
    from transformers import AutoTokenizer

    for signum in STOP_SIGNALS:  # they reach all processes; the driver handles them
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    _child["tokenizer"] = AutoTokenizer.from_pretrained(tokenizer_path)
    _child["functions"], _child["limits"] = functions, limits
    _child["skip_special_tokens"] = skip_special_tokens


def _end_with_parent(parent: int) -> None:
    """Ends this process soon after its driver has ended, by whatever cause."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def find_coroutines() -> list[str]:
    """Names of the reward functions that are to be awaited."""
    found: dict[str, Any] = _child["functions"]
    return [name for name, function in found.items() if hasattr(function, "is_coroutine") and function.is_coroutine()]


def score_groups(groups: Sequence[ScoringGroup]) -> Scored:
    """Texts and scores of all responses, group by group."""
    items, names = read_items(groups)
    texts = [item["response"] for item in items]
    return texts, score_items(items, names)


def start_calls(number: int, groups: Sequence[ScoringGroup]) -> list[str]:
    """Texts of all responses; the calls of their coroutine rewards begin."""
    if "calls" not in _child:
        _child["calls"] = CallLoop(_child["limits"])
    items, names = read_items(groups)
    _child["calls"].start(number, items, [_child["functions"][name] for name in names])
    return [item["response"] for item in items]


def collect_calls(number: int, wait_s: float) -> CallResults:
    """Results of the calls that are back after at most `wait_s` seconds."""
    return _child["calls"].collect(number, wait_s)


def decode(token_ids: Sequence[Sequence[int]]) -> list[str]:
    """Texts of token ids, as reward functions read them."""
    return _child["tokenizer"].batch_decode(token_ids, skip_special_tokens=_child["skip_special_tokens"])


def read_items(groups: Sequence[ScoringGroup]) -> tuple[list[dict[str, Any]], list[str]]:
    """The items of all responses, those given by token ids decoded, and the name of each one's reward."""
    items, names = [], []
    for group in groups:
        texts: Any = group.responses
        end_ids: tuple[int, ...] = ()
        if not isinstance(texts[0], str):
            tokenizer = _child["tokenizer"]
            texts = decode(texts)
            end_ids = (tokenizer.eos_token_id, tokenizer.pad_token_id)
        items += group.make_items(texts, end_ids)
        names += [group.reward] * len(texts)
    return items, names


def score_items(items: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, float]]:
    """Checked scores of the items, each by the reward of its name, in their order."""
    scores: dict[int, dict[str, float]] = {}
    for name in dict.fromkeys(names):
        function, places = _child["functions"][name], [place for place, own in enumerate(names) if own == name]
        own_items = [items[place] for place in places]
        copies = [dict(item) for item in own_items]  # it may change what it is given
        result = call_function(lambda function=function, copies=copies: function(copies), own_items)
        scores |= zip(places, check_scores(result, own_items, function), strict=True)
    return [scores[place] for place in range(len(items))]
