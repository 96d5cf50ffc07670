"""Two engines side by side give the answers of one."""

import pytest
import ray

from evaluation.benchmarks.rows import BENCHMARKS
from evaluation.benchmarks.samples import load_samples
from evaluation.engines.local import HuggingFaceBackend, ModelOptions
from evaluation.engines.replicas import DataParallelBackend
from spatialthinker.schema import parquet_path, write_parquet
from spatialthinker.synthetic import generate
from tests.support.tiny_model_folder import save_tiny_model


@pytest.fixture
def own_ray():
    """Ends the cluster that replicas start, which is not for the tests behind these."""
    yield
    ray.shutdown()


@pytest.mark.e2e
def test_replicas_share_the_items(tmp_path, own_ray):
    write_parquet([row for _, row in generate(7, seed=3, split="val")], parquet_path(tmp_path / "data", "val"))
    samples = load_samples("stvqa", BENCHMARKS["stvqa"], str(tmp_path / "data"))
    model = str(save_tiny_model(tmp_path / "model"))
    options = ModelOptions(model, "reasoning", batch_size=4, max_tokens=4)
    answers = []
    for backend in (HuggingFaceBackend(options), DataParallelBackend(HuggingFaceBackend, options, 2, 0)):
        answers.append({sample.id: answer.text for sample, answer in backend.answer(samples)})
    assert answers[0] == answers[1] and len(answers[0]) == len(samples)
