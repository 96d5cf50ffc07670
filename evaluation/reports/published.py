"""Accuracies in % as the paper states them: https://arxiv.org/abs/2511.07403v2, tables 1, 2, 3 and 10.

They were graded by the released parser, which misreads many answers of models that were not trained on its form, and
3DSRBench by plain accuracy on the authors' own copy (see PROTOCOLS): a reference beside one's own figures, no ground
truth. Of the rows that have all columns only Claude-4-Sonnet's does not give the average that table 4 states
(67.1 against 68.7).
"""

from collections.abc import Mapping

DEFAULT_MODELS = ("SpatialThinker-3B", "SpatialThinker-7B")

_BENCHMARKS = (
    *("3dsrbench", "cv-bench-2D", "cv-bench-3D", "cv-bench", "blink-spatial", "blink-depth"),
    *("mmvp", "spatialreasoner", "spatialbench", "stvqa", "mindcube-tiny"),
    *("mmstar", "vstar", "realworld_qa", "mme-realworld-lite", "robospatial", "hallusionbench"),
    *("lego", "blink-multi-view"),
)
"""Columns of the table below, in the order of the paper's tables 1, 2, 3 and 10."""

_TABLE = """
GPT-5              68.2 81.4 90.3 85.8 90.9 81.4 61.7 90.5 62.6 89.7 42.5 58.9 73.3 78.7 57.0 71.5 73.8    -    -
GPT-4o             44.3 75.8 83.0 79.4 82.5 78.2 70.7 85.8 67.0 77.0 34.9 64.7 66.0 75.4 51.6 68.4 55.0    - 54.1
Claude-4-Sonnet    61.9 73.3 84.2 78.7 79.0 78.2 71.3 85.7 60.9 80.5 44.8 64.4 60.7 64.0 46.9 69.7 71.2    -    -
Claude-3.5-Sonnet  48.2 60.2 71.5 65.9 58.7 67.7 71.3 84.1 63.2    -    - 65.1 51.8 60.1 45.2 57.0 55.5    - 51.9
Qwen2.5-VL-3B      44.0 59.9 60.2 60.0 66.4 54.0 67.0 68.0 49.9 74.3 36.4 55.9 74.9 58.2 41.9 58.7 46.3    -    -
Qwen2.5-VL-7B      48.4 69.1 68.0 68.6 84.0 52.4 72.3 70.6 62.5 77.5 35.3 63.9 75.9 68.4 44.1 70.6 52.9    -    -
Qwen3-VL-30B-A3B   60.4 79.0 89.6 84.3 86.0 75.8 77.9 88.2 68.1 83.7 39.0 64.3 81.2 64.8 45.8 53.1 61.5    -    -
VLAA-Thinker-7B    52.2 60.8 60.3 60.6 81.2 71.0 75.3 61.2 66.2 76.2 36.7 63.8 58.1 66.4 44.6 68.9 68.9    -    -
LLaVA-NeXT-8B      48.4 62.2 65.3 63.8    -    -    -    -    -    -    -    -    -    -    -    -    -    -    -
Cambrian-1-8B      42.2 72.3 72.0 72.2 69.9 73.4    -    -    -    -    -    -    -    -    -    -    -    -    -
RoboPoint-13B         -    - 61.2    - 60.8 61.3    -    -    -    -    -    -    -    -    -    -    -    -    -
SpatialBot-3B      41.1    - 69.1    - 67.8 67.7    -    -    -    -    -    -    -    -    -    -    -    -    -
SpaceLLaVA-13B     42.0    - 68.5    - 72.7 62.9    -    -    -    -    -    -    -    -    -    -    -    -    -
SATORI-R1          48.0 54.6 69.4 62.0 77.0 58.9 67.7 70.5 60.3 51.2 36.0    -    -    -    -    -    -    -    -
SpatialRGPT-7B     48.4    - 60.7    - 65.7 72.3    -    -    -    -    -    -    -    -    -    -    -    -    -
SpaceThinker       51.1 65.1 65.9 65.5 73.4 59.9 63.0 69.6 57.9 75.4 36.0 54.5 56.5 61.6    - 52.6 65.4    -    -
SpaceOm            52.2 72.1 69.3 70.7 81.1 65.3 66.3 68.9 58.6 66.0 33.5 57.7 56.5 53.3    - 68.9 62.9    -    -
SFT-3B             50.8 53.9 68.4 61.1 65.0 66.9 62.7 67.5 56.3 85.6 35.9 53.9 73.3 64.8 43.0 69.8 58.9    -    -
Vanilla-GRPO-3B    50.1 70.6 66.6 68.6 73.4 55.6 68.3 69.3 56.9 86.7 38.8 56.7 74.3 64.4 46.7 64.0 59.0    -    -
SpatialThinker-3B  52.9 71.0 76.3 73.6 81.8 66.9 69.0 76.5 61.5 92.5 40.5 57.6 78.0 66.3 46.5 70.6 62.5    -    -
SFT-7B             53.6 56.1 71.3 63.7 75.5 64.5 68.3 70.8 63.5 84.5 42.2 63.2 78.0 65.4 47.4 72.4 66.2    -    -
Vanilla-GRPO-7B    54.7 68.9 76.5 72.7 80.4 75.0 74.3 79.6 64.2 87.1 44.0 63.4 73.9 66.6 46.3 76.2 60.7    -    -
SpatialThinker-7B  56.4 77.7 78.7 78.2 86.0 72.6 78.0 82.7 66.4 92.8 45.1 65.9 81.7 69.2 48.3 76.3 66.4 37.7 52.6
SpatialThinker-30B 62.1 80.3 93.6 87.0 88.1 79.8 79.7 92.6 69.5 93.0 45.4 66.9 85.9 74.9 49.2 78.1 75.2    -    -
SpatialReasoner       -    -    -    -    -    - 64.0 76.4 59.2 74.0 34.6    -    -    -    -    -    -    -    -
Visionary-R1          -    -    -    -    -    - 70.3 72.9 59.8 74.4 36.0    -    -    -    -    -    -    -    -
"""


