"""Engines: local ones, replicas of them, and APIs."""
