"""Random models of benchmarks."""

from verl.bench import random_models
from verl.bench.random_models import describe_random_model


def test_drawing_leaves_the_configuration_that_the_next_run_writes(tmp_path, monkeypatch):
    """An engine's compile cache is of one configuration: a second run must find it."""
    folder = tmp_path / "random_tiny"
    monkeypatch.setitem(random_models.RANDOM_MODELS, folder.name, {"text_config": {}, "vision_config": {}})
    describe_random_model(folder)
    random_models._draw(folder)
    drawn = {file.name: file.read_bytes() for file in folder.iterdir()}
    describe_random_model(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == drawn
    assert "model.safetensors" in drawn
