"""Linear attention: the chunked rule is the recurrence, and responses begin where their prompt ends."""

import pytest
import torch
from torch.nn.functional import silu

from tests.support.packed_rows import make_rows, packed_log_probs, packed_model
from tests.support.tiny_qwen import tiny_model
from verl.model import linear_attention
from verl.model.checkpointing import CHECKPOINTING
from verl.model.linear_attention import (
    CHUNK,
    causal_conv1d,
    chunk_gated_delta_rule,
    convolve_packed,
    delta_rule_packed,
    kernels_for,
    linear_layers,
)
from verl.model.packing import build_layout

HEADS, VALUE_HEADS, KEY, VALUE, CHANNELS, TAPS = 2, 4, 3, 5, 6, 4
PROMPTS, RESPONSES = [2, CHUNK + 7, 5], [[3, 1], [4, CHUNK + 1, 2], [6]]


def drawn(num_tokens, num_states=0, seed=0):
    """Queries, keys, values, decays, strengths and states in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    parts = [normal(1, num_tokens, HEADS, KEY), normal(1, num_tokens, HEADS, KEY)]
    parts += [normal(1, num_tokens, VALUE_HEADS, VALUE), -normal(1, num_tokens, VALUE_HEADS).exp()]
    parts += [normal(1, num_tokens, VALUE_HEADS).sigmoid()]
    parts += [normal(num_states, VALUE_HEADS, KEY, VALUE)] if num_states else []
    return [part.requires_grad_() for part in parts]


def token_by_token(q, k, v, g, beta, state):
    """The recurrence of one sequence, one token and one head after the other: outputs [L, V, D] and last state."""
    outputs, states = [], [*state]
    for t in range(q.shape[0]):
        row = []
        for head in range(VALUE_HEADS):
            query, key = (part[t, head // (VALUE_HEADS // HEADS)] for part in (q, k))
            query, key = (part / (part @ part + 1e-6).sqrt() for part in (query, key))
            old = g[t, head].exp() * states[head]
            states[head] = old + beta[t, head] * torch.outer(key, v[t, head] - key @ old)
            row.append(query @ states[head] / KEY**0.5)
        outputs.append(torch.stack(row))
    return torch.stack(outputs), torch.stack(states)


def gradients(outputs, inputs, seed=1):
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(out.shape, generator=generator, dtype=out.dtype) for out in outputs]
    return torch.autograd.grad(outputs, inputs, upstream)


def test_chunks_equal_the_recurrence_in_value_last_state_and_gradient():
    lengths = [1, CHUNK, CHUNK + 5, 3]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    parts = drawn(int(ends[-1]), len(lengths))
    out, states = chunk_gated_delta_rule(*parts[:5], cu_seqlens=ends, initial_state=parts[5], output_final_state=True)
    split = [part[0].split(lengths) for part in parts[:5]]
    pairs = [token_by_token(*each, state) for *each, state in zip(*split, parts[5], strict=True)]
    expected, last = torch.cat([pair[0] for pair in pairs]).unsqueeze(0), torch.stack([pair[1] for pair in pairs])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(states, last)
    for own, other in zip(gradients([out, states], parts), gradients([expected, last], parts), strict=True):
        torch.testing.assert_close(own, other)


def test_long_decays_neither_overflow_nor_divide_by_zero():
    q, k, v, g, beta = drawn(2 * CHUNK)
    parts = [part.detach().float().requires_grad_() for part in (q, k, v, 1000 * g, beta)]
    out, _ = chunk_gated_delta_rule(*parts, cu_seqlens=torch.tensor([0, 2 * CHUNK]))
    assert all(part.isfinite().all() for part in (out, *gradients([out], parts)))


def test_convolution_sums_each_channel_over_the_last_tokens_by_hand():
    x = torch.tensor([[[1.0], [2.0], [4.0], [8.0], [16.0]]])
    weight = torch.tensor([[1000.0, 100.0, 1.0]])
    before = torch.tensor([[[9.0, 3.0, 5.0]], [[0.0, 0.0, 7.0]]])
    ends = torch.tensor([0, 3, 5])
    out, _ = causal_conv1d(x, weight, cu_seqlens=ends, activation=None)
    assert out.flatten().tolist() == [1, 102, 1204, 8, 816]
    out, _ = causal_conv1d(x, weight, cu_seqlens=ends, initial_state=before, activation=None)
    assert out.flatten().tolist() == [3501, 5102, 1204, 708, 7816]
    assert torch.equal(
        causal_conv1d(x, weight, cu_seqlens=ends)[0], silu(torch.tensor([1.0, 102, 1204, 8, 816])).view(1, 5, 1)
    )


def repeated(parts):
    """Per response its prompt's tokens and its own, of each tensor [1, T, ...]."""
    starts = torch.tensor([0, *PROMPTS]).cumsum(0).tolist()
    rows, cursor = [], sum(PROMPTS)
    for group, lengths in enumerate(RESPONSES):
        for length in lengths:
            prompt = slice(starts[group], starts[group + 1])
            rows.append([torch.cat([part[:, prompt], part[:, cursor : cursor + length]], dim=1) for part in parts])
            cursor += length
    return rows


