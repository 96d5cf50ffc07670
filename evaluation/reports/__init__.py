"""Reports: summaries, comparisons of models, published figures."""
