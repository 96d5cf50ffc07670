"""Benchmarks: one row each, how their items are read, and the prompt templates."""
