"""Experts: the router's choice, a replayed one, and grouped products that equal one product per token."""

from types import SimpleNamespace

import pytest
import torch

from tests.support.packed_rows import make_rows, packed_model
from tests.support.tiny_qwen import tiny_model
from verl.model import experts
from verl.model.checkpointing import CHECKPOINTING
from verl.model.experts import (
    choose_experts,
    count_agreement,
    grouped_linear,
    load_imbalance,
    mix_experts,
    sparse_layers,
    take_agreement,
    weigh_balance,
)
from verl.model.packing import pack, plan_micro_batches
from verl.model.qwen_vl import ResponseLogProbs

FAMILY, LAYERS, TOP_K, NUM_EXPERTS = "qwen3_vl_moe", 3, 2, 8


def test_weights_of_the_likeliest_experts_add_up_to_one():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]]).log()
    logits[1, :2] = torch.tensor([2.0, 3.0]).log()
    weights, chosen = choose_experts(logits, 2)
    assert chosen.tolist() == [[1, 2], [2, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.6, 0.4], [0.625, 0.375]]))


def test_replayed_experts_are_weighed_by_this_router():
    logits = torch.tensor([[1.0, 3.0, 2.0]]).log().requires_grad_()
    weights, chosen = choose_experts(logits, 2, torch.tensor([[0, 1]], dtype=torch.uint8))
    assert chosen.tolist() == [[0, 1]]
    torch.testing.assert_close(weights.detach(), torch.tensor([[0.25, 0.75]]))
    weights[0, 0].backward()  # d w0 / d logits = w0 (1 - w0) and its negative; others do not count
    torch.testing.assert_close(logits.grad, torch.tensor([[0.1875, -0.1875, 0.0]]))


def test_agreement_counts_replayed_experts_in_any_order():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    assert count_agreement(logits, torch.tensor([[1, 0], [1, 3]])).tolist() == [3, 4]


