"""The toy world: a tiny model, its training rows and its training, and what the quickstart shows of a run."""
