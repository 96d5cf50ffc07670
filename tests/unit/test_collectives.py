"""Gathers over two real ranks on gloo, and what a group of one does."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.ranks import leave
from verl.collectives import all_gather_data_proto, allgather_dict_tensors
from verl.protocol import DataProto


def _gather_on(rank: int, store: str, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    # Ranks name their keys in different orders; strided and bf16 tensors travel too.
    tensors = {"a": torch.full((1, 2), rank), "b": torch.tensor([[rank + 0.5]], dtype=torch.bfloat16)}
    tensors = dict(reversed(tensors.items())) if rank else tensors
    data = DataProto.from_dict(tensors, {"text": [f"row {rank}"]}, {"rank": rank})
    all_gather_data_proto(data, 2, dist.group.WORLD)
    wide = allgather_dict_tensors({"x": torch.tensor([[rank], [rank + 2]]).T}, 2, dist.group.WORLD, dim=1)
    data.meta_info["wide"] = wide["x"]
    data.save_to_disk(f"{results}/{rank}.pt")
    leave()


def test_every_rank_gets_the_rows_of_all_ranks_in_order(tmp_path):
    # Forked, since importing torch twice more takes longer than everything else here.
    arguments = (str(tmp_path / "store"), str(tmp_path))
    mp.start_processes(_gather_on, arguments, nprocs=2, start_method="fork")  # type: ignore[attr-defined]
    for rank in range(2):
        data = DataProto.load_from_disk(str(tmp_path / f"{rank}.pt"))
        assert data.batch["a"].tolist() == [[0, 0], [1, 1]] and data.batch["b"].tolist() == [[0.5], [1.5]]
        assert data.batch["b"].dtype == torch.bfloat16
        assert data.non_tensor_batch["text"].tolist() == ["row 0", "row 1"]
        assert data.meta_info["rank"] == rank and data.meta_info["wide"].tolist() == [[0, 2, 1, 3]]


def test_one_rank_alone_moves_nothing():
    data = DataProto.from_dict({"a": torch.zeros(2)})
    batch = data.batch
    all_gather_data_proto(data, 1, None)
    assert data.batch is batch
