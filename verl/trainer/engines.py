"""Rollout engines as the loop sees them: awake with synced weights to sample, asleep while the ranks train."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from verl.config.records import WorkerConfig
from verl.distributed.single_controller import WorkerGroup
from verl.protocol import DataProto, pad_dataproto_to_divisor, unpad_dataproto
from verl.trainer.metrics import PhaseTimer

INPUT_COLUMNS = ("raw_prompt_ids", "images", "videos", "max_tokens")
"""Columns of prompts that engines read."""
IMAGE_COLUMNS = ("images", "videos")
"""Those of them that ranks read, too."""


class Engines:
    """The group of engines.

    Args:
        settings: seed of the engines, and whether training reads their log-probs.
        group: the engines' actors.
        ranks: training ranks, which send the weights.
        timer: counts weight_sync and sleep.
    """

    def __init__(self, settings: WorkerConfig, group: WorkerGroup, ranks: WorkerGroup, timer: PhaseTimer):
        self.settings, self.group, self.ranks, self.timer = settings, group, ranks, timer
        self.finish_rendering: Callable[[], Any] = lambda: None

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Context with the engines awake and their weights synced; sleep mode discards weights, so each time."""
        self.finish_rendering()
        with self.timer("weight_sync"):
            self.group.wake_up(["weights"])
            self.ranks.send_weights(self.group.actors)
            self.group.wake_up(["kv_cache"])
        yield
        with self.timer("sleep"):
            self.group.sleep()

    def generate(
        self, prompts: DataProto, sampling: dict[str, Any], seed: int, for_training: bool = True
    ) -> DataProto:
        """Prompts with n responses each, of at most `max_tokens` if there is such a column; the engines are awake.

        Args:
            for_training: False leaves out what only training reads.
        """
        request, num_padded = self._request(prompts)
        request.meta_info = {
            "sampling": sampling,
            "seed": self.settings.rollout.seed * 1_000_003 + seed,
            "log_probs": for_training and self.settings.actor.tis_imp_ratio_cap is not None,
            "experts": for_training and self.settings.actor.routing_replay,
        }
        finish_images = self._prepare_images(prompts) if for_training and len(self.ranks) == 1 else lambda: None
        responses = unpad_dataproto(self.group.generate(request), num_padded)
        finish_images()
        return prompts.select().union(responses)

    def _prepare_images(self, prompts: DataProto) -> Callable[[], Any]:
        """Starts preprocessing of images by a single rank, which has nothing else to do while the engine samples.

        Several share the groups by the lengths of what is sampled, so none knows its own yet.
        """
        columns = [key for key in IMAGE_COLUMNS if key in prompts.non_tensor_batch]
        return self.ranks.start("prepare_images", prompts.select([], columns))

    def render_ahead(self, prompts: DataProto | None) -> None:
        """Starts preprocessing of the next step's prompts, if there are any, which goes on while the engines sleep."""
        if prompts is None:
            return
        self.finish_rendering = self.group.start("render_ahead", self._request(prompts)[0])

    def _request(self, prompts: DataProto) -> tuple[DataProto, int]:
        """Engine inputs, padded to a multiple of the number of engines, and the number of padding rows."""
        columns = [key for key in INPUT_COLUMNS if key in prompts.non_tensor_batch]
        return pad_dataproto_to_divisor(prompts.select([], columns), len(self.group))
