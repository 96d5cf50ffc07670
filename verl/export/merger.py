"""Merge: the sharded actor of a training checkpoint as a Hugging Face folder that transformers and vLLM load.

The actor folder holds a torch.distributed.checkpoint whose "model" entry is the state dict, or the files
`model_world_size_W_rank_r.pt` of EasyR1 and of SpatialThinker's release; and `huggingface/` with config, tokenizer
and processor. Weights go into `huggingface/` as safetensors; no process group and no GPU is needed, and at most one
output file of weights is in memory at a time. Of a run with LoRA, `lora_adapter/` beside it is merged into the base
model that it names, as a whole in memory; the adapters stay. Whatever a manifest lists is checked first. The index of
a torch.distributed.checkpoint is a pickle, of which only an index's own parts are read; files of ranks are read as
tensors alone.
"""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from verl.export.stored_weights import Weights, read_weights

DTYPES = ("float32", "bfloat16", "float16")
MAX_FILE_SIZE = "5GB"
INDEX_NAME = "model.safetensors.index.json"


def build_meta_model(hf_dir: Path) -> Any:
    """Return the model that config.json names, on the meta device: names, shapes and ties without memory."""
    import torch
    import transformers

    if not (hf_dir / "config.json").is_file():
        raise FileNotFoundError(f"{hf_dir}: no config.json; the trainer saves it there with the checkpoint")
    config = transformers.AutoConfig.from_pretrained(hf_dir, local_files_only=True)
    names = config.architectures or []
    model_class = getattr(transformers, names[0], None) if names else None
    if model_class is None:
        raise ValueError(f"{hf_dir}/config.json: architectures {names} names no class of transformers")
    with torch.device("meta"):
        model = model_class(config)
    model.tie_weights()
    return model


def with_current_names(weights: Weights, model: Any) -> Weights:
    """The weights under the names of transformers since 4.52, if Qwen-VL's parameters have older ones."""
    if any(name.startswith("model.language_model.") for name in weights.entries):
        return weights
    if not any(name.startswith("model.language_model.") for name in model.state_dict()):
        return weights

    def rename(name: str) -> str:
        return re.sub("^visual", "model.visual", re.sub("^model", "model.language_model", name))

    return weights.renamed(rename)


def check_parameters(model: Any, weights: Weights) -> dict[str, str]:
    """Return {tied name: the name that is written in its place}; raise unless model and checkpoint fit exactly.

    A tied parameter may be stored under either name or both. Errors: ValueError that names every missing, unexpected
    or wrongly shaped parameter.
    """
    wanted, stored = model.state_dict(), weights.entries
    ties = {alias: source for alias, source in model.all_tied_weights_keys.items() if alias in wanted}
    faults = []
    for name, tensor in wanted.items():
        entry = stored.get(name)
        if entry is not None and entry.shape != tuple(tensor.shape):
            faults.append(f"wrong shape {name}: stored {entry.shape}, the model has {tuple(tensor.shape)}")
        group = {name, ties.get(name, name)} | {alias for alias, source in ties.items() if source == name}
        if not group & stored.keys():
            faults.append(f"missing {name}")
    faults += [f"unexpected {name}" for name in stored.keys() - wanted.keys()]
    if faults:
        shown = "\n  ".join(sorted(faults)[:20])
        more = f"\n  ... {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ValueError(f"checkpoint and {type(model).__name__} do not fit:\n  {shown}{more}")
    return ties


def check_ties(weights: Weights, ties: dict[str, str]) -> None:
    """Raise ValueError if two names of one tied parameter were stored with different values."""
    import torch

    for alias, source in ties.items():
        if alias in weights.entries and source in weights.entries:
            both = weights.load([alias, source])
            if not torch.equal(both[alias], both[source]):
                raise ValueError(f"{alias} and {source} are tied in config.json but differ in the checkpoint")