def drawn(num_tokens=20, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    module = SimpleNamespace(
        gate_up_proj=normal(NUM_EXPERTS, 2 * 6, 5),
        down_proj=normal(NUM_EXPERTS, 5, 6),
        act_fn=torch.nn.functional.silu,
    )
    chosen = torch.stack([torch.randperm(NUM_EXPERTS - 1, generator=generator)[:TOP_K] for _ in range(num_tokens)])
    return normal(num_tokens, 5), normal(num_tokens, TOP_K), chosen, module  # the last expert has no token


def one_by_one(states, weights, chosen, module):
    """The same for one token and one expert after the other."""
    rows = []
    for state, own, numbers in zip(states, weights, chosen, strict=True):
        row = torch.zeros_like(state)
        for weight, number in zip(own, numbers, strict=True):
            gate, up = (module.gate_up_proj[number] @ state).chunk(2)
            row = row + weight * (module.down_proj[number] @ (torch.nn.functional.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def grouped_product(states, weight, ends):
    """Torch's grouped product in its own layout, as on a GPU."""
    return torch.nn.functional.grouped_mm(states, weight.transpose(1, 2), offs=ends)


@pytest.mark.parametrize("num_tokens", [1, 20])
def test_experts_equal_one_product_for_each_token_in_value_and_gradient(num_tokens):
    parts, again = drawn(num_tokens), drawn(num_tokens)
    expected, actual = one_by_one(*parts), mix_experts(*again)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for out in (expected, actual):
        out.backward(upstream)
    for own, other in ((parts[0], again[0]), (parts[1], again[1])):
        torch.testing.assert_close(other.grad, own.grad)
    for name in ("gate_up_proj", "down_proj"):
        torch.testing.assert_close(getattr(again[3], name).grad, getattr(parts[3], name).grad)


def test_torchs_grouped_product_is_the_loop_over_experts():
    """In bf16, which it wants; widths and rows are multiples of 16 bytes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 24, 16, generator=generator).bfloat16().requires_grad_()
    states = torch.randn(30, 16, generator=generator).bfloat16().requires_grad_()
    ends = torch.tensor([3, 3, 20, 30], dtype=torch.int32)
    upstream = torch.randn(30, 24, generator=generator).bfloat16()
    found = []
    for product in (grouped_linear, grouped_product):
        out = product(states, weight, ends)
        found.append(
            [out.detach().float(), *(g.float() for g in torch.autograd.grad(out, [states, weight], upstream))]
        )
    for loop, grouped in zip(*found, strict=True):
        torch.testing.assert_close(grouped, loop, rtol=2e-2, atol=2e-2)


def rows_with_experts(choose):
    """Rows of three groups, and experts [P + sum of R, layers, K] of each."""
    rows = make_rows(FAMILY)
    lengths = [len(prompt) + sum(map(len, responses)) for prompt, responses in zip(rows[0], rows[2], strict=True)]
    return rows, [choose(length) for length in lengths]


def log_probs(model, rows, chosen, max_tokens=10_000, shared_prompt=True):
    prompts, positions, responses, images, grids, pixels = rows
    lengths = [[len(r) for r in rs] for rs in responses]
    out = []
    for pieces in plan_micro_batches([len(p) for p in prompts], lengths, max_tokens, shared_prompt):
        batch = pack(pieces, prompts, positions, responses, images, chosen)
        shown = list(dict.fromkeys(batch.image_ids)) or [0]
        pixel_values = torch.cat([pixels[i] for i in shown])
        out.append(ResponseLogProbs(model)(batch, pixel_values, [grids[i] for i in shown], 0.7)[0])
    return torch.cat(out)


def drawn_experts(seed):
    generator = torch.Generator().manual_seed(seed)

    def choose(length):
        return torch.rand(length, LAYERS, NUM_EXPERTS, generator=generator).topk(TOP_K).indices.to(torch.uint8)

    return choose


@torch.no_grad()
def own_choice(model, rows):
    """Choice of the model itself for one group of one response, as experts to replay."""
    found = {}

    def record(logits, top_k, replayed=None):
        weights, chosen = choose_experts(logits, top_k, replayed)
        found[len(found)] = chosen
        return weights, chosen

    experts.choose_experts, kept = record, experts.choose_experts
    try:
        log_probs(model, rows, None)
    finally:
        experts.choose_experts = kept
    dense = torch.zeros_like(found[0])
    return [torch.stack([found[0], dense, found[1]], dim=1).to(torch.uint8)]  # layer 1 has no experts


def test_the_models_own_choice_replayed_changes_nothing_and_another_does():
    rows = [part[:1] for part in make_rows(FAMILY)]
    model = packed_model(FAMILY)
    expected = log_probs(model, rows, None)
    model.train()
    own = own_choice(model, rows)
    torch.testing.assert_close(log_probs(model, rows, own), expected, rtol=1e-6, atol=1e-6)
    hits, total = take_agreement(model)
    assert hits == total == own[0].shape[0] * 2 * TOP_K
    other = log_probs(model, rows, [drawn_experts(1)(len(own[0]))])
    assert (other - expected).abs().max() > 1e-2
    hits, total = take_agreement(model)
    assert 0 < hits < total
    assert take_agreement(model) == (0, 0)


@pytest.mark.parametrize(("max_tokens", "shared_prompt"), [(1, True), (60, True), (60, False)])
def test_replay_follows_its_tokens_into_every_micro_batch(max_tokens, shared_prompt):
    rows, chosen = rows_with_experts(drawn_experts(2))
    model = packed_model(FAMILY)
    whole = log_probs(model, rows, chosen)
    torch.testing.assert_close(log_probs(model, rows, chosen, max_tokens, shared_prompt), whole, rtol=1e-5, atol=1e-5)


def test_recomputed_activations_take_the_same_experts():
    rows, chosen = rows_with_experts(drawn_experts(3))
    gradients = []
    for is_recomputed in (False, True):
        model = packed_model(FAMILY).train()
        if is_recomputed:
            model.gradient_checkpointing_enable(CHECKPOINTING)
        log_probs(model, rows, chosen).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


def test_a_dense_model_has_no_layers_to_route():
    assert sparse_layers(tiny_model(family="qwen3")) == []
    assert [layer.self_attn.layer_idx for layer in sparse_layers(tiny_model(family=FAMILY))] == [0, 2]


def test_the_imbalance_is_one_when_even_and_the_number_of_experts_when_all_are_sent_to_one():
    even, one = torch.zeros(4, 4), torch.full((4, 4), -1e4)
    one[:, 2] = 0
    assert float(load_imbalance(even, torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]]))) == pytest.approx(1)
    assert float(load_imbalance(one, torch.full((4, 1), 2))) == pytest.approx(4)


@pytest.mark.parametrize("is_recomputed", [False, True])
def test_the_balancing_loss_adds_its_gradient_and_nothing_else(is_recomputed):
    """Against the difference quotient of the mean imbalance in a router's weight, on top of the policy's gradient."""
    rows = make_rows(FAMILY)
    gradients = []
    for weight in (0.0, 0.5):
        model = packed_model(FAMILY).train()
        if is_recomputed:
            model.gradient_checkpointing_enable(CHECKPOINTING)
        weigh_balance(model, weight)
        values = log_probs(model, rows, None)
        values.sum().backward()
        gradients.append((values.detach(), model.model.language_model.layers[2].mlp.gate.weight.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    added = gradients[1][1] - gradients[0][1]

    @torch.no_grad()
    def imbalance(shift):
        model, found = packed_model(FAMILY), []
        gate = model.model.language_model.layers[2].mlp.gate
        gate.weight += shift
        watch = model.model.language_model.layers[2].post_attention_layernorm
        watch.register_forward_hook(lambda _, __, states: found.append(states[0] @ gate.weight.T))
        log_probs(model, rows, None)
        return load_imbalance(found[0], choose_experts(found[0], TOP_K)[1])

    direction = added / added.norm()
    quotient = (imbalance(1e-3 * direction) - imbalance(-1e-3 * direction)) / 2e-3
    assert float((added * direction).sum()) == pytest.approx(0.5 / 2 * float(quotient), rel=2e-2)  # of two layers
