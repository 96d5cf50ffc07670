"""torch's memory: when segments grow, when they do not, and that a user's own settings stay."""

import pytest
import torch

from verl.distributed import allocator
from verl.distributed.allocator import FIXED, GROWING, VARIABLES, fixed_segments, grow_segments
from verl.workers.weight_sync import _copied_chunks


@pytest.fixture
def settings(monkeypatch):
    """What the allocator is told, with the packages that this is written for and nothing in the environment."""
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setattr(allocator, "is_usable", lambda _: True)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return told


def test_segments_grow_but_for_what_another_process_maps(settings):
    grow_segments()
    with fixed_segments():
        assert settings == [GROWING, FIXED]
    with pytest.raises(KeyError), fixed_segments():
        raise KeyError
    assert settings == [GROWING, *2 * [FIXED, GROWING]]


@pytest.mark.parametrize("name", VARIABLES)
def test_a_users_settings_stay(settings, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:256")
    grow_segments()
    with fixed_segments():
        pass
    assert settings == []
    monkeypatch.setenv(name, f"max_split_size_mb:256,{GROWING}")
    grow_segments()
    with fixed_segments():
        assert settings == [FIXED]  # CUDA IPC takes no others
    assert settings == [FIXED, GROWING]


def test_another_torch_keeps_its_own_segments(settings, monkeypatch):
    monkeypatch.setattr(allocator, "is_usable", lambda _: False)
    grow_segments()
    with fixed_segments():
        pass
    assert settings == []


def test_copies_that_engines_map_lie_in_fixed_segments(settings, monkeypatch):
    seen = []

    class Weight(torch.Tensor):
        def clone(self, *arguments, **options):
            seen.append(settings[-1])
            return super().clone(*arguments, **options)

    weights = [(f"w{index}", torch.ones(4).as_subclass(Weight)) for index in range(3)]
    assert [name for chunk in _copied_chunks(weights, 20) for name, _ in chunk] == ["w0", "w1", "w2"]
    assert seen == [FIXED] * 3 and settings == [FIXED, GROWING] * 3
