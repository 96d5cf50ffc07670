import os

import pytest

from evaluation.engines import local as backends


@pytest.mark.parametrize(("chosen", "expected"), [({}, "spawn"), ({"VLLM_WORKER_MULTIPROC_METHOD": "fork"}, "fork")])
def test_a_gpus_engine_is_spawned_unless_the_user_says_otherwise(monkeypatch, chosen, expected):
    monkeypatch.setattr(os, "environ", dict(chosen))
    backends._set_engine_environment(has_gpu=True)
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == expected
