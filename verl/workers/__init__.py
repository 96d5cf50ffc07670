"""Workers: training ranks and rollout engines."""
