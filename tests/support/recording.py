"""Parts of a recorded run for tests, without torch: what its background process calls, and a program that writes."""

import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl.trainer.recording.files import step_file
from verl.trainer.recording.pictures import store_picture
from verl.trainer.recording.table import Batch, write_step

FULL_AT_BYTES = 4096


def describe(items: Sequence[tuple[str, Any, str]]) -> list[dict[str, Any]]:
    """The last word of a response is its answer; `die` ends the process, `raise` raises, `sleep` takes long."""
    for text, _, _ in items:
        if "die" in text:
            os._exit(1)
        if "raise" in text:
            raise ValueError("cannot read it")
        if "sleep" in text:
            time.sleep(600)
    return [
        {"failure": None if "." in text else "no_stop", "answer": text.split()[-1], "boxes": "{}", "iou_mean": 0.25}
        | {"signs": {"same_box": "same" in text}}
        for text, _, _ in items
    ]


def fill_disk() -> None:
    """Lets this process write no file of more than FULL_AT_BYTES, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AT_BYTES, FULL_AT_BYTES))


def make_batch(step: int, num_groups: int = 8, num_samples: int = 2) -> Batch:
    """Groups whose every response states the step."""
    count = num_groups * num_samples
    uids = [str(number) for number in range(num_groups)]
    groups: dict[str, list[Any]] = {"uid": uids, "problem": ["?"] * num_groups, "kept": ["all"] * num_groups}
    return Batch(groups, num_samples, {"response": [f"step {step} " * 200] * count, "score": [step / 7] * count})


def write_for_ever(folder: Path) -> None:
    """Writes step after step from the first that is not there, each with a picture of its own."""
    step = len(list(folder.glob("*.parquet")))
    while True:
        step += 1
        batch = make_batch(step)
        name = store_picture(folder / "images", os.urandom(20_000))
        batch.groups["images"] = [[name]] * len(batch.groups["uid"])
        write_step(step_file(folder, "train", step), "train", step, [batch])


if __name__ == "__main__":
    write_for_ever(Path(sys.argv[1]))
