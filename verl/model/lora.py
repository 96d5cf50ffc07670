"""LoRA adapters: added to a model, disabled for the reference, merged into full weights, saved in peft's format.

W' = W + alpha / rank * B A with A [rank, in] and B [out, rank], B = 0 at the start: https://arxiv.org/abs/2106.09685,
section 4.1. Only A and B are trained, so the model without adapters is the reference policy.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from verl.config.records import AdapterConfig, ConfigError
from verl.model.families import model_class, read_config

ADAPTER = "default"  # peft's name of the only adapter
ALL_LINEAR = "all-linear"
ADAPTER_FOLDER = "lora_adapter"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SAVED_PREFIX = "base_model.model."  # prefix of the model's names in that file
BASE_LAYER = ".base_layer"  # in peft's names of wrapped weights
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def add_adapters(model: PreTrainedModel, config: AdapterConfig, dtype: torch.dtype, seed: int) -> None:
    """Adds trainable adapters of the given dtype to the model and freezes everything else.

    Raises:
        ConfigError: target_modules matches no linear layer, or the output head.
    """
    names = config.target_modules.strip()
    targets = names if names == ALL_LINEAR else [name.strip() for name in names.split(",")]
    key = f"worker.actor.model.lora.target_modules = {config.target_modules!r}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # A is random and must be the same on every rank
        try:
            model.add_adapter(
                LoraConfig(
                    r=config.rank,
                    lora_alpha=config.alpha,
                    target_modules=targets,
                    exclude_modules=config.exclude_modules,
                    target_parameters=EXPERTS if config.experts else None,
                )
            )
        except ValueError as error:
            raise ConfigError([f"{key}: {error}"]) from error
    for name, layer in adapted_layers(model):
        if isinstance(layer, ParamWrapper):
            continue
        if not isinstance(layer.get_base_layer(), nn.Linear) or layer is model.get_output_embeddings():
            raise ConfigError([f"{key}: {name} cannot carry an adapter; name linear layers inside the blocks"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Name and module of each layer with an adapter."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def has_adapters(model: nn.Module) -> bool:
    """True when any layer has an adapter."""
    return next(adapted_layers(model), None) is not None


def is_adapter(name: str) -> bool:
    """True for the name of an adapter weight in a state dict."""
    return ".lora_A." in name or ".lora_B." in name


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Context in which the adapters are disabled: the model is the base model.

    Sets their scale to 0: peft's own switch would also set requires_grad, which a sharded model does not recover.
    """
    layers = [layer for _, layer in adapted_layers(model)]
    for layer in layers:
        layer.set_scale(ADAPTER, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(ADAPTER, 1.0)


def merged_weights(model: nn.Module, gather: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names, as of the base model, and full tensors with adapters merged in float32.

    Args:
        gather: returns the full tensor; called for every tensor in the same order on all ranks.
    """
    layers = {
        f"{name.replace(BASE_LAYER, '')}.{getattr(layer, 'parameter_name', 'weight')}": layer
        for name, layer in adapted_layers(model)
    }
    for name, value in model.state_dict().items():
        plain = name.replace(BASE_LAYER, "")
        if plain in layers and not is_adapter(name):
            layer = layers[plain]
            a, b = (gather(cast(Tensor, part[ADAPTER].weight)) for part in (layer.lora_A, layer.lora_B))
            whole = gather(value)
            yield plain, _merge(whole, *_unstack(whole, a, b), layer.scaling[ADAPTER])
        elif not is_adapter(name):
            yield plain, gather(value)


def _unstack(weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of a layer; of stacked experts [E, rank, in] and [E, out, rank], which peft lays side by side."""
    if weight.dim() == 2:
        return a, b
    return a.unflatten(0, (len(weight), -1)), b.unflatten(1, (-1, len(weight))).permute(2, 0, 1)


def _merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale B A; in bfloat16 rounded stochastically, by the same thresholds on every rank and in every step.

    Rounding to nearest gives the base back where the change is below half of bfloat16's spacing: after 1, 4 and 20
    updates at 1e-6, 1, 3 and 16 % of the change of log-probs are left, and all of it when rounded stochastically.
    """
    exact = (b.float() @ a.float()).mul_(scale).add_(weight)  # in place: float32 of a large layer is much
    if weight.dtype != torch.bfloat16:
        return exact.to(weight.dtype)
    generator = torch.Generator(exact.device).manual_seed(0)
    thresholds = torch.randint(1 << 16, exact.shape, generator=generator, dtype=torch.int32, device=exact.device)
    exact.view(torch.int32).add_(thresholds).bitwise_and_(-0x10000)
    return exact.to(weight.dtype)


def gather_adapters(model: PreTrainedModel, gather: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Full adapter tensors on the CPU by peft's names; empty without adapters. Collective."""
    if not has_adapters(model):
        return {}
    return {name: gather(value).detach().cpu() for name, value in get_peft_model_state_dict(model).items()}


def save_adapters(model: PreTrainedModel, adapters: dict[str, Tensor], folder: Path) -> None:
    """Writes gathered adapters in peft's format."""
    folder.mkdir(parents=True, exist_ok=True)
    prefixed = {f"{SAVED_PREFIX}{name}": tensor.contiguous() for name, tensor in adapters.items()}
    save_file(prefixed, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = copy(model.peft_config[ADAPTER])
    base = str(config.base_model_name_or_path)
    config.base_model_name_or_path = os.path.abspath(base) if os.path.exists(base) else base
    config.save_pretrained(folder)


def _adapted_weight(model: nn.Module, layer_name: str, a: Tensor, b: Tensor) -> nn.Parameter:
    """The weight of a layer, or the one of stacked experts, that has an adapter's widths."""
    module = model.get_submodule(layer_name)
    stacked = [p for p in module.parameters(recurse=False) if p.dim() == 3 and p.shape[1:] == (len(b), a.shape[1])]
    return stacked[0] if stacked else model.get_parameter(f"{layer_name}.weight")


def load_merged(folder: Path) -> PreTrainedModel:
    """The base model of saved adapters, in the dtype of its files, with the adapters merged in float32.

    Raises:
        ValueError: the adapters are no plain LoRA, or do not fit the base model.
    """
    config = json.loads((folder / CONFIG_FILE).read_text())
    for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(key):
            raise ValueError(f"{folder / CONFIG_FILE}: {key} is set; only plain LoRA is merged")
    base = config["base_model_name_or_path"]
    model = model_class(read_config(base)).from_pretrained(base, dtype="auto")
    tensors = load_file(folder / WEIGHTS_FILE)
    scale = config["lora_alpha"] / config["r"]
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        layer_name = name.removeprefix(SAVED_PREFIX).removesuffix(".lora_A.weight")
        a, b = tensors.pop(name), tensors.pop(name.replace(".lora_A.", ".lora_B."))
        try:
            weight = _adapted_weight(model, layer_name.replace(BASE_LAYER, ""), a, b)
            weight.data = _merge(weight.data, *_unstack(weight, a, b), scale)
        except (AttributeError, RuntimeError) as error:
            raise ValueError(
                f"{folder / WEIGHTS_FILE}: the adapter of {layer_name} fits no layer of {base}"
            ) from error
    if tensors:
        raise ValueError(f"{folder / WEIGHTS_FILE}: {', '.join(sorted(tensors)[:5])} belong to no adapter")
    return model
