"""The merged folder gives the logits of the saved model; a checkpoint that does not fit is refused whole."""

import json
from pathlib import Path

import model_merger
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from tests.support.merged_models import image_logits, load_merged, save_checkpoint, save_huggingface_part, tiny_model
from tests.support.ranks import leave
from verl.distributed import checkpoint as trainers
from verl.export import merger

TIED, OUTPUT = "model.language_model.embed_tokens.weight", "lm_head.weight"


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


@pytest.mark.parametrize(
    ("family", "is_tied"),
    [("qwen2_5_vl", True), ("qwen2_5_vl", False), ("qwen3_5", True), ("qwen3_5", False), ("qwen3_5_moe", False)],
)
def test_merged_model_gives_the_same_logits(tmp_path, family, is_tied):
    model = tiny_model(is_tied, family)
    actor_dir = save_checkpoint(model, tmp_path / "actor")
    before = {path.name: path.read_bytes() for path in (actor_dir / "huggingface").iterdir()}
    assert model_merger.main(["--local_dir", str(actor_dir)]) == 0
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
    assert model_merger.main(["--local_dir", str(actor_dir)]) == 0
    assert torch.equal(image_logits(load_merged(actor_dir)), image_logits(tiny_model()))


def test_a_tied_parameter_may_be_stored_under_either_name(tmp_path):
    model = tiny_model()
    for dropped in (TIED, OUTPUT):
        actor_dir = tmp_path / dropped
        save_checkpoint(model, actor_dir, lambda state, d=dropped: {k: v for k, v in state.items() if k != d})
        merger.merge_checkpoint(actor_dir)
        assert torch.equal(image_logits(load_merged(actor_dir)), image_logits(model))


def test_dtype_is_converted_and_written_into_the_config(tmp_path):
    model = tiny_model()
    actor_dir = save_checkpoint(model, tmp_path / "actor")
    assert model_merger.main(["--local_dir", str(actor_dir), "--dtype", "bfloat16"]) == 0
    assert json.loads((actor_dir / "huggingface" / "config.json").read_text())["dtype"] == "bfloat16"
    merged = load_merged(actor_dir)
    assert merged.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor.to(torch.bfloat16)), name


def test_large_models_are_written_as_several_files_and_merging_again_replaces_them(tmp_path, monkeypatch):
    actor_dir = save_checkpoint(tiny_model(), tmp_path / "actor")
    hf_dir = actor_dir / "huggingface"
    monkeypatch.setattr(merger, "MAX_FILE_SIZE", "100KB")
    merger.merge_checkpoint(actor_dir)
    assert len(list(hf_dir.glob("model-*-of-*.safetensors"))) > 1 and (hf_dir / merger.INDEX_NAME).is_file()
    assert torch.equal(image_logits(load_merged(actor_dir)), image_logits(tiny_model()))
    monkeypatch.undo()
    merger.merge_checkpoint(actor_dir)
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
        assert model_merger.main(["--local_dir", str(actor_dir)]) == 2
        assert message in capsys.readouterr().err
        assert not list((actor_dir / "huggingface").glob("*.safetensors"))
        assert not list((actor_dir / "huggingface").glob(".merging-*"))


def test_incomplete_checkpoints_are_refused(tmp_path, capsys):
    assert model_merger.main(["--local_dir", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    actor_dir = save_checkpoint(tiny_model(), tmp_path / "actor")
    (shard,) = actor_dir.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-10])
    assert model_merger.main(["--local_dir", str(actor_dir)]) == 2
    assert f"{shard.name} has" in capsys.readouterr().err
    shard.unlink()
    assert model_merger.main(["--local_dir", str(actor_dir)]) == 2
    assert "is absent" in capsys.readouterr().err
    (actor_dir / ".metadata").unlink()
    assert model_merger.main(["--local_dir", str(actor_dir)]) == 2
    assert "no .metadata" in capsys.readouterr().err


def finished(root: Path, model=None) -> Path:
    """Actor folder of a checkpoint as the trainer finishes one."""
    folder = trainers.begin(root, 1)
    save_checkpoint(model or tiny_model(), folder / "actor")
    return trainers.finish(folder, {"global_step": 1}) / "actor"


@pytest.mark.parametrize("name", ["*.distcp", ".metadata", "huggingface/config.json", "huggingface/tokenizer.json"])
def test_one_flipped_byte_of_any_file_is_refused(tmp_path, capsys, name):
    actor_dir = finished(tmp_path)
    (file,) = actor_dir.glob(name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert model_merger.main(["--local_dir", str(actor_dir)]) == 2
    assert f"{file} has other bytes than were written" in capsys.readouterr().err
    assert not list((actor_dir / "huggingface").glob("*.safetensors"))


def test_a_manifest_that_is_damaged_is_said(tmp_path, capsys):
    actor_dir = finished(tmp_path)
    (actor_dir.parent / "manifest.json").write_text("[]")
    assert model_merger.main(["--local_dir", str(actor_dir)]) == 2
    assert "the checkpoint is damaged" in capsys.readouterr().err


def test_a_merged_checkpoint_stays_whole_and_can_be_merged_again(tmp_path, monkeypatch):
    actor_dir = finished(tmp_path / "run")
    for dtype in ("bfloat16", "float16", None):
        arguments = [] if dtype is None else ["--dtype", dtype]
        monkeypatch.chdir(actor_dir.parent)  # a relative path finds the manifest too
        assert model_merger.main(["--local_dir", "actor", *arguments]) == 0
        trainers.check(actor_dir.parent)
        assert trainers.find_latest(tmp_path / "run") == actor_dir.parent
    config = actor_dir / "huggingface" / "config.json"
    config.write_text(config.read_text().replace("64", "65"))
    assert model_merger.main(["--local_dir", "actor"]) == 2


def test_folders_that_are_no_actors_say_which_is_wanted(tmp_path, capsys):
    actor_dir = finished(tmp_path)
    assert model_merger.main(["--local_dir", str(actor_dir.parent)]) == 2
    assert f"give its folder {actor_dir} as --local_dir" in capsys.readouterr().err
    released = tmp_path / "released" / "actor"
    released.mkdir(parents=True)
    torch.save({"weight": torch.ones(1)}, released / "model_world_size_1_rank_0.pt")
    assert model_merger.main(["--local_dir", str(released)]) == 2
    message = capsys.readouterr().err
    assert f"{released / 'huggingface'}: no such folder" in message and "copy config.json" in message
    (released / "huggingface").write_text("")
    assert model_merger.main(["--local_dir", str(released)]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_weights_of_twice_the_released_size_are_said(tmp_path, capsys):
    for model, arguments, is_said in (
        (tiny_model(), [], True),
        (tiny_model(), ["--dtype", "float32"], False),
        (tiny_model(), ["--dtype", "bfloat16"], False),
        (tiny_model().to(torch.bfloat16), [], False),
    ):
        actor_dir = finished(tmp_path, model)
        assert model_merger.main(["--local_dir", str(actor_dir), *arguments]) == 0
        assert ("twice the size" in capsys.readouterr().out) is is_said
