"""Log-probs in chunks equal the ones of whole logits, in value and gradient; so do the GPU's kernels, interpreted."""

import subprocess
import sys

import pytest
import torch

from verl.model import log_probs
from verl.model.log_probs import full_divergence, response_log_probs

N, D, V, TEMPERATURE = 7, 6, 11, 0.7


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, V, (N,), generator=generator)
    return hidden, weight, targets, torch.randn(N, generator=generator)


@pytest.mark.parametrize("banned", [None, torch.tensor([0, V - 1])])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_chunks_equal_the_whole(case, rows, banned, monkeypatch):
    hidden, weight, targets, upstream = case
    monkeypatch.setattr(log_probs, "LOGIT_CHUNK_BYTES", rows * V * 8)
    logits = hidden @ weight.T
    if banned is not None:
        targets = targets.clamp(1, V - 2)
        logits = logits + torch.zeros(V, dtype=torch.float64).index_fill(0, banned, -100.0)
    whole = (logits / TEMPERATURE).log_softmax(-1)
    expected = whole.gather(1, targets.unsqueeze(1)).squeeze(1)
    gradients = torch.autograd.grad((expected * upstream).sum(), (hidden, weight))
    values, entropies = response_log_probs(hidden, weight, targets, TEMPERATURE, banned)
    actual = torch.autograd.grad((values * upstream).sum(), (hidden, weight))
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropies.double(), -(whole.exp() * whole).sum(-1), rtol=1e-5, atol=1e-6)
    for got, wanted in zip(actual, gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_hand_worked():
    """Two tokens with logits (0, ln 3): probabilities 1/4 and 3/4."""
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [3.0]]).log().nan_to_num(neginf=0.0)
    values, entropies = response_log_probs(hidden, weight, torch.tensor([1]), 1.0)
    assert values.item() == pytest.approx(-0.287682, abs=1e-6)
    assert entropies.item() == pytest.approx(0.562335, abs=1e-6)


def test_a_token_that_is_never_sampled_is_no_part_of_the_distribution():
    """Logits (0, ln 3, ln 4) without the last: 1/4 and 3/4 as above, and nothing pulls at the last one."""
    hidden = torch.tensor([[1.0]])
    weight = torch.tensor([[1.0], [3.0], [4.0]]).log().requires_grad_()
    values, _ = response_log_probs(hidden, weight, torch.tensor([1]), 1.0, torch.tensor([2]))
    assert values.item() == pytest.approx(-0.287682, abs=1e-6)
    values.sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[-0.25], [0.25], [0.0]]))
    distribution = hidden, weight.detach()
    other = torch.tensor([[1.0], [3.0], [9.0]]).log()  # differs in the banned token alone
    assert full_divergence(*distribution, hidden, other, 1.0, torch.tensor([2])).abs().max() < 1e-6
    assert full_divergence(*distribution, hidden, other, 1.0).item() > 0.01


def test_a_frozen_output_embedding_gets_no_gradient(case):
    hidden, weight, targets, upstream = case
    weight.requires_grad_(False)
    values, _ = response_log_probs(hidden, weight, targets, TEMPERATURE)
    (values * upstream).sum().backward()
    assert weight.grad is None and hidden.grad is not None


KERNELS = """
import torch
from verl.model import log_probs
torch.manual_seed(0)
logits = torch.randn(3, 9000) * 4
targets, grad = torch.tensor([0, 8191, 8999]), torch.randn(3)
expected = log_probs._score_torch(logits, targets, 0.7)
actual = log_probs._score_triton(logits, targets, 0.7)
for a, e in zip(actual, expected):
    torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
one, two = logits.clone(), logits.clone()
log_probs._differentiate_torch(one, targets, expected[2], grad, 0.7)
log_probs._differentiate_triton(two, targets, expected[2], grad, 0.7)
torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
"""


def test_kernels_equal_torch_when_interpreted():
    pytest.importorskip("triton")
    environment = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KERNELS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
