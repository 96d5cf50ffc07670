"""Training loop, and what it is wired from."""
