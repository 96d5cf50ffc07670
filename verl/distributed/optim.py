"""Optimizers: torch's AdamW, and AdamW for weights in bfloat16 with the rest of their float32 value beside them.

Letters: w weight, g gradient, m and v moments, t steps of the parameter.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from verl.config.records import OptimConfig

STRIDES = (3518319155, 2654435769, 2360945575)
"""Steps of the thresholds of m, v and w, in 2^-32: low-discrepancy sequences, which have half the error of random
thresholds where a value keeps falling. 0.618, the golden ratio's, has the least error of v."""
UINT32 = 0xFFFFFFFF
LOW_BITS = "low_bits"


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, in the same memory; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class KahanAdamW(Optimizer):
    """AdamW for weights in bfloat16, computed in float32, with 6 bytes of states per weight.

    m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2;
    w <- w - (lr wd w + lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)).
    AdamW: https://arxiv.org/abs/1711.05101, algorithm 2. The parameter is w rounded to bfloat16. `low_bits`, the last
    16 bits of w, are what this rounding cut off, so that no update is lost: Kahan summation as in
    https://arxiv.org/abs/2010.06192, section 4, with an exact compensation.
    m and v are stored in bfloat16. They and w are rounded stochastically, or v could not decay by a thousandth, nor w
    by less than float32's spacing. Thresholds follow from the element and t alone: a resumed run and another number
    of ranks round alike.

    Args:
        params: parameters in bfloat16, or groups of them.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for p in (p for group in self.param_groups for p in group["params"]):
            assert p.dtype == torch.bfloat16, f"KahanAdamW is for weights in bfloat16, got {p.dtype}"

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Applies the gradients; skips parameters without one."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            params = [p for p in group["params"] if p.grad is not None]
            update = _update
            if not params:
                continue
            if params[0].is_cuda:
                from verl.model.kernels.optim import update
            for p in params:
                if not self.state[p]:
                    # Bits too are of the parameter's type: Optimizer.load_state_dict casts every state to it.
                    self.state[p] |= {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq", LOW_BITS)}
                    self.state[p]["step"] = torch.zeros((), dtype=torch.float32)
            states = [self.state[p] for p in params]
            torch._foreach_add_([state["step"] for state in states], 1)
            for p, state in zip(params, states, strict=True):
                tensors = [local_part(t) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"], state[LOW_BITS])]
                update(*tensors, first=_first_index(p), step=int(state["step"]), **settings)


def _first_index(tensor: Tensor) -> int:
    """Index in the full tensor of this rank's first element; FSDP cuts along the first dimension."""
    if not isinstance(tensor, DTensor) or not tensor.dim():
        return 0
    num_rows, mesh = tensor.shape[0], tensor.device_mesh
    return min(-(-num_rows // mesh.size()) * mesh.get_local_rank(), num_rows) * tensor.shape[1:].numel()


def _update(
    value: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    low_bits: Tensor,
    *,
    first: int,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Updates all but the gradient in place, as the kernel does on a GPU."""
    beta1, beta2 = betas
    thresholds = _thresholds(first, value.shape, step)
    g, w = gradient.float(), join_bits(value, low_bits)
    m = beta1 * mean.float() + (1 - beta1) * g
    v = beta2 * square.float() + (1 - beta2) * g * g
    correction = (1 - beta2**step) ** 0.5
    step_size = correction * lr / (1 - beta1**step)
    change = -(lr * weight_decay * w + step_size * m / (v.sqrt() + correction * eps))
    mean.copy_(_round_to_bf16(m, thresholds[0]))
    square.copy_(_round_to_bf16(v, thresholds[1]))
    split_bits(_add_rounded(w, change, thresholds[2]), value, low_bits)


def _thresholds(first: int, shape: torch.Size, step: int) -> list[Tensor]:
    """Numbers below 2^32 per element and stride: a hash of the element's index, moved on by a stride per step."""
    h = torch.arange(first, first + shape.numel()).reshape(shape) * 0x9E3779B1 & UINT32
    h = (h ^ h >> 15) * 0x85EBCA77
    return [h + step * stride & UINT32 for stride in STRIDES]


def _round_to_bf16(values: Tensor, thresholds: Tensor) -> Tensor:
    return ((values.view(torch.int32) + (thresholds >> 16).int()) & -0x10000).view(torch.float32)


def _add_rounded(w: Tensor, change: Tensor, thresholds: Tensor) -> Tensor:
    """w + change, rounded to float32 stochastically; 2Sum (Knuth 1969) gives what rounding to nearest cut off."""
    total = w + change
    back = total - w
    error = (w - (total - back)) + (change - back)
    toward = torch.where((error > 0) == (total > 0), 1, -1).int()
    neighbour = (total.view(torch.int32) + toward).view(torch.float32)
    is_moved = thresholds.float() * 2**-32 * (neighbour - total).abs() < error.abs()
    return torch.where(is_moved, neighbour, total)


def join_bits(value: Tensor, low_bits: Tensor) -> Tensor:
    """The float32 weights of which `value` is the rounded part."""
    return ((value.view(torch.int16).int() << 16) + low_bits.view(torch.int16)).view(torch.float32)


def split_bits(exact: Tensor, value: Tensor, low_bits: Tensor) -> None:
    """Splits float32 weights into `value`, rounded to nearest, and the signed rest of their bits."""
    bits = exact.view(torch.int32)
    value.copy_(((bits + 0x8000) & -0x10000).view(torch.float32))
    low_bits.view(torch.int16).copy_(bits.to(torch.int16))


OPTIMIZERS: dict[str, Any] = {"adamw": torch.optim.AdamW, "adamw_bf16": KahanAdamW}


def build_optimizer(model: nn.Module, optim: OptimConfig) -> Optimizer:
    """The configured optimizer over the model's trainable parameters; in float32 adamw_bf16 is adamw."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_bf16 = all(parameter.dtype == torch.bfloat16 for parameter in trainable)
    kind = OPTIMIZERS[optim.strategy if is_bf16 else "adamw"]
    return kind(trainable, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)


OLD_STATE = "compensation"
"""State in place of low_bits in older checkpoints: w minus the parameter, rounded to bfloat16."""


def rename_states(states: dict[str, Any], old: str, new: str) -> None:
    """Renames a state of every parameter."""
    for state in states.values():
        state[new] = state.pop(old)


def convert_compensation(states: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Turns compensations that were loaded as low_bits into those, in place; both by parameter name."""
    for name, state in states.items():
        value, low_bits = local_part(weights[name]), local_part(state[LOW_BITS])
        split_bits(value.float() + low_bits.float(), value, low_bits)


def allocate_states(optimizer: Optimizer) -> None:
    """Allocates the optimizer states before the first pass, by a step with learning rate 0 that is not counted.

    States allocated after a pass would fragment the cached memory that it freed, so that the cache could not be
    returned to the engine on the same GPU.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        state["step"].zero_()


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """Optimizer state tensors per parameter, without step counters, which are on the CPU."""
    return [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
