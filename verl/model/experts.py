"""Mixture of experts over packed rows: routing, replay of an engine's routing, grouped matrix products.

Letters: T tokens of a packed row, K experts of each token, E experts, D hidden size, I width of an expert.

A layer's experts are stacked: gate and up [E, 2I, D], down [E, D, I]. Tokens are sorted by expert, so that each expert
multiplies consecutive rows, and one grouped product of a GPU does all experts of a layer. Replaying the experts that
the engine chose keeps a token on the same path in old, reference and updated policy, where rounding alone would send
some to others (rollout routing replay, https://arxiv.org/abs/2510.11370).
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear, softmax
from transformers import PreTrainedModel

from verl.model.families import decoder
from verl.model.packing import GroupLayout

GROUPED_DTYPES = (torch.bfloat16, torch.float16)


def choose_experts(logits: Tensor, top_k: int, replayed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights [T, K], which add up to 1, and indices [T, K] of each token's experts.

    Args:
        logits: [T, E] of the router.
        top_k: K.
        replayed: [T, K] chosen elsewhere; their weights are this router's. None: the K likeliest.
    """
    probs = softmax(logits, dim=-1, dtype=torch.float32)
    experts = probs.topk(top_k, dim=-1).indices if replayed is None else replayed.long()
    weights = probs.gather(1, experts)
    return (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), experts


def count_agreement(logits: Tensor, replayed: Tensor) -> Tensor:
    """[2] replayed experts that this router would choose too, and all."""
    own = logits.topk(replayed.shape[-1], dim=-1).indices
    is_shared = (replayed.long().unsqueeze(-1) == own.unsqueeze(-2)).any(-1)
    return torch.stack([is_shared.sum(), torch.full_like(is_shared.sum(), is_shared.numel())]).double()


def load_imbalance(logits: Tensor, chosen: Tensor) -> Tensor:
    """E sum_e f_e P_e: 1 with an even load, up to E with all tokens at one expert.

    f_e is the share of choices and P_e the mean probability of expert e (arXiv 2101.03961, section 2.2).
    Only P carries a gradient. With K choices of each token f adds up to 1, where transformers lets it add up to K.
    """
    num_experts = logits.shape[-1]
    shares = torch.zeros_like(logits[0], dtype=torch.float32)
    shares = shares.index_add(0, chosen.flatten(), shares.new_full((chosen.numel(),), 1 / chosen.numel()))
    return num_experts * (shares * softmax(logits, dim=-1, dtype=torch.float32).mean(0)).sum()


class _Balanced(torch.autograd.Function):
    """The weights unchanged; a loss beside the policy's, whose gradient joins in the backward pass.

    Inside a layer whose activations are computed again no loss could be handed out.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, *ctx.saved_tensors


def weigh_balance(model: PreTrainedModel, weight: float) -> None:
    """Sets the weight of the mean load_imbalance of all layers in the next passes' gradients."""
    layers = sparse_layers(model)
    for layer in layers:
        layer.mlp.balance_weight = weight / len(layers)


