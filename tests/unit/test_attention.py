"""Attention put together from the kernels' calls, over plain float64 in the place of the kernels."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen  # noqa: F401  declares the kernels
from torch.utils.checkpoint import checkpoint

from verl.model import attention
from verl.model.attention import (
    _flash_shared,
    _padded_shared,
    backward_kernels,
    compile_backward,
    describe_attention,
    hopper_kernels,
)
from verl.model.checkpointing import CHECKPOINTING, save_outputs
from verl.model.packing import build_layout

HEADS, KEY_HEADS, SIZE = 4, 2, 8
calls = []


def scores(q, k, is_causal, scale):
    """[heads, queries, keys] of one sequence."""
    raw = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(HEADS // KEY_HEADS, 1)) * scale
    if is_causal:
        raw = raw.masked_fill(torch.ones(raw.shape[1:], dtype=torch.bool).triu(1), float("-inf"))
    return raw


def spans(ends_q, ends_k):
    pairs = zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist()), strict=True)
    return [(slice(*queries), slice(*keys)) for queries, keys in pairs]


def attend(q, k, v, ends_q, ends_k, max_q, max_k, is_causal=False, scale=None, window_size=None):
    calls.append("forward")
    assert (max_q, max_k) == (int(ends_q.diff().max()), int(ends_k.diff().max()))
    out, lse = torch.empty_like(q), q.new_empty(HEADS, len(q))
    for at, of in spans(ends_q, ends_k):
        raw = scores(q[at], k[of], is_causal, scale)
        lse[:, at] = raw.logsumexp(-1)
        out[at] = torch.einsum("hqk,khd->qhd", raw.softmax(-1), v[of].repeat_interleave(HEADS // KEY_HEADS, 1))
    return out, lse, torch.zeros(2, dtype=torch.uint64)


def attend_backward(
    grad, q, k, v, out, lse, ends_q, ends_k, max_q, max_k, is_causal, rng_state, scale=None, window_size=None
):
    """Flash attention's backward pass: probabilities from the normalizers that it is given, arXiv 2205.14135."""
    calls.append("backward")
    grad_q, grad_k, grad_v = (torch.zeros_like(states) for states in (q, k, v))
    repeats = HEADS // KEY_HEADS
    for at, of in spans(ends_q, ends_k):
        probs = (scores(q[at], k[of], is_causal, scale) - lse[:, at].unsqueeze(-1)).exp()
        towards = torch.einsum("qhd,khd->hqk", grad[at], v[of].repeat_interleave(repeats, 1))
        inner = (grad[at] * out[at]).sum(-1).T.unsqueeze(-1)
        of_scores = probs * (towards - inner) * scale
        grad_q[at] = torch.einsum("hqk,khd->qhd", of_scores, k[of].repeat_interleave(repeats, 1))
        for total, each in ((grad_k, (of_scores, q[at])), (grad_v, (probs, grad[at]))):
            per_head = torch.einsum("hqk,qhd->khd", *each)
            total[of] = per_head.unflatten(1, (KEY_HEADS, repeats)).sum(2)
    return grad_q, grad_k, grad_v


torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", attend)
torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", attend_backward)


def run(attend_shared, tensors, upstream, layout):
    inputs = [t.clone().requires_grad_() for t in tensors]
    out = attend_shared(*inputs, layout, SIZE**-0.5)
    out.backward(upstream)
    return [out.detach(), *(t.grad for t in inputs)]


