"""States of optimizers, adapters and generators come back from a checkpoint, also from one of an older form."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, inject_adapter_in_model
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from tests.support.optimizers import gradients, layer_and_optimizer, weights_of
from verl.distributed.checkpoint import ShardWriter, load_shards
from verl.distributed.optim import allocate_states, join_bits

AdamW = torch.optim.AdamW
BETAS = (0.8, 0.9), (0.7, 0.95)


def continued(layer, optimizer, number, num_steps=20):
    given = list(zip(gradients("gauss", 60, (16, 8)), gradients("drift", 60, (16,)), strict=True))
    for pair in given[number : number + num_steps]:
        for parameter, gradient in zip(layer.parameters(), pair, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [weights_of(optimizer, parameter) for parameter in layer.parameters()]


def test_a_restart_does_not_change_a_bit(tmp_path):
    layer, optimizer = layer_and_optimizer()
    continued(layer, optimizer, 0)
    writer = ShardWriter()
    writer.start(tmp_path / "actor", layer, optimizer)
    assert writer.fault(blocking=True) == ""
    other, fresh = layer_and_optimizer(seed=1)
    load_shards(tmp_path / "actor", other, fresh)
    assert all(map(torch.equal, continued(layer, optimizer, 20), continued(other, fresh, 20)))


def test_states_of_an_older_form_are_converted_and_said(tmp_path, capfd):
    layer, optimizer = layer_and_optimizer()
    exact = continued(layer, optimizer, 0)
    states = get_optimizer_state_dict(layer, optimizer)
    for name, weight in get_model_state_dict(layer).items():
        state = states["state"][name]
        rest = join_bits(weight, state.pop("low_bits")) - weight.float()
        state["compensation"] = rest.bfloat16()
    dcp.save({"model": get_model_state_dict(layer), "optimizer": states}, checkpoint_id=tmp_path / "actor")
    other, fresh = layer_and_optimizer(seed=1)
    load_shards(tmp_path / "actor", other, fresh)
    assert "they are of an older form" in capfd.readouterr().out
    for weight, old, wanted in zip(other.parameters(), layer.parameters(), exact, strict=True):
        torch.testing.assert_close(weight, old, rtol=2**-7, atol=0)  # halves may round to the other side
        torch.testing.assert_close(weights_of(fresh, weight), wanted, rtol=2**-16, atol=0)
        assert torch.equal(fresh.state[weight]["exp_avg_sq"], optimizer.state[old]["exp_avg_sq"])
        assert fresh.state[weight]["step"] == 20
    load_shards(tmp_path / "actor", other, None)


@pytest.mark.parametrize("unknown", ["amsgrad", "fused"])
def test_settings_and_states_of_older_versions_hinder_no_restart(tmp_path, unknown):
    """In float32 adamw_bf16 once had a compensation of its own, and fewer settings than AdamW."""
    layer, other = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16)
    optimizer, fresh = (
        AdamW(part.parameters(), lr=1e-4, betas=betas) for part, betas in zip((layer, other), BETAS, strict=True)
    )
    for owner in (optimizer, fresh):
        allocate_states(owner)
    layer(torch.ones(8)).sum().backward()
    optimizer.step()
    states = get_optimizer_state_dict(layer, optimizer)
    for state in states["state"].values():
        state["compensation"] = torch.zeros_like(state["exp_avg"])
    for group in states["param_groups"]:
        del group[unknown]
    dcp.save({"model": get_model_state_dict(layer), "optimizer": states}, checkpoint_id=tmp_path / "actor")
    load_shards(tmp_path / "actor", other, fresh)
    (group,) = fresh.param_groups
    assert group["betas"] == BETAS[0] and unknown in group and "compensation" not in fresh.state[other.weight]
    assert torch.equal(fresh.state[other.weight]["exp_avg"], optimizer.state[layer.weight]["exp_avg"])
    fresh.step()


def adapted():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    return inject_adapter_in_model(LoraConfig(r=1, target_modules=["0"], init_lora_weights=False), model)


def test_adapters_come_back_over_the_base_that_is_there(tmp_path):
    model, other = adapted(), adapted()
    base = other[0].base_layer.weight.detach().clone()
    writer = ShardWriter()
    writer.start(tmp_path, model, None)
    assert writer.fault(blocking=True) == ""
    load_shards(tmp_path, other, None)
    assert torch.equal(other[0].lora_B["default"].weight, model[0].lora_B["default"].weight)
    assert torch.equal(other[0].base_layer.weight, base) and not torch.equal(base, model[0].base_layer.weight)
