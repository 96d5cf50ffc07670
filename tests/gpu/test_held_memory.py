"""On a GPU: the part of its memory that a benchmark of TRL is held to."""

import pytest
import torch

from verl.bench.peers import hold_memory

pytestmark = pytest.mark.gpu


def test_another_process_holds_all_but_so_much():
    def free_gib() -> float:
        return torch.cuda.mem_get_info()[0] / 2**30

    before = free_gib()
    with hold_memory(8.0):
        assert free_gib() == pytest.approx(8.0, abs=0.1)
    assert free_gib() == pytest.approx(before, abs=0.1)
    with pytest.raises(SystemExit, match="GiB free; give at most these"), hold_memory(before + 4):
        pass
