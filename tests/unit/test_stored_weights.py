"""Files of ranks as EasyR1 and SpatialThinker's release write them: merged exactly, or refused by name."""

import struct
import tarfile
import zipfile
from pathlib import Path

import model_merger
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.support.merged_models import image_logits, load_merged, save_huggingface_part, tiny_model
from verl.export import stored_weights

RANK_FILES = Path(__file__).parents[1] / "support" / "rank_files"
MESHES = {"1": (1,), "2": (2,), "4": (4,), "1 x 2": (1, 2), "2 x 1": (2, 1), "2 x 2": (2, 2)}


def old_name(name: str) -> str:
    """As transformers before 4.52 named it."""
    return name.removeprefix("model.") if name.startswith("model.visual") else name.replace("language_model.", "")


def save_ranks(model, actor_dir: Path, mesh_shape=(2,), rename=lambda name: name) -> Path:
    """Shards of every rank; real DTensors over a process group that does not talk."""
    save_huggingface_part(model, actor_dir)
    world_size = torch.Size(mesh_shape).numel()
    names = ("ddp", "fsdp")[-len(mesh_shape) :]
    for rank in range(world_size):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        mesh = dist.init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
        placements = [Replicate()] * (len(mesh_shape) - 1) + [Shard(0)]
        state = {}
        for name, value in model.state_dict().items():
            parts = value.chunk(mesh_shape[-1])  # fewer than ranks if there are fewer rows
            index = mesh.get_local_rank("fsdp")
            part = parts[index].clone() if index < len(parts) else value[:0].clone()
            shape = {"shape": value.shape, "stride": value.stride()}
            state[rename(name)] = DTensor.from_local(part, mesh, placements, run_check=False, **shape)
        torch.save(state, actor_dir / f"model_world_size_{world_size}_rank_{rank}.pt")
        dist.destroy_process_group()
    return actor_dir


