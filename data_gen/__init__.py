"""The data generation: scene graphs to checked questions, by rules or by models."""

from spatialthinker.versions import require

require("numpy", "pyarrow", "fire")
