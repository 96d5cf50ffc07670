"""Recording: every rollout of a run in files beside it, written in the background.

rollouts/about.json                    version, reward and rule
rollouts/train_step_000012.parquet     one row per response, by group and sample; val_step_ for a validation
rollouts/images/ab/abcd...             each picture once for the whole run, named by the SHA-256 of its bytes
"""
