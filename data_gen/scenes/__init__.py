"""Scenes: scene graphs of a source, named and bounded, or refused."""
