"""The scoring process: it decodes responses and calls the reward function."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from spatialthinker.stop_signals import STOP_SIGNALS
from verl.reward.faults import call_function
from verl.reward.items import ScoringGroup
from verl.reward.scores import check_scores

RewardFunction = Callable[[list[dict[str, Any]]], list[dict[str, float]]]
Scored = tuple[list[str], list[dict[str, float]]]

_child: dict[str, Any] = {}  # state of a scoring process: tokenizer, reward function


def start_child(tokenizer_path: str, function: RewardFunction, skip_special_tokens: bool) -> None:
    """Prepares a scoring process, which ends soon after its driver."""
    from transformers import AutoTokenizer

    for signum in STOP_SIGNALS:  # they reach all processes; the driver handles them
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    _child["tokenizer"] = AutoTokenizer.from_pretrained(tokenizer_path)
    _child["function"] = function
    _child["skip_special_tokens"] = skip_special_tokens


def _end_with_parent(parent: int) -> None:
    """Ends this process soon after its driver has ended, by whatever cause."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def score_groups(groups: Sequence[ScoringGroup]) -> Scored:
    """Texts and scores of all responses, group by group."""
    items = read_items(groups)
    texts = [item["response"] for item in items]
    return texts, score_items(items)


def decode(token_ids: Sequence[Sequence[int]]) -> list[str]:
    """Texts of token ids, as reward functions read them."""
    return _child["tokenizer"].batch_decode(token_ids, skip_special_tokens=_child["skip_special_tokens"])


def read_items(groups: Sequence[ScoringGroup]) -> list[dict[str, Any]]:
    """The items of all responses, those given by token ids decoded."""
    items = []
    for group in groups:
        texts: Any = group.responses
        end_ids: tuple[int, ...] = ()
        if not isinstance(texts[0], str):
            tokenizer = _child["tokenizer"]
            texts = decode(texts)
            end_ids = (tokenizer.eos_token_id, tokenizer.pad_token_id)
        items += group.make_items(texts, end_ids)
    return items


def score_items(items: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Checked scores of the items."""
    function = _child["function"]
    copies = [dict(item) for item in items]  # it may change what it is given
    return check_scores(call_function(lambda: function(copies), items), items, function)
