"""Inputs of a reward: the responses to one prompt, with the row they are scored against."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from spatialthinker.storage.images import load_image


class LazyImages(Sequence[Any]):
    """Pictures of encoded images, each decoded when it is first asked for; the responses of a group share them."""

    def __init__(self, encoded: Sequence[bytes]):
        self.encoded = encoded
        self.decoded: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.encoded)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        if index not in self.decoded:
            self.decoded[index] = load_image(self.encoded[index])
        return self.decoded[index]


@dataclass(frozen=True)
class ScoringGroup:
    """The responses to one prompt and what their reward may read; picklable.

    Attributes:
        responses: token ids of each, or texts.
        problem, uid: text of the prompt and name of the row.
        ground_truth: as the data set has it.
        columns: of the row, without its images.
        images: encoded, as the model sees them.
        step: of the training, 0 before it.
        max_length: R, the longest response in tokens; 0 where nothing is cut.
        reward: name of the reward that scores them.
    """

    responses: Sequence[list[int]] | Sequence[str]
    problem: str
    ground_truth: Any
    uid: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    images: Sequence[bytes] = ()
    step: int = 0
    max_length: int = 0
    reward: str = ""

    def make_items(self, texts: Sequence[str], end_ids: Collection[int]) -> list[dict[str, Any]]:
        """One dictionary for each response, given their texts: the row's columns, and the keys below, which win."""
        shared = {
            **self.columns,
            "row": self.columns,
            "problem": self.problem,
            "ground_truth": self.ground_truth,
            "images": LazyImages(self.images),
            "group": list(texts),
            "uid": self.uid,
            "step": self.step,
        }
        items = []
        for sample, (text, response) in enumerate(zip(texts, self.responses, strict=True)):
            ids = [] if isinstance(response, str) else response
            is_cut = 0 < self.max_length <= len(ids) and ids[-1] not in end_ids
            items.append(
                shared
                | {"response": text, "response_length": len(ids), "response_ids": ids, "sample": sample}
                | {"stop_reason": "length" if is_cut else "stop"}
            )
        return items
