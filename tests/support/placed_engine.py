"""An engine that answers with where it runs and what it was given, for tests of placement."""

import os
from collections.abc import Iterable, Iterator

from evaluation.benchmarks.samples import Sample
from evaluation.engines.local import Answer, ModelOptions


class PlacedBackend:
    """Answers every sample with node, folder, threads and model path, separated by spaces."""

    def __init__(self, options: ModelOptions) -> None:
        import ray

        node = ray.get_runtime_context().get_node_id()
        self.text = f"{node} {os.environ.get('OMP_NUM_THREADS')} {options.model_path}"

    def answer(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, Answer]]:
        for sample in samples:
            yield sample, Answer(text=self.text)