def write_weights(weights: Weights, out_dir: Path, model: Any, dtype: str | None) -> set[str]:
    """Write the parameters as safetensors files (and an index where there are several); return the dtypes written."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    stored = weights.entries
    ties = check_parameters(model, weights)
    check_ties(weights, ties)
    # The name to read from: a tied parameter may be stored under its other name only.
    source_of = {name: name for name in model.state_dict() if name not in ties}
    for alias, source in ties.items():
        if source not in stored:
            source_of[source] = alias
    target_dtype = getattr(torch, dtype) if dtype else None
    plan = {}
    for name, read_name in source_of.items():
        stored_dtype = stored[read_name].dtype
        wanted = target_dtype if target_dtype is not None and stored_dtype.is_floating_point else stored_dtype
        plan[name] = torch.empty(stored[read_name].shape, dtype=wanted, device="meta")

    split = split_torch_state_dict_into_shards(
        plan, max_shard_size=MAX_FILE_SIZE, filename_pattern="model{suffix}.safetensors"
    )
    for file_name, names in split.filename_to_tensors.items():
        tensors = weights.load([source_of[name] for name in names])
        payload = {name: tensors[source_of[name]].to(plan[name].dtype).contiguous() for name in names}
        save_file(payload, out_dir / file_name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (out_dir / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return {str(tensor.dtype).removeprefix("torch.") for tensor in plan.values() if tensor.is_floating_point()}


def write_merged_adapters(adapters_dir: Path, out_dir: Path, dtype: str | None) -> set[str]:
    """Write the base model with the adapters merged as safetensors files; return the dtypes written."""
    import torch

    from verl.model.lora import load_merged

    _check_base(adapters_dir)
    model = load_merged(adapters_dir)
    if dtype:
        model.to(getattr(torch, dtype))
    model.save_pretrained(out_dir, max_shard_size=MAX_FILE_SIZE)
    (out_dir / "generation_config.json").unlink(missing_ok=True)  # the trainer has saved it already
    return {str(p.dtype).removeprefix("torch.") for p in model.parameters()}


def _check_base(adapters_dir: Path) -> None:
    """Pass unless the base model's weights are others than those the adapters were trained on, as far as is known.

    Errors: ValueError with the base model's path.
    """
    from verl.model.checkpoint_files import digest_model

    state = adapters_dir.resolve().parents[1] / "trainer_state.json"
    known = (json.loads(state.read_text()).get("identity") or {}) if state.is_file() else {}
    if known.get("base_model") is None:
        return
    base = json.loads((adapters_dir / "adapter_config.json").read_text())["base_model_name_or_path"]
    if digest_model(base) not in (None, known["base_model"]):
        raise ValueError(
            f"{base}: its weights are not those that the adapters in {adapters_dir} were trained on (SHA-256); put "
            f"the right model there, or correct base_model_name_or_path in {adapters_dir / 'adapter_config.json'}"
        )


def write_config(hf_dir: Path, out_dir: Path, dtypes: set[str]) -> None:
    """Write config.json with the dtype of the weights beside it: loaders with dtype="auto" believe the config."""
    config = json.loads((hf_dir / "config.json").read_text())
    if len(dtypes) == 1:
        (dtype,) = dtypes
        for section in (config, *(value for value in config.values() if isinstance(value, dict))):
            if section is config or "dtype" in section or "torch_dtype" in section:
                section.pop("torch_dtype", None)
                section["dtype"] = dtype
    (out_dir / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def publish_files(temporary_dir: Path, hf_dir: Path) -> None:
    """Move the finished files into place, each by one rename, and drop weight files of an earlier merge."""
    new = {path.name for path in temporary_dir.iterdir()}
    _note_merged(temporary_dir / "config.json", hf_dir)
    for path in hf_dir.glob("model*.safetensors*"):
        if path.name not in new or path.name == INDEX_NAME:
            path.unlink()
    # Without its index a loader finds no weights at all, so that it never sees old and new files mixed; the index
    # and the config come back last.
    for path in sorted(temporary_dir.iterdir(), key=lambda p: (p.suffix == ".json", p.name)):
        shutil.copymode(hf_dir / "config.json", path)  # safetensors writes files that only their owner may read
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(path, hf_dir / path.name)


def _note_merged(config: Path, hf_dir: Path) -> None:
    """Adds the new config.json to the manifest, beside what the trainer wrote: the checkpoint stays whole."""
    from verl.model.checkpoint_files import MANIFEST, MERGED, describe_files, read_manifest, write_json

    folder = hf_dir.resolve().parents[1]
    name = str(hf_dir.resolve().relative_to(folder) / "config.json")
    if not (folder / MANIFEST).is_file() or name not in (manifest := read_manifest(folder)):
        return
    (described,) = describe_files(config.parent, [config]).values()
    manifest[name][MERGED] = described
    partial = folder / f"{MANIFEST}.tmp"
    write_json(partial, manifest)
    os.replace(partial, folder / MANIFEST)


def check_folder(actor_dir: Path) -> None:
    """Pass if the folder is an actor's, with its Hugging Face files, and as its manifest says, if it has one.

    Errors: FileNotFoundError with what to do; ValueError with the damaged file.
    """
    from verl.model.checkpoint_files import MANIFEST, check_files

    hf_dir = actor_dir / "huggingface"
    if not actor_dir.is_dir():
        raise FileNotFoundError(f"{actor_dir}: no such folder")
    if (actor_dir / "actor").is_dir():
        raise FileNotFoundError(f"{actor_dir}: is a checkpoint; give its folder {actor_dir / 'actor'} as --local_dir")
    if not hf_dir.is_dir():
        raise FileNotFoundError(
            f"{hf_dir}: no such folder; make it and copy config.json, generation_config.json, the tokenizer's and the "
            "processor's files of the base model into it"
        )
    folder = actor_dir.resolve().parent
    if (folder / MANIFEST).is_file():
        check_files(folder, under=f"{actor_dir.resolve().name}/")


def merge_checkpoint(local_dir: str | Path, dtype: str | None = None) -> Path:
    """Write the actor's weights into `local_dir/huggingface` and return that folder.

    Errors: FileNotFoundError or ValueError naming what is missing, unexpected, short or contradictory; nothing in the
    folder has changed then.
    """
    actor_dir = Path(local_dir)
    hf_dir = actor_dir / "huggingface"
    check_folder(actor_dir)
    adapters_dir = actor_dir / "lora_adapter"
    has_adapters = (adapters_dir / "adapter_config.json").is_file()
    for left_over in hf_dir.glob(".merging-*"):  # of a merge that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    temporary_dir = Path(tempfile.mkdtemp(prefix=".merging-", dir=hf_dir))
    try:
        if has_adapters:
            dtypes = write_merged_adapters(adapters_dir, temporary_dir, dtype)
        else:
            model = build_meta_model(hf_dir)
            weights = with_current_names(read_weights(actor_dir), model)
            dtypes = write_weights(weights, temporary_dir, model, dtype)
        write_config(hf_dir, temporary_dir, dtypes)
        publish_files(temporary_dir, hf_dir)
    finally:
        shutil.rmtree(temporary_dir, ignore_errors=True)
    return hf_dir


def upload_folder(hf_dir: Path, repo_id: str, is_public: bool) -> str:
    """Upload the merged folder to the Hugging Face hub, private unless asked otherwise; return its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo_id, private=not is_public, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=hf_dir)
    return str(url)
