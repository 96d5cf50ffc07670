"""The Triton kernels in Triton's own interpreter, on a CPU.

TRITON_INTERPRET=1 python -m tests.support.triton_kernels
"""

import torch
from torch.testing import assert_close

from verl.distributed.optim import _update, join_bits
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
    """Results of the step without the kernel, to the last bit of float32, for a tensor and for two shards of it."""
    settings = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    value = torch.randn(optim.BLOCK + 78).bfloat16()
    whole, expected = ([value.clone(), *torch.zeros(3, len(value)).bfloat16()] for _ in range(2))
    for step in range(1, 21):
        gradient = (torch.randn(len(value)) * 10 ** torch.randn(len(value))).bfloat16()
        _update(expected[0], gradient, *expected[1:], first=0, step=step, **settings)
        for first in (0, len(value) // 2):
            p, g, *states = (t[first:][: len(value) // 2] for t in (whole[0], gradient, *whole[1:]))
            optim.update(p, g, *states, first=first, step=step, **settings)
        weights, wanted = (join_bits(tensors[0], tensors[3]) for tensors in (whole, expected))
        assert_close(weights, wanted, rtol=2**-22, atol=0)
        for got, moment in zip(whole[1:3], expected[1:3], strict=True):
            assert (got == moment).float().mean() > 0.99
            assert_close(got, moment, rtol=2**-7, atol=0)
    assert (value != whole[0]).float().mean() > 0.1


if __name__ == "__main__":
    torch.manual_seed(0)
    check_merge()
    check_log_probs()
    check_kahan_adamw()
