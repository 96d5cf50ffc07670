import json
import os
import pickle
import random
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.support.saving import write_index
from verl.distributed import checkpoint


def save(folder, model, optimizer=None):
    writer = checkpoint.ShardWriter()
    writer.start(folder, model, optimizer)
    assert writer.fault(blocking=True) == ""


def write(root, step):
    folder = checkpoint.begin(root, step)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save(folder / "actor", model, optimizer)
    return checkpoint.finish(folder, {"global_step": step}), model, optimizer


def test_a_finished_checkpoint_is_found_and_read_back(tmp_path):
    write(tmp_path, 1)
    folder, model, optimizer = write(tmp_path, 2)
    assert checkpoint.find_latest(tmp_path) == folder
    assert checkpoint.read_trainer_state(folder) == {"global_step": 2}
    other = torch.nn.Linear(3, 2)
    other_optimizer = torch.optim.AdamW(other.parameters())
    checkpoint.load_shards(folder / "actor", other, other_optimizer)
    assert torch.equal(other.weight, model.weight)
    key = other.weight
    assert torch.equal(other_optimizer.state[key]["exp_avg"], optimizer.state[model.weight]["exp_avg"])


def test_a_half_written_checkpoint_is_never_loaded(tmp_path):
    old, _, _ = write(tmp_path, 1)
    new, _, _ = write(tmp_path, 2)
    shard = next((new / "actor").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match="the checkpoint is damaged"):
        checkpoint.check(new)
    assert checkpoint.find_latest(tmp_path) == old
    (new / checkpoint.MANIFEST).unlink()
    with pytest.raises(ValueError, match="not written to its end"):
        checkpoint.check(new)
    checkpoint.begin(tmp_path, 3)  # a run killed while it wrote
    assert checkpoint.find_latest(tmp_path) == old


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_shards_that_lie_on_another_machine_are_no_checkpoint(tmp_path, role):
    folder = checkpoint.begin(tmp_path, 1)
    for name in ("actor", "critic"):
        save(folder / name, torch.nn.Linear(3, 2))
    shard = sorted((folder / role).glob("*.distcp"))[0]
    shard.rename(tmp_path / shard.name)
    with pytest.raises(ValueError, match=f"{shard} is not there; all machines must share"):
        checkpoint.finish(folder, {"global_step": 1})
    assert checkpoint.find_latest(tmp_path) is None


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_shards_without_an_index_are_no_checkpoint(tmp_path, role):
    folder = checkpoint.begin(tmp_path, 1)
    for name in ("actor", "critic"):
        save(folder / name, torch.nn.Linear(3, 2))
    (folder / role / ".metadata").unlink()
    with pytest.raises(ValueError, match=f"{role}/.metadata is not there; all machines must share"):
        checkpoint.finish(folder, {"global_step": 1})


def test_a_rank_whose_generators_lie_elsewhere_is_named(tmp_path):
    folder = checkpoint.begin(tmp_path, 1)
    save(folder / "actor", torch.nn.Linear(3, 2))
    checkpoint.save_rng(folder / "actor", 0)
    names = ["actor rank 0 on left", "actor rank 1 on right"]
    with pytest.raises(ValueError, match="^actor rank 1 on right wrote elsewhere: .*rng_rank_1.pt is not there"):
        checkpoint.finish(folder, {"global_step": 1}, names)
    checkpoint.save_rng(folder / "actor", 1)
    assert checkpoint.read_trainer_state(checkpoint.finish(folder, {"global_step": 1}, names))["num_ranks"] == 2


@pytest.mark.parametrize("name", ["actor/.metadata", "actor/rng_rank_1.pt"])
def test_a_published_checkpoint_of_a_part_of_the_machines_is_passed_over(tmp_path, name, capsys):
    old, _, _ = write(tmp_path, 1)
    new, _, _ = write(tmp_path, 2)
    entries = checkpoint.read_manifest(new)
    state = new / checkpoint.TRAINER_STATE
    state.write_text(json.dumps({"global_step": 2, "num_ranks": 2}))
    for rank in (0, 1):
        checkpoint.save_rng(new / "actor", rank)
    files = [file for file in new.rglob("*") if file.is_file() and file.name != checkpoint.MANIFEST]
    checkpoint.write_json(new / checkpoint.MANIFEST, entries | checkpoint.describe_files(new, files))
    assert checkpoint.find_latest(tmp_path) == new
    files.remove(new / name)
    checkpoint.write_json(new / checkpoint.MANIFEST, checkpoint.describe_files(new, files))
    assert checkpoint.find_latest(tmp_path) == old
    assert f"does not list {name}: the checkpoint lacks a machine's files" in capsys.readouterr().out