def _by_benchmark() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {name: {} for name in _BENCHMARKS}
    for model, *values in map(str.split, _TABLE.strip().splitlines()):
        for benchmark, value in zip(_BENCHMARKS, values, strict=True):
            if value != "-":
                found[benchmark][model] = float(value)
    return found | {"robospatial_rgb": found["robospatial"]}


PUBLISHED: Mapping[str, Mapping[str, float]] = _by_benchmark()
"""Benchmark -> model -> accuracy in %. `cv-bench` is the mean of its 2D and 3D halves."""

_PROTOCOL = "accuracy over single items, released prompt and parser"
PROTOCOLS: Mapping[str, str] = dict.fromkeys(PUBLISHED, _PROTOCOL) | {
    "3dsrbench": f"{_PROTOCOL}, as the paper says; EASI's verification calls its base rows circular evaluation",
    "cv-bench": "mean of the 2D and 3D halves' accuracy, released prompt and parser; the card weighs by source",
    "mmvp": f"{_PROTOCOL}; the benchmark's own figure is over pairs",
    "spatialbench": f"{_PROTOCOL}; the benchmark's own figure is over pairs",
}
"""The protocol of each published figure; sources that disagree are named."""

MODELS = tuple(dict.fromkeys(model for rows in PUBLISHED.values() for model in rows))


def match_model(model_path: str) -> str | None:
    """Return the published model whose name a model path holds: Qwen/Qwen2.5-VL-3B-Instruct is Qwen2.5-VL-3B."""
    wanted = _plain(model_path)
    return next((model for model in sorted(MODELS, key=len, reverse=True) if _plain(model) in wanted), None)


def _plain(name: str) -> str:
    return name.lower().replace(".", "-").replace("_", "-")
