"""Algorithms: advantages, divergences, policy losses; tensors and floats alone."""