def test_shards_that_a_shared_disk_does_not_list_yet_are_in_the_manifest(tmp_path, monkeypatch):
    folder = checkpoint.begin(tmp_path, 1)
    save(folder / "actor", torch.nn.Linear(3, 2))
    shards = {str(file.relative_to(folder)) for file in (folder / "actor").glob("*.distcp")}
    listed = type(folder).rglob
    monkeypatch.setattr(type(folder), "rglob", lambda *args: (f for f in listed(*args) if f.suffix != ".distcp"))
    assert shards <= set(checkpoint.read_manifest(checkpoint.finish(folder, {"global_step": 1})))


def test_a_flipped_bit_is_found(tmp_path):
    old, _, _ = write(tmp_path, 1)
    new, _, _ = write(tmp_path, 2)
    shard = next((new / "actor").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    checkpoint.check(new, with_content=False)
    with pytest.raises(ValueError, match=f"{shard.name} has other bytes than were written"):
        checkpoint.check(new)
    assert checkpoint.find_latest(tmp_path) == old


def test_prune_keeps_the_newest_and_whatever_is_no_checkpoint(tmp_path):
    for step in (1, 2, 10):
        write(tmp_path, step)
    (tmp_path / "global_step_10_backup").mkdir()
    checkpoint.begin(tmp_path, 11)
    checkpoint.prune(tmp_path, keep=0)
    assert {p.name for p in tmp_path.iterdir()} == {
        "global_step_1",
        "global_step_2",
        "global_step_10",
        "global_step_10_backup",
    }
    checkpoint.prune(tmp_path, keep=2)
    assert {p.name for p in tmp_path.iterdir()} == {"global_step_2", "global_step_10", "global_step_10_backup"}
    write(tmp_path, 11)
    checkpoint.prune(tmp_path, keep=1, spared=[2])
    assert {p.name for p in tmp_path.iterdir()} == {"global_step_2", "global_step_11", "global_step_10_backup"}


def test_prune_counts_only_steps_up_to_the_one_just_written(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, keep=1, step=2)
    assert {p.name for p in tmp_path.iterdir()} == {"global_step_2", "global_step_3"}


def test_the_newest_is_that_of_the_branch_that_is_asked_for(tmp_path):
    for step, origin in ((1, "a"), (2, "b"), (3, None)):
        folder = checkpoint.begin(tmp_path, step)
        (folder / "actor").mkdir()
        write_index(folder / "actor")
        checkpoint.finish(folder, {"global_step": step, "origin": origin})
    (tmp_path / "global_step_4" / "actor").mkdir(parents=True)  # of another program
    for origin, name in (("a", "global_step_1"), ("b", "global_step_2"), (None, "global_step_3")):
        assert checkpoint.find_latest(tmp_path, origin=origin) == tmp_path / name
    assert checkpoint.find_latest(tmp_path, origin="c") is None


def test_a_removal_that_is_cut_off_leaves_an_unfinished_checkpoint(tmp_path, monkeypatch):
    make_pair(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.shutil, "rmtree", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune(tmp_path, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"global_step_1.tmp", "global_step_2"}
    checkpoint.prune(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["global_step_2"]


def test_prune_reads_no_content(tmp_path, monkeypatch):
    """Digests of a run's checkpoints take minutes."""
    make_pair(tmp_path)
    asked = []
    monkeypatch.setattr(checkpoint, "check", lambda folder, with_content: asked.append(with_content))
    checkpoint.prune(tmp_path, keep=2)
    assert asked == [False, False]


def test_what_is_set_aside_goes_newest_first_with_its_logs_before_it(tmp_path, monkeypatch):
    log = tmp_path / "metrics.jsonl"
    log.write_text("{}")
    for step in (2, 10, 9):
        (tmp_path / f"global_step_{step}").mkdir()
    (tmp_path / "global_step_11.tmp").mkdir()
    moved, rename = [], type(tmp_path).rename
    monkeypatch.setattr(
        type(tmp_path), "rename", lambda path, to: (moved.append((path.name, log_is_there())), rename(path, to))
    )

    def log_is_there():
        return (tmp_path / "abandoned_1" / log.name).read_text() == "{}"

    place = checkpoint.set_aside(tmp_path, sorted(tmp_path.glob("global_step_*")), [log])
    assert place == tmp_path / "abandoned_1" and log.is_file()
    assert moved == [(f"global_step_{name}", True) for name in ("11.tmp", "10", "9", "2")]
    assert checkpoint.set_aside(tmp_path, []) == tmp_path / "abandoned_2"


def test_a_step_is_read_from_a_name_whether_finished_or_not(tmp_path):
    assert checkpoint.read_step(checkpoint.unfinished(tmp_path, 12)) == 12
    assert checkpoint.read_step(tmp_path / "global_step_7") == 7


def test_a_folder_of_another_program_has_neither_mark(tmp_path):
    assert not checkpoint.is_foreign(tmp_path)  # empty: of nobody
    (tmp_path / "actor").mkdir()
    assert checkpoint.is_foreign(tmp_path)
    for mark in (checkpoint.MANIFEST, checkpoint.TRAINER_STATE):
        (tmp_path / mark).write_text("{}")
        assert not checkpoint.is_foreign(tmp_path)
        (tmp_path / mark).unlink()


def test_writers_of_several_ranks_have_a_group_of_their_own(tmp_path):
    assert checkpoint.ShardWriter().group is None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        writer = checkpoint.ShardWriter()
        assert writer.group is not None and writer.group is not dist.group.WORLD
        writer.start(tmp_path, torch.nn.Linear(3, 2), None)
        assert writer.fault(blocking=True) == ""
    finally:
        dist.destroy_process_group()


def test_what_cannot_be_removed_hinders_no_other(tmp_path):
    make_pair(tmp_path)
    (tmp_path / "global_step_1.tmp").write_text("no folder")  # as if somebody had it open
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "global_step_0").symlink_to(tmp_path / "global_step_2")
    with pytest.raises(OSError):
        checkpoint.prune(tmp_path, keep=1)
    (tmp_path / "global_step_1.tmp").unlink()
    checkpoint.prune(tmp_path, keep=1)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"global_step_2", "global_step_0", "elsewhere"}


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.find_latest(tmp_path / "nothing") is None


def test_what_is_written_is_the_state_at_the_call(tmp_path):
    model = torch.nn.Linear(300, 200)
    before = model.weight.detach().clone()
    writer = checkpoint.ShardWriter()
    writer.start(tmp_path, model, None)
    with torch.no_grad():
        model.weight.zero_()  # training goes on
    assert writer.fault(blocking=True) == ""
    checkpoint.load_shards(tmp_path, model, None)
    assert torch.equal(model.weight, before)


def test_a_file_that_cannot_be_written_is_a_fault_whichever_it_is(tmp_path):
    model = torch.nn.Sequential(*(torch.nn.Linear(size, size) for size in range(1, 20)))
    save(tmp_path / "whole", model)
    names = [path.name for path in (tmp_path / "whole").glob("*.distcp")]
    sizes = [(tmp_path / "whole" / name).stat().st_size for name in names]
    assert len(names) == checkpoint.NUM_PARALLEL_FILES and max(sizes) < 1.2 * min(sizes)
    for name in names:
        (tmp_path / f"without_{name}" / name).mkdir(parents=True)  # a file cannot take its place
        writer = checkpoint.ShardWriter()
        writer.start(tmp_path / f"without_{name}", model, None)
        fault = writer.fault(blocking=True) or ""
        assert name in fault and f"rank 0: on {socket.gethostname()}: " in fault


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save(tmp_path, torch.nn.Linear(3, 2))
    for model in (torch.nn.Linear(4, 2), torch.nn.Sequential(torch.nn.Linear(3, 2))):
        with pytest.raises(ValueError, match=f"{tmp_path} cannot be loaded: rank 0: "):
            checkpoint.load_shards(tmp_path, model, None)


def test_generators_go_on_where_they_were(tmp_path):
    def draw():
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()

    folder = tmp_path / "global_step_1" / "actor"
    checkpoint.save_rng(folder, 1)
    expected = draw()
    checkpoint.load_rng(folder, 2)  # a rank that was not there
    assert draw() != expected
    checkpoint.load_rng(folder, 1)
    assert draw() == expected


def test_a_gpus_generator_goes_on_where_it_was(tmp_path, monkeypatch):
    """On a stand-in for a GPU; a file of a machine without one is read too, and one of a GPU on such a machine."""
    states, restored = [torch.arange(16, dtype=torch.uint8)], []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: states[0])
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    for rank, is_there in enumerate((False, True)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_there=is_there: is_there)
        checkpoint.save_rng(tmp_path, rank)
    for is_there, rank in ((True, 0), (False, 1)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_there=is_there: is_there)
        checkpoint.load_rng(tmp_path, rank)
    assert restored == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    checkpoint.load_rng(tmp_path, 1)
    assert torch.equal(restored[0], states[0])


