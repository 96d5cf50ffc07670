"""Expandable segments: when memory lies in them, when not, and that a user's own settings stay."""

import pytest
import torch

from verl.distributed import allocator
from verl.distributed.allocator import EXPANDABLE, FIXED, VARIABLES, expand_segments, fixed_segments
from verl.workers.weight_sync import _copied_chunks


@pytest.fixture
def settings(monkeypatch):
    """Settings that the allocator is told, with the torch that this is written for and nothing in the environment."""
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setattr(allocator, "is_usable", lambda _: True)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return told


def test_segments_are_expandable_but_for_what_another_process_maps(settings):
    expand_segments()
    with fixed_segments():
        assert settings == [EXPANDABLE, FIXED]
    with pytest.raises(KeyError), fixed_segments():
        raise KeyError
    assert settings == [EXPANDABLE, *2 * [FIXED, EXPANDABLE]]


@pytest.mark.parametrize("name", VARIABLES)
def test_a_users_settings_stay(settings, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:256")
    expand_segments()
    with fixed_segments():
        pass
    assert settings == []
    monkeypatch.setenv(name, "max_split_size_mb:256, expandable_segments: True")
    expand_segments()
    with fixed_segments():
        assert settings == [FIXED]  # CUDA IPC takes no others
    assert settings == [FIXED, EXPANDABLE]


@pytest.mark.parametrize("own", ["", EXPANDABLE])
def test_another_torch_is_told_nothing(settings, monkeypatch, own):
    """It may not have the function."""
    monkeypatch.setattr(allocator, "is_usable", lambda _: False)
    monkeypatch.setenv(VARIABLES[0], own)
    expand_segments()
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
    assert seen == [FIXED] * 3 and settings == [FIXED, EXPANDABLE] * 3
