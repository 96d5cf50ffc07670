"""The viewer of runs: every recorded rollout with its picture, boxes, reward and advantage, while the run trains.

    python -m verl.viewer RUN [RUN ...]

It reads the files of a run and needs nothing of the trainer.
"""
