"""The merged folder gives the logits of the saved model; a checkpoint that does not fit is refused whole."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

from tests import tiny_qwen
from tests.ranks import leave
from tests.tiny_qwen import IMAGE_TOKEN, PATCH_DIM, VISION_END, VISION_START

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import model_merger as command

from verl.export import merger as model_merger

TIED, OUTPUT = "model.language_model.embed_tokens.weight", "lm_head.weight"


def tiny_model(is_tied: bool = True) -> Qwen2_5_VLForConditionalGeneration:
    model = tiny_qwen.tiny_model(tie_word_embeddings=is_tied).eval()
    model.config.architectures = [type(model).__name__]
    return model


@torch.no_grad()
def image_logits(model: Qwen2_5_VLForConditionalGeneration) -> torch.Tensor:
    ids = torch.tensor([[1, 2, VISION_START, *[IMAGE_TOKEN] * 4, VISION_END, 5, 6]])
    pixels = torch.randn(16, PATCH_DIM, generator=torch.Generator().manual_seed(1))
    grid = torch.tensor([[1, 4, 4]])
    mask, kinds = torch.ones_like(ids), (ids == IMAGE_TOKEN).int()
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels.to(model.dtype), "image_grid_thw": grid}
    return model(**inputs, mm_token_type_ids=kinds).logits


def save_huggingface_part(model: Qwen2_5_VLForConditionalGeneration, actor_dir: Path) -> None:
    hf_dir = actor_dir / "huggingface"
    hf_dir.mkdir(parents=True)
    model.config.save_pretrained(hf_dir)
    GenerationConfig(eos_token_id=2, repetition_penalty=1.05).save_pretrained(hf_dir)
    (hf_dir / "tokenizer.json").write_text("{}")


def save_checkpoint(model, actor_dir: Path, change=lambda state: state) -> Path:
    save_huggingface_part(model, actor_dir)
    state = change(dict(model.state_dict()))
    checkpoint.save({"model": state, "optimizer": {"lr": 0.1}}, checkpoint_id=actor_dir, no_dist=True)
    return actor_dir


def load_merged(actor_dir: Path) -> Qwen2_5_VLForConditionalGeneration:
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        actor_dir / "huggingface", output_loading_info=True, dtype="auto"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def save_sharded(rank: int, actor_dir: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    rendezvous = f"file://{actor_dir.parent / 'rendezvous'}"  # a port could be taken by another test meanwhile
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    model = tiny_model()
    if rank == 0:
        save_huggingface_part(model, actor_dir)
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=actor_dir)
    leave()


@pytest.mark.parametrize("is_tied", [True, False])
def test_merged_model_gives_the_same_logits(tmp_path, is_tied):
    model = tiny_model(is_tied)
    actor_dir = save_checkpoint(model, tmp_path / "actor")
    before = {path.name: path.read_bytes() for path in (actor_dir / "huggingface").iterdir()}
    assert command.main(["--local_dir", str(actor_dir)]) == 0
    assert torch.equal(image_logits(load_merged(actor_dir)), image_logits(model))
    for name in ("generation_config.json", "tokenizer.json"):
        assert (actor_dir / "huggingface" / name).read_bytes() == before[name]
    with safe_open(actor_dir / "huggingface" / "model.safetensors", framework="pt") as weights:
        assert (OUTPUT in weights.keys()) is not is_tied  # noqa: SIM118


@pytest.mark.e2e
def test_shards_of_two_ranks_are_put_together(tmp_path):
    actor_dir = tmp_path / "actor"
    torch.multiprocessing.spawn(save_sharded, args=(actor_dir,), nprocs=2)
    assert len(list(actor_dir.glob("*.distcp"))) == 2
    assert command.main(["--local_dir", str(actor_dir)]) == 0
    assert torch.equal(image_logits(load_merged(actor_dir)), image_logits(tiny_model()))


def test_a_tied_parameter_may_be_stored_under_either_name(tmp_path):
    model = tiny_model()
    for dropped in (TIED, OUTPUT):
        actor_dir = tmp_path / dropped
        save_checkpoint(model, actor_dir, lambda state, d=dropped: {k: v for k, v in state.items() if k != d})
        model_merger.merge_checkpoint(actor_dir)
        assert torch.equal(image_logits(load_merged(actor_dir)), image_logits(model))


def test_dtype_is_converted_and_written_into_the_config(tmp_path):
    model = tiny_model()
    actor_dir = save_checkpoint(model, tmp_path / "actor")
    assert command.main(["--local_dir", str(actor_dir), "--dtype", "bfloat16"]) == 0
    assert json.loads((actor_dir / "huggingface" / "config.json").read_text())["dtype"] == "bfloat16"
    merged = load_merged(actor_dir)
    assert merged.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor.to(torch.bfloat16)), name


def test_large_models_are_written_as_several_files_and_merging_again_replaces_them(tmp_path, monkeypatch):
    actor_dir = save_checkpoint(tiny_model(), tmp_path / "actor")
    hf_dir = actor_dir / "huggingface"
    monkeypatch.setattr(model_merger, "MAX_FILE_SIZE", "100KB")
    model_merger.merge_checkpoint(actor_dir)
    assert len(list(hf_dir.glob("model-*-of-*.safetensors"))) > 1 and (hf_dir / model_merger.INDEX_NAME).is_file()
    assert torch.equal(image_logits(load_merged(actor_dir)), image_logits(tiny_model()))
    monkeypatch.undo()
    model_merger.merge_checkpoint(actor_dir)
    assert [path.name for path in hf_dir.glob("*.safetensors*")] == ["model.safetensors"]
    assert not list(hf_dir.glob(".merging-*"))


def test_faults_are_named_and_nothing_is_written(tmp_path, capsys):
    def drop(state):
        del state["model.visual.blocks.1.mlp.up_proj.weight"]
        return state

    def add(state):
        return state | {"model.extra.weight": torch.zeros(2)}

    def shorten(state):
        return state | {"model.language_model.norm.weight": torch.zeros(32)}

    def untie(state):
        return state | {OUTPUT: torch.zeros_like(state[OUTPUT])}

    faults = {
        "missing model.visual.blocks.1.mlp.up_proj.weight": drop,
        "unexpected model.extra.weight": add,
        "wrong shape model.language_model.norm.weight: stored (32,)": shorten,
        f"{OUTPUT} and {TIED} are tied": untie,
    }
    for message, change in faults.items():
        actor_dir = save_checkpoint(tiny_model(), tmp_path / change.__name__, change)
        assert command.main(["--local_dir", str(actor_dir)]) == 2
        assert message in capsys.readouterr().err
        assert not list((actor_dir / "huggingface").glob("*.safetensors"))
        assert not list((actor_dir / "huggingface").glob(".merging-*"))


def test_incomplete_checkpoints_are_refused(tmp_path, capsys):
    assert command.main(["--local_dir", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    actor_dir = save_checkpoint(tiny_model(), tmp_path / "actor")
    (shard,) = actor_dir.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-10])
    assert command.main(["--local_dir", str(actor_dir)]) == 2
    assert f"{shard.name} has" in capsys.readouterr().err
    shard.unlink()
    assert command.main(["--local_dir", str(actor_dir)]) == 2
    assert "is absent" in capsys.readouterr().err
    (actor_dir / ".metadata").unlink()
    assert command.main(["--local_dir", str(actor_dir)]) == 2
    assert "no .metadata" in capsys.readouterr().err