def draw(num_tokens):
    """Queries, keys, values and the gradient of outputs."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(num_tokens, heads, SIZE, dtype=torch.float64, generator=generator)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    ]


@pytest.mark.parametrize("responses", [[[4, 3, 1], [9], [2, 6]], [[1], [5], [3]]])
def test_three_calls_give_what_masks_over_tables_give(responses):
    layout = build_layout([30, 1, 7], responses)
    *tensors, upstream = draw(38 + sum(map(sum, responses)))
    for got, wanted in zip(
        run(_flash_shared, tensors, upstream, layout), run(_padded_shared, tensors, upstream, layout), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("contexts", "num_forward"), [({}, 6), ({"context_fn": save_outputs()}, 3)])
def test_a_checkpoint_that_keeps_attention_does_not_repeat_it(contexts, num_forward):
    layout = build_layout([3], [[2, 2]])
    weight = torch.randn(8, (HEADS + 2 * KEY_HEADS) * SIZE, requires_grad=True)

    def layer(states):
        heads = (states @ weight).view(7, -1, SIZE)
        parts = heads.split([HEADS, KEY_HEADS, KEY_HEADS], dim=1)
        q, k, v = parts
        return _flash_shared(q, k, v, layout, SIZE**-0.5).sin()

    calls.clear()
    out: Any = checkpoint(layer, torch.randn(7, 8, requires_grad=True), **CHECKPOINTING, **contexts)
    out.sum().backward()
    assert calls == ["forward"] * num_forward + ["backward"] * 3


def hopper_forward(q, k, v, ends, longest, causal, scale):
    assert all(each.is_contiguous() for each in (q, k, v, *ends))
    calls.append("hopper")
    return attend(q, k, v, *ends, *longest, causal, scale)[:2]


def hopper_backward(grad, q, k, v, out, lse, ends, longest, causal, scale):
    assert all(each.is_contiguous() for each in (grad, q, k, v, out, lse, *ends))
    calls.append("hopper")
    return attend_backward(grad, q, k, v, out, lse, *ends, *longest, causal, None, scale)


@pytest.fixture
def put_kernels(monkeypatch):
    """Takes the place of Hopper's kernels, on a GPU that has them and with the versions that they are written for."""

    def put(backward=hopper_backward, sizes=(SIZE,)):
        fakes = SimpleNamespace(forward=hopper_forward, backward=backward, BACKWARD_SIZES=sizes)
        monkeypatch.setattr(attention, "hopper_kernels", lambda _: fakes)
        monkeypatch.setattr(attention, "has_flash", lambda *_: True)
        monkeypatch.setattr(attention, "is_usable", lambda _: True)
        backward_kernels.cache_clear()

    yield put
    backward_kernels.cache_clear()


DECODER = SimpleNamespace(num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, head_dim=SIZE)
LAYOUT = build_layout([4, 3], [[3, 1], [2]])


def test_hopper_kernels_compute_passes_with_and_without_gradients(put_kernels, capsys):
    put_kernels()
    assert compile_backward(torch.device("cpu"), torch.float64, DECODER)
    calls.clear()
    *tensors, upstream = draw(13)
    fast, exact = (run(shared, tensors, upstream, LAYOUT) for shared in (_flash_shared, _padded_shared))
    assert calls == ["hopper", "forward"] * 3 + ["hopper", "backward"] * 3
    for got, wanted in zip(fast, exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    calls.clear()
    torch.testing.assert_close(_flash_shared(*tensors, LAYOUT, SIZE**-0.5), exact[0])
    assert calls == ["hopper", "forward"] * 3
    assert not capsys.readouterr().out


def uncompiled(*_):
    raise RuntimeError("no compiler\nsecond line")


def wrong_queries(*arguments):
    grad_q, *others = hopper_backward(*arguments)
    return grad_q * 1.1, *others


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sizes": (64, 128)}, ""),
        ({"backward": uncompiled}, "RuntimeError: no compiler"),
        ({"backward": wrong_queries}, "gradients are others than torch's"),
    ],
)
def test_a_backward_pass_that_is_of_no_use_is_left_to_torch(change, reason, put_kernels, capsys):
    put_kernels(**change)
    *tensors, upstream = draw(13)
    assert not compile_backward(torch.device("cpu"), torch.float64, DECODER)
    for _ in range(2):
        calls.clear()
        run(_flash_shared, tensors, upstream, LAYOUT)
        assert calls == ["hopper", "forward"] * 3 + ["backward"] * 3
    said = capsys.readouterr().out
    assert said.count("\n") == bool(reason) and reason in said and "second line" not in said
    assert describe_attention(torch.device("cpu"), torch.float64, DECODER).endswith("gradients by torch)")


def test_the_description_names_the_kernels_of_gradients(put_kernels, monkeypatch):
    put_kernels()
    device = torch.device("cpu")
    said = describe_attention(device, torch.float64, DECODER)
    assert "FlashAttention 3" in said and said.endswith("gradients by FlashAttention 4)")
    monkeypatch.setattr(attention, "hopper_kernels", lambda _: None)
    assert describe_attention(device, torch.float64, DECODER) == "variable-length flash attention (torch)"


def test_no_package_is_asked_for_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(attention, "is_usable", lambda name: pytest.fail(name))
    hopper_kernels.cache_clear()
    backward_kernels.cache_clear()
    assert backward_kernels("cpu", torch.bfloat16, 16, 2, 128) is None
    assert not compile_backward(torch.device("cpu"), torch.bfloat16, DECODER)


def test_kernels_that_are_not_there_are_named_with_what_is_used_instead():
    said = describe_attention(torch.device("cpu"), torch.bfloat16, DECODER)
    assert "scaled dot-product attention over padded tables" in said and "no GPU" in said
