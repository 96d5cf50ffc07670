"""The Triton kernels in Triton's own interpreter, on a CPU.

TRITON_INTERPRET=1 python -m tests.support.triton_kernels
"""

import torch
from torch.testing import assert_close

from verl.model.attention import _merge
from verl.model.kernels import attention, optim
from verl.model.log_probs import _differentiate_torch, _differentiate_triton, _score_torch, _score_triton

VOCABULARY = 9_001  # more than one block, and no multiple of anything


def check_merge() -> None:
    for shape in ((70, 4, 8), (33, 2, 80)):
        seen, own = torch.randn(2, *shape)
        lses = 5 * torch.randn(2, shape[1], shape[0])
        whole, expected = torch.zeros(shape[0] + 3, *shape[1:]), torch.empty(shape)
        lse = attention.merge(seen, lses[0], own, lses[1], whole[3:])
        assert_close(lse, _merge(seen, lses[0], own, lses[1], expected))
        assert_close(whole[3:], expected)
        assert not whole[:3].any()


def check_log_probs() -> None:
    logits, targets = 3 * torch.randn(5, VOCABULARY), torch.randint(0, VOCABULARY, (5,))
    scores = _score_torch(logits, targets, 0.7)
    for got, wanted in zip(_score_triton(logits, targets, 0.7), scores, strict=True):
        assert_close(got, wanted, rtol=1e-5, atol=5e-5)  # sums of 9,001 in another order
    grad, expected = torch.randn(5), logits.clone()
    _differentiate_torch(expected, targets, scores[2], grad, 0.7)
    _differentiate_triton(logits, targets, scores[2], grad, 0.7)
    assert_close(logits, expected, rtol=1e-5, atol=1e-7)


def check_kahan_adamw() -> None:
    """Values and what is carried add up to AdamW in float64, with moments rounded as the kernel rounds them."""
    settings = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    value = torch.randn(optim.BLOCK + 77).bfloat16()
    mean, square, carried = (torch.zeros_like(value) for _ in range(3))
    exact = value.double()
    for step in range(1, 21):
        gradient = torch.randn(len(value)).bfloat16()
        m = 0.9 * mean.double() + 0.1 * gradient.double()
        v = 0.99 * square.double() + 0.01 * gradient.double() ** 2
        exact = exact * (1 - 1e-4) - 1e-3 / (1 - 0.9**step) * m / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
        optim.update(value, gradient, mean, square, carried, step=step, **settings)
        assert_close(mean, m.bfloat16(), rtol=2**-7, atol=1e-6)
        assert_close(square, v.bfloat16(), rtol=2**-7, atol=1e-6)
    # The interpreter cuts off where a GPU rounds: 20 times the last bit of what is carried, of 0.02 that they moved.
    assert_close(value.double() + carried.double(), exact, rtol=0, atol=2e-3)


if __name__ == "__main__":
    torch.manual_seed(0)
    check_merge()
    check_log_probs()
    check_kahan_adamw()
