"""Calls of vLLM's kernels for Hopper GPUs, with others in their place: the module is not loaded on other machines."""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

FILE = Path(__file__).parents[2] / "verl" / "model" / "kernels" / "hopper.py"
SETTINGS = ("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")
FORWARD, BACKWARD = "vllm.vllm_flash_attn.flash_attn_interface", "vllm.vllm_flash_attn.cute.interface"


@pytest.fixture
def calls(monkeypatch):
    """Calls of FlashAttention, by arguments and keywords, and what the environment then said of its folder."""
    calls = []

    def note(*arguments, **keywords):
        calls.append((arguments, keywords, [os.environ.get(name) for name in SETTINGS]))
        return "result"

    for path in (FORWARD, BACKWARD):
        parts = path.split(".")
        for number in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:number]), ModuleType(parts[number - 1]))
    monkeypatch.setattr(sys.modules[FORWARD], "flash_attn_varlen_func", note, raising=False)
    monkeypatch.setattr(sys.modules[BACKWARD], "_flash_attn_bwd", note, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    for name in SETTINGS:
        monkeypatch.setenv(name, "")  # so that what the module sets is taken back
        monkeypatch.delenv(name)
    return calls


def load():
    spec = spec_from_file_location("hopper_alone", FILE)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensors(number):
    return [torch.zeros(size) for size in range(number)]


def test_the_forward_pass_is_flash_attention_3(calls):
    q, k, v, ends_q, ends_k = tensors(5)
    assert load().forward(q, k, v, (ends_q, ends_k), (70, 500), True, 0.3) == "result"
    ((arguments, keywords, environment),) = calls
    assert arguments == (q, k, v, 70, ends_q, 500, ends_k) and environment == [None, None]
    wanted = {"softmax_scale": 0.3, "causal": True, "fa_version": 3, "num_splits": 1, "return_softmax_lse": True}
    assert keywords == wanted


@pytest.mark.parametrize(("longest", "told"), [((70, 500), (256, 500)), ((1000, 1), (1000, 256))])
def test_the_backward_pass_is_one_kernel_for_all_lengths(longest, told, calls):
    grad, q, k, v, out, lse, ends_q, ends_k = tensors(8)
    assert load().backward(grad, q, k, v, out, lse, (ends_q, ends_k), longest, False, None) == "result"
    ((arguments, keywords, _),) = calls
    assert [id(each) for each in arguments] == [id(each) for each in (q, k, v, out, grad, lse, None, False)]
    lengths = {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k, "max_seqlen_q": told[0], "max_seqlen_k": told[1]}
    assert keywords == lengths


def test_compiled_kernels_are_kept_in_a_folder(calls):
    arguments = (*tensors(6), (torch.zeros(1), torch.zeros(1)), (1, 1), True, None)
    load().backward(*arguments)
    assert calls[-1][2] == ["1", "/caches/spatialthinker/flash_attention"]


def test_a_folder_of_the_users_stays(calls, monkeypatch):
    arguments = (*tensors(6), (torch.zeros(1), torch.zeros(1)), (1, 1), True, None)
    for name, value in zip(SETTINGS, ("0", "/mine"), strict=True):
        monkeypatch.setenv(name, value)
    load().backward(*arguments)
    assert calls[-1][2] == ["0", "/mine"]


def test_a_package_that_is_missing_is_named_when_gradients_are_computed(calls, monkeypatch):
    monkeypatch.setitem(sys.modules, BACKWARD, None)
    kernels = load()
    kernels.forward(*tensors(3), (torch.zeros(1), torch.zeros(1)), (1, 1), True, None)
    with pytest.raises(ImportError, match="cute"):
        kernels.backward(*tensors(6), (torch.zeros(1), torch.zeros(1)), (1, 1), True, None)