def make_pair(root):
    """An older checkpoint, a newer one, and the newer one's manifest."""
    for step in (1, 2):
        folder = checkpoint.begin(root, step)
        (folder / "actor").mkdir()
        (folder / "actor" / "weights").write_text("w")
        write_index(folder / "actor")
        checkpoint.finish(folder, {"global_step": step})
    return root / "global_step_1", root / "global_step_2", root / "global_step_2" / checkpoint.MANIFEST


def test_any_flipped_byte_of_a_manifest_is_passed_over_or_means_nothing(tmp_path):
    old, new, manifest = make_pair(tmp_path)
    whole = manifest.read_bytes()
    meaning = json.loads(whole)
    for place in range(len(whole)):
        for bit in (1, 4, 32, 128):
            manifest.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            found = checkpoint.find_latest(tmp_path)
            assert found == old or found == new and json.loads(manifest.read_bytes()) == meaning


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"null", b"3", b"{}", b'"x"', b"\xff\xfe", b"[" * 5000, b'{"a": ' * 5000),
        *(b'{"trainer_state.json": null}', b'{"trainer_state.json": {"bytes": 1}}', b'{"trainer_state.json": [1]}'),
        *(b'{"../x": {"bytes": 0, "sha256": ""}}', b'{"/etc/passwd": {"bytes": 0, "sha256": ""}}'),
        *(b'{"a\\u0000": {"bytes": 0, "sha256": ""}}', b'{"actor/weights": {"bytes": 1, "sha256": "0"}}'),
        b'{"' + b"x" * 5000 + b'": {"bytes": 0, "sha256": ""}}',
    ],
)
def test_whatever_a_manifest_became_the_older_checkpoint_is_taken(tmp_path, content, capsys):
    old, new, manifest = make_pair(tmp_path)
    manifest.write_bytes(content)
    assert checkpoint.find_latest(tmp_path) == old
    assert "Skipping checkpoint: " in capsys.readouterr().out


