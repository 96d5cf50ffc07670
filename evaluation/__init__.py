"""The evaluation: benchmarks as rows, engines that answer them, scoring and comparison."""

from spatialthinker.versions import require

require("numpy", "datasets")