@pytest.mark.parametrize("mesh_shape", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("rename", [lambda name: name, old_name], ids=["new names", "old names"])
def test_the_model_comes_back_exactly(tmp_path, mesh_shape, rename):
    model = tiny_model()
    actor_dir = save_ranks(model, tmp_path / "actor", mesh_shape, rename)
    before = (actor_dir / "huggingface" / "generation_config.json").read_bytes()
    assert model_merger.main(["--local_dir", str(actor_dir)]) == 0
    merged = load_merged(actor_dir)
    for name, value in model.state_dict().items():
        assert torch.equal(merged.state_dict()[name], value), name
    assert torch.equal(image_logits(merged), image_logits(model))
    assert (actor_dir / "huggingface" / "generation_config.json").read_bytes() == before


@pytest.mark.parametrize("folder", sorted(RANK_FILES.iterdir()), ids=lambda folder: folder.name)
def test_files_that_older_versions_of_torch_wrote_are_read(folder):
    """Written by FSDP as EasyR1 uses it, with the torch and over the mesh in the folder's name."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3), torch.nn.LayerNorm(3))
    weights = stored_weights.read_weights(folder)
    loaded = weights.load(sorted(weights.entries))
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_the_type_of_the_weights_is_kept(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    actor_dir = save_ranks(model, tmp_path / "actor")
    assert model_merger.main(["--local_dir", str(actor_dir)]) == 0
    merged = load_merged(actor_dir)
    assert merged.dtype == torch.bfloat16
    assert all(torch.equal(merged.state_dict()[name], value) for name, value in model.state_dict().items())


def refusal(actor_dir: Path, capsys) -> str:
    assert model_merger.main(["--local_dir", str(actor_dir)]) == 2
    assert not list((actor_dir / "huggingface").glob("*.safetensors"))
    return capsys.readouterr().err


def test_a_missing_or_damaged_shard_is_named_and_nothing_is_written(tmp_path, capsys):
    actor_dir = save_ranks(tiny_model(), tmp_path / "actor")
    second = actor_dir / "model_world_size_2_rank_1.pt"
    whole = second.read_bytes()
    second.write_bytes(whole[:-100])
    assert f"{second} cannot be read: its {len(whole) - 100} bytes have no end" in refusal(actor_dir, capsys)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 0, 3)  # of three disks
    second.write_bytes(whole[:-22] + locator + whole[-22:])
    assert f"{second} cannot be read: " in refusal(actor_dir, capsys)
    state = torch.load(actor_dir / "model_world_size_2_rank_0.pt", weights_only=True)
    torch.save({name: value for name, value in state.items() if "norm" not in name}, second)
    assert f"{second} and model_world_size_2_rank_0.pt hold different parameters" in refusal(actor_dir, capsys)
    second.unlink()
    assert "model_world_size_2_rank_1.pt is missing of 2 shards" in refusal(actor_dir, capsys)
    (actor_dir / "model_world_size_4_rank_1.pt").write_bytes(whole)
    assert "runs over [2, 4] ranks are mixed" in refusal(actor_dir, capsys)


def test_a_shard_of_another_size_is_named(tmp_path, capsys):
    actor_dir = save_ranks(tiny_model(), tmp_path / "actor")
    first, second = (actor_dir / f"model_world_size_2_rank_{rank}.pt" for rank in range(2))
    state = torch.load(second, weights_only=True)
    state["lm_head.weight"]._local_tensor = state["lm_head.weight"]._local_tensor[:-1]
    torch.save(state, second)
    assert f"{second}: lm_head.weight has shape" in refusal(actor_dir, capsys)


def test_code_in_a_shard_is_not_run(tmp_path, capsys):
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    actor_dir = tmp_path / "actor"
    save_huggingface_part(tiny_model(), actor_dir)
    torch.save({"weight": Code()}, actor_dir / "model_world_size_1_rank_0.pt")
    assert "cannot be read" in refusal(actor_dir, capsys)
    assert not (tmp_path / "ran").exists()


class Program(torch.nn.Module):
    """A TorchScript program."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight


@pytest.mark.parametrize("has_data", [True, False])
def test_a_torchscript_program_in_the_place_of_a_shard_is_refused(tmp_path, capsys, monkeypatch, has_data):
    actor_dir = tmp_path / "actor"
    save_huggingface_part(tiny_model(), actor_dir)
    file = actor_dir / "model_world_size_1_rank_0.pt"
    torch.jit.save(torch.jit.script(Program() if has_data else torch.nn.ReLU()), file)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the program was run"))
    message = refusal(actor_dir, capsys)
    assert f"{file} cannot be read" in message and "TorchScript" in message


def test_a_shard_that_also_reads_as_a_program_is_refused(tmp_path, capsys, monkeypatch):
    actor_dir = save_ranks(tiny_model(), tmp_path / "actor", (1,))
    file = actor_dir / "model_world_size_1_rank_0.pt"
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/constants.pkl", b"\x80\x02).")
        archive.writestr(f"{archive.namelist()[0].partition('/')[0]}/constants.pkl", b"\x80\x02).")
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the program was run"))
    assert "cannot be read" in refusal(actor_dir, capsys)


@pytest.mark.parametrize("kind", ["old form", "tar", "garbage before the archive"])
def test_a_shard_in_another_form_is_refused(tmp_path, capsys, kind):
    actor_dir = tmp_path / "actor"
    save_huggingface_part(tiny_model(), actor_dir)
    file = actor_dir / "model_world_size_1_rank_0.pt"
    torch.save({"weight": torch.ones(1)}, file, _use_new_zipfile_serialization=kind != "old form")
    if kind == "tar":
        with tarfile.open(file, "w") as archive:
            archive.addfile(tarfile.TarInfo("pickle"))
    elif kind != "old form":
        file.write_bytes(b"garbage" + file.read_bytes())
    assert str(file) in refusal(actor_dir, capsys)