def test_a_manifest_that_leaves_out_the_state_is_damaged(tmp_path):
    old, new, manifest = make_pair(tmp_path)
    entries = json.loads(manifest.read_text())
    del entries[checkpoint.TRAINER_STATE]
    manifest.write_text(json.dumps(entries))
    assert checkpoint.find_latest(tmp_path) == old


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["whole", "planner_data"])
def test_an_index_with_code_in_it_runs_nothing(tmp_path, place):
    model = torch.nn.Linear(3, 2)
    save(tmp_path / "actor", model)
    index = tmp_path / "actor" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    metadata.planner_data = Command(tmp_path / "ran")
    index.write_bytes(pickle.dumps(metadata if place == "planner_data" else Command(tmp_path / "ran")))
    with pytest.raises(ValueError, match="cannot be loaded.*is no part of an index"):
        checkpoint.load_shards(tmp_path / "actor", model, None)
    assert not (tmp_path / "ran").exists()


def test_a_setting_of_the_optimizer_with_code_in_it_runs_nothing(tmp_path):
    state = {"optimizer": {"param_groups": {"eps": Command(tmp_path / "ran")}}}
    torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path / "actor", no_dist=True)
    loaded = {"optimizer": {"param_groups": {"eps": 1.0}}}
    reader, planner = checkpoint.IndexReader(tmp_path / "actor"), checkpoint.PlainLoadPlanner()
    with pytest.raises(torch.distributed.checkpoint.api.CheckpointException):
        torch.distributed.checkpoint.load(loaded, storage_reader=reader, planner=planner, no_dist=True)
    assert not (tmp_path / "ran").exists()


def test_generators_with_code_in_them_run_nothing(tmp_path):
    for content in (Command(tmp_path / "ran"), {"torch": Command(tmp_path / "ran")}):
        torch.save(content, tmp_path / "rng_rank_0.pt")
        with pytest.raises(pickle.UnpicklingError):
            checkpoint.load_rng(tmp_path, 0)
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "rng_rank_0.pt")
    with pytest.raises(RuntimeError, match="TorchScript"):
        checkpoint.load_rng(tmp_path, 0)
    assert not (tmp_path / "ran").exists()


def test_a_write_that_fails_without_a_message_is_a_fault(tmp_path):
    writer = checkpoint.ShardWriter()
    writer.writing = writer.thread.submit(lambda: (_ for _ in ()).throw(MemoryError()))
    assert writer.fault(blocking=True) == "MemoryError: "