def packed_order(outputs):
    """The packed row of the outputs of `repeated`: each prompt from its first response, then all responses."""
    firsts = [sum(map(len, RESPONSES[:group])) for group in range(len(PROMPTS))]
    prompts = [outputs[first][:, :length] for first, length in zip(firsts, PROMPTS, strict=True)]
    groups = [length for length, rows in zip(PROMPTS, RESPONSES, strict=True) for _ in rows]
    return torch.cat([*prompts, *(out[:, length:] for out, length in zip(outputs, groups, strict=True))], dim=1)


@pytest.mark.parametrize("what", ["rule", "convolution"])
def test_forked_responses_equal_repeated_prompts_in_value_and_gradient(what):
    layout = build_layout(PROMPTS, RESPONSES)
    num_tokens = sum(PROMPTS) + sum(map(sum, RESPONSES))
    if what == "rule":
        parts = drawn(num_tokens)
        packed = delta_rule_packed(*parts, layout)
        outputs = [
            chunk_gated_delta_rule(*row, cu_seqlens=torch.tensor([0, row[0].shape[1]]))[0] for row in repeated(parts)
        ]
    else:
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(1, num_tokens, CHANNELS, generator=generator, dtype=torch.float64).requires_grad_()
        weight = torch.randn(CHANNELS, TAPS, generator=generator, dtype=torch.float64).requires_grad_()
        parts = [x, weight]
        packed = convolve_packed(x, weight, layout)
        outputs = [
            causal_conv1d(row[0], weight, cu_seqlens=torch.tensor([0, row[0].shape[1]]))[0] for row in repeated([x])
        ]
    expected = packed_order(outputs)
    torch.testing.assert_close(packed, expected)
    # On responses alone, so that a prompt counts once for each: what comes back to it is their sum.
    split = sum(PROMPTS)
    own = gradients([packed[:, split:]], parts)
    for mine, theirs in zip(own, gradients([expected[:, split:]], parts), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert own[what == "rule"][:, :split].abs().sum() > 0  # of keys or inputs


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5_moe_text"])
def test_groups_of_a_row_see_nothing_of_each_other(family):
    """With another prompt and other responses in the group between; experts multiply the rows of all together."""
    model, rows = packed_model(family), make_rows(family)
    assert len(linear_layers(model)) == 2
    with torch.no_grad():
        before, plan = packed_log_probs(model, rows, 1.0, 10_000, True)
        rows[0][1] = rows[0][1].flip(0)
        rows[2][1] = [response.flip(0) for response in rows[2][1]]
        after, _ = packed_log_probs(model, rows, 1.0, 10_000, True)
    assert len(plan) == 1
    counts = [sum(map(len, responses)) for responses in rows[2]]
    first, second, third = zip(before.split(counts), after.split(counts), strict=True)
    assert max(float((one - other).abs().max()) for one, other in (first, third)) < 2e-6
    assert (second[0] - second[1]).abs().max() > 1e-2


def test_recomputed_activations_give_the_same_gradients():
    found = []
    for is_recomputed in (False, True):
        model = packed_model("qwen3_5").train()
        if is_recomputed:
            model.gradient_checkpointing_enable(CHECKPOINTING)
        packed_log_probs(model, make_rows("qwen3_5"), 1.0, 10_000, True)[0].sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found)


def test_families_without_linear_attention_have_no_layers_to_replace():
    assert linear_layers(tiny_model(family="qwen3")) == []


def test_without_its_package_a_gpu_computes_in_torch(monkeypatch):
    monkeypatch.setattr(linear_attention, "is_usable", lambda name: name != "linear attention")
    linear_attention._fast_kernels.cache_clear()
    assert linear_attention._fast_kernels((8, 0)) == (chunk_gated_delta_rule, causal_conv1d)
    linear_attention._fast_kernels.cache_clear()


def test_what_hopper_lacks_is_named_before_minutes_of_compiling(monkeypatch, tmp_path):
    monkeypatch.setattr(linear_attention, "find_spec", lambda name: None)
    assert linear_attention._missing_for_hopper() == "the package tilelang"
    monkeypatch.setattr(linear_attention, "find_spec", lambda name: True)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert linear_attention._missing_for_hopper().startswith("CUDA's compiler nvcc: install CUDA's toolkit")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert linear_attention._missing_for_hopper() == ""


def test_a_cpu_computes_in_torch():
    assert kernels_for(torch.device("cpu"), torch.bfloat16) == (chunk_gated_delta_rule, causal_conv1d)