def grouped_linear(states: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows [N, out] of each expert's linear layer.

    Args:
        states: [N, in] sorted by expert.
        weight: [E, out, in].
        ends: [E] int32: expert e has the rows ends[e - 1] to ends[e].
    """
    if states.is_cuda and states.dtype in GROUPED_DTYPES:
        return grouped_mm(states, weight.transpose(1, 2), offs=ends)
    parts = states.tensor_split(ends[:-1].long().cpu())
    return torch.cat([linear(part, matrix) for part, matrix in zip(parts, weight, strict=True)])


class _Permuted(torch.autograd.Function):
    """Rows in another order; the gradient is gathered by the inverse, where indexing would add with atomics."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


class _Dispatched(torch.autograd.Function):
    """[T K, D]: each token's state once for each of its experts, sorted by expert; gradients are summed per token."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return states[order // top_k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


def mix_experts(states: Tensor, weights: Tensor, chosen: Tensor, experts: Any) -> Tensor:
    """[T, D]: weighted sum of the outputs of each token's experts.

    Args:
        states: [T, D].
        weights, chosen: [T, K] of choose_experts.
        experts: module with `gate_up_proj`, `down_proj` and `act_fn`, or one that LoRA wraps.
    """
    adapters = {}
    while hasattr(experts, "parameter_name"):  # peft's wrapper of one stacked parameter
        adapters[experts.parameter_name] = experts
        experts = experts.base_layer
    num_experts, top_k = len(experts.gate_up_proj), chosen.shape[1]
    by_expert, order = chosen.flatten().sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    numbers = torch.arange(num_experts, device=order.device)
    ends = torch.searchsorted(by_expert, numbers, right=True).to(torch.int32)  # without a GPU sync

    def project(rows: Tensor, name: str) -> Tensor:
        out = grouped_linear(rows, getattr(experts, name), ends)
        return out + _adapter_output(adapters[name], rows, ends) if name in adapters else out

    gate, up = project(_Dispatched.apply(states, order, inverse, top_k), "gate_up_proj").chunk(2, dim=-1)  # type: ignore[arg-type]
    out: Any = _Permuted.apply(project(experts.act_fn(gate) * up, "down_proj"), inverse, order)
    return (out.unflatten(0, (-1, top_k)) * weights.unsqueeze(-1)).sum(1)


def _adapter_output(wrapper: Any, rows: Tensor, ends: Tensor) -> Tensor | float:
    """scale B A x of each row's expert; 0 while adapters are disabled."""
    b, a, scale = wrapper.get_delta_factors(wrapper.active_adapters[0])  # [E, out, rank], [E, rank, in]
    # peft lays the experts' B side by side, and a grouped product wants each as a whole.
    return scale * grouped_linear(grouped_linear(rows, a, ends), b.contiguous(), ends) if scale else 0.0


def sparse_layers(model: PreTrainedModel) -> list[Any]:
    """The decoder layers with experts; none in a dense model."""
    return [layer for layer in decoder(model).layers if hasattr(layer.mlp, "experts")]


def route_packed(model: PreTrainedModel) -> None:
    """Replaces the forward pass of the layers with experts, in place; a row's layout brings experts to replay."""
    for layer in sparse_layers(model):
        device = layer.mlp.gate.weight.device
        layer.mlp.register_buffer("agreement", torch.zeros(2, dtype=torch.float64, device=device), persistent=False)
        layer.mlp.balance_weight = 0.0
        layer.forward = MethodType(_forward, layer)


def _forward(self: Any, hidden_states: Tensor, *, layout: GroupLayout, **inputs: Any) -> Tensor:
    """The layer's output [1, T, D]: attention, which may be linear, then experts."""
    mixer, states = _mixer(self), self.input_layernorm(hidden_states)
    attended = mixer(hidden_states=states, layout=layout, **inputs)
    residual = hidden_states + (attended[0] if isinstance(attended, tuple) else attended)
    states = self.post_attention_layernorm(residual)[0]
    logits = linear(states, self.mlp.gate.weight)
    replayed = None if layout.experts is None else layout.experts[:, mixer.layer_idx]
    if replayed is not None and self.training:
        self.mlp.agreement += count_agreement(logits.detach(), replayed)
    weights, chosen = choose_experts(logits, self.mlp.gate.top_k, replayed)
    if self.mlp.balance_weight and torch.is_grad_enabled():
        weights = _Balanced.apply(weights, self.mlp.balance_weight * load_imbalance(logits, chosen))  # type: ignore[arg-type]
    mixed = mix_experts(states, weights, chosen, self.mlp.experts)
    if hasattr(self.mlp, "shared_expert"):  # of all tokens, each with a weight of its own
        mixed = mixed + self.mlp.shared_expert_gate(states).sigmoid() * self.mlp.shared_expert(states)
    return residual + mixed.unsqueeze(0)


def _mixer(layer: Any) -> Any:
    """Attention of a decoder layer, or linear attention in its place."""
    return layer.linear_attn if hasattr(layer, "linear_attn") else layer.self_attn


def take_agreement(model: PreTrainedModel) -> tuple[float, float]:
    """Replayed choices of all passes in training mode since the last call that the policy would make too, and all."""
    counts = [layer.mlp.agreement for layer in sparse_layers(model)]
    total = torch.stack(counts).sum(0).tolist()
    for count in counts:
        count.zero_()
    return total[0], total[1]
