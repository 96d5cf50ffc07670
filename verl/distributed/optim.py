"""Optimizers: torch's AdamW, and AdamW with Kahan summation for parameters in bfloat16; access to sharded states."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from verl.config.records import OptimConfig


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, in the same memory; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class KahanAdamW(Optimizer):
    """AdamW whose moments and compensation have the parameters' own dtype.

    p <- p (1 - lr wd); m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2;
    c <- c - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps); p' <- round(p + c); c <- c + (p - p').
    At lr 1e-6 almost every update is below bfloat16's spacing at p; c accumulates it until it is not.
    On a GPU a fused kernel computes in float32 and rounds only stored values; elsewhere each operation rounds.
    AdamW: https://arxiv.org/abs/1711.05101, algorithm 2; compensation: Kahan 1965, as used in
    https://arxiv.org/abs/2010.06192, section 4.

    Args:
        params: parameters or groups of them.
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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Applies the gradients; skips parameters without one."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    for key in ("exp_avg", "exp_avg_sq", "compensation"):
                        state[key] = torch.zeros_like(p)
                state["step"] += 1
            self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        states = [self.state[p] for p in params]
        values = [local_part(p) for p in params]
        gradients = [local_part(p.grad) for p in params if p.grad is not None]
        keys = ("exp_avg", "exp_avg_sq", "compensation")
        mean, square, compensation = ([local_part(state[key]) for state in states] for key in keys)
        beta1, beta2 = group["betas"]
        step = int(states[0]["step"])
        if values[0].is_cuda:
            from verl.model.kernels.optim import update

            settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            for tensors in zip(values, gradients, mean, square, compensation, strict=True):
                update(*tensors, step=step, **settings)
            return
        torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(mean, gradients, 1 - beta1)
        torch._foreach_mul_(square, beta2)
        torch._foreach_addcmul_(square, gradients, gradients, 1 - beta2)
        denominator = torch._foreach_sqrt(square)
        torch._foreach_div_(denominator, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(compensation, mean, denominator, -group["lr"] / (1 - beta1**step))
        before = [value.clone() for value in values]
        torch._foreach_add_(values, compensation)
        torch._foreach_sub_(before, values)
        torch._foreach_add_(compensation, before)


OPTIMIZERS: dict[str, Any] = {"adamw": torch.optim.AdamW, "adamw_bf16": KahanAdamW}


def build_optimizer(model: nn.Module, optim: OptimConfig) -> Optimizer:
    """The configured optimizer over the model's trainable parameters."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return OPTIMIZERS[optim.strategy](trainable, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)


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
