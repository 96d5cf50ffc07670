"""Routing replay: the experts that an engine chose, on their way to the training ranks, and what replay changes.

Letters: P and R tokens of prompt and response, n samples, K experts of each token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl.protocol.row_values import as_objects


def group_experts(completions: Sequence[Any], num_samples: int) -> np.ndarray:
    """Per prompt the experts [P + sum of R, layers, K] of its tokens, then of its responses', as an array of tensors.

    An engine notes them for every token that it reads, so not for the last of a response, whose state nothing reads:
    the one before it stands in.

    Args:
        completions: of vLLM, n after another; each with `routed_experts` [P + R - 1, layers, K].

    Raises:
        RuntimeError: the engine returned none, or not for every token.
    """
    groups = []
    for start in range(0, len(completions), num_samples):
        parts: list[np.ndarray] = []
        for completion in completions[start : start + num_samples]:
            chosen, length = completion.routed_experts, len(completion.token_ids)
            if chosen is None or len(chosen) < length:
                raise RuntimeError(
                    f"the engine noted the experts of {0 if chosen is None else len(chosen)} tokens of a prompt with "
                    f"a response of {length}; set worker.actor.routing_replay=false"
                )
            prompt = len(chosen) + 1 - length
            parts += [] if parts else [chosen[:prompt]]
            parts += [chosen[prompt:], chosen[-1:]]
        groups.append(torch.from_numpy(np.concatenate(parts)))
    return as_objects(groups)


def record_routing(worker: Any) -> None:
    """Lets kernels that choose experts themselves, as vLLM's for CPUs do, note the router's choice; runs in vLLM."""
    from vllm.model_executor.layers.fused_moe.layer import MoERunner

    capturer = worker.model_runner.routed_experts_capturer
    for layer in worker.model_runner.compilation_config.static_forward_context.values():
        if isinstance(layer, MoERunner) and layer.is_monolithic:
            _record_layer(layer, capturer)


def _record_layer(layer: Any, capturer: Any) -> None:
    experts, number = layer.routed_experts, layer.layer_id
    forward = experts.forward_monolithic

    def record_and_forward(x: Tensor, router_logits: Tensor, **inputs: Any) -> Any:
        capturer.capture(number, router_logits.topk(experts.top_k, dim=-1).indices)
        return forward(x=x, router_logits=router_logits, **inputs)

    experts.forward_monolithic = record_and_forward


def switch_routing(llm: Any, is_on: bool) -> None:
    """Lets an engine that can note experts do so in its next steps, or not, as where nothing will read them.

    What was cached of prompts without such notes is forgotten once they are wanted.
    """
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    if is_on and not scheduler.enable_return_routed_experts:
        llm.reset_prefix_cache()
    scheduler.enable_return_routed_experts = is_on
    llm.collective_rpc(_switch_runner, args=(is_on,))


def _switch_runner(worker: Any, is_on: bool) -> None:
    worker.model_runner.routed_experts_initialized = is_on
