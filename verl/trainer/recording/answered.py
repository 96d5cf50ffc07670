"""Answered prompts of a step, and their numbers as the recording keeps them.

Letters: G groups, n samples, P padded prompt tokens, R padded response tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from verl.algos.divergences import compute_kl
from verl.model.videos import Video
from verl.protocol import DataProto
from verl.trainer.recording.table import MAX_CHARACTERS, PART, Batch


@dataclass
class Answered:
    """Groups with their responses, scores and, once these are read, descriptions.

    Attributes:
        groups: G prompts; tensors responses, response_mask [G, n, R], prompt_mask [G, P], and as far as a step has
            them advantages [G, n] or [G, n, R], old_log_probs, rollout_log_probs, ref_log_probs, kl [G, n, R],
            entropy_mean [G, n].
        texts: [G * n] decoded responses.
        scores: [G, n] by name of the reward's part.
        descriptions: [G * n] failure, answer, boxes, iou_mean and signs; empty when responses were not read.
    """

    groups: DataProto
    texts: Sequence[str]
    scores: Mapping[str, Tensor]
    descriptions: Sequence[Mapping[str, Any]] = ()

    @property
    def num_samples(self) -> int:
        return self.groups.batch["response_mask"].shape[1]

    def column(self, name: str) -> list[Any]:
        """A column of the rows of the data set, by group."""
        return list(self.groups.non_tensor_batch[name])

    def videos(self) -> list[list[Video]]:
        """Sampled videos, by group."""
        return list(self.groups.non_tensor_batch.get("videos", [[]] * len(self.groups)))

    def items(self) -> list[tuple[str, Any, str]]:
        """(response, ground truth, problem) of every response."""
        truths, problems, n = self.column("ground_truth"), self.column("problem"), self.num_samples
        return [(text, truths[i // n], str(problems[i // n])) for i, text in enumerate(self.texts)]

    def described(self, name: str) -> list[Any]:
        """An entry of the descriptions [G * n]; None where there is none."""
        return [each.get(name) for each in self.descriptions] if self.descriptions else [None] * len(self.texts)

    def advantages(self) -> Tensor | None:
        """Advantages [G, n], of tokens their mean over the response; None for a validation."""
        values = self.groups.batch.get("advantages")
        return values if values is None or values.dim() == 2 else self.means(values)

    def has_failed(self) -> Tensor:
        """True [G, n] for responses that fail the format, by the reward's part or their description."""
        failed = torch.tensor([reason is not None for reason in self.described("failure")], dtype=torch.bool)
        failed = failed.reshape(self.scores["overall"].shape)
        return failed | (self.scores["format"] <= 0) if "format" in self.scores else failed

    def is_truncated(self, max_response_length: int) -> Tensor:
        """True [G, n] for responses that end at the length limit."""
        return self.groups.batch["response_mask"].sum(-1) >= max_response_length

    def means(self, values: Tensor) -> Tensor:
        """Means [G, n] over a response's tokens of values [G, n, R]; NaN for a response without tokens."""
        mask = self.groups.batch["response_mask"].bool()
        return values.double().masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)

    def statistics(self) -> dict[str, Tensor]:
        """Statistics [G, n] of the log-probs, as far as the step has them; NaN where it has none of a response.

        log_prob_mean: of the policy that sampled, by the trainer, or else by the engine. ratio_mean: of the trainer's
        probability of a token to the engine's. kl_mean: from the reference, in full or by the estimator low_var_kl.
        entropy_mean: of the policy that sampled.
        """
        batch, known = self.groups.batch, self._log_probs()
        old, engine, reference = (batch.get(f"{name}_log_probs") for name in ("old", "rollout", "ref"))
        found = {}
        if known is not None:
            found["log_prob_mean"] = self.means(known)
        if old is not None and engine is not None:
            found["ratio_mean"] = self.means((old - engine).exp())
        if "kl" in batch.keys():
            found["kl_mean"] = self.means(batch["kl"])
        elif known is not None and reference is not None:
            found["kl_mean"] = self.means(compute_kl(known, reference, "low_var_kl"))
        if "entropy_mean" in batch.keys():
            found["entropy_mean"] = batch["entropy_mean"]
        return found

    def _log_probs(self) -> Tensor | None:
        """Log-probs [G, n, R] of the policy that sampled: the trainer's, where it has computed them."""
        old, engine = self.groups.batch.get("old_log_probs"), self.groups.batch.get("rollout_log_probs")
        return engine if old is None else old if engine is None else torch.where(old.isnan(), engine, old)

    def to_batch(self, max_response_length: int, with_tokens: bool) -> Batch:
        """The groups as plain values; whoever has them adds `kept`, `images`, `source` and `category`.

        Args:
            max_response_length: the length limit in tokens.
            with_tokens: adds ids, log-probs and ratios of all tokens.
        """
        tensors, advantages, accuracy = self.groups.batch, self.advantages(), self.scores.get("accuracy")
        is_cut = self.is_truncated(max_response_length).flatten().tolist()
        numbers = {PART + name: values for name, values in self.scores.items() if name != "overall"}
        numbers |= {"score": self.scores["overall"], **self.statistics()}
        numbers |= {} if advantages is None else {"advantage": advantages}
        responses = {name: values.flatten().tolist() for name, values in numbers.items()}
        responses |= {name: self.described(name) for name in ("failure", "boxes", "iou_mean")}
        responses["answer"] = [answer and answer[:MAX_CHARACTERS] for answer in self.described("answer")]
        responses["response"] = [text[:MAX_CHARACTERS] for text in self.texts]
        responses["response_cut"] = [len(text) > MAX_CHARACTERS for text in self.texts]
        responses["response_tokens"] = tensors["response_mask"].sum(-1).flatten().tolist()
        responses["stop_reason"] = ["length" if each else "stop" for each in is_cut]
        if accuracy is not None:
            responses["right"] = (accuracy > 0.5).flatten().tolist()
        responses |= self._token_columns() if with_tokens else {}
        groups = {name: self.column(name) for name in ("uid", "problem", "ground_truth")}
        groups["prompt_tokens"] = tensors["prompt_mask"].sum(-1).tolist()
        return Batch(groups, self.num_samples, responses)

    def _token_columns(self) -> dict[str, list[Any]]:
        """Ids, log-probs and ratios of all response tokens, as far as the step has them."""
        batch, known = self.groups.batch, self._log_probs()
        lengths = batch["response_mask"].sum(-1).flatten().tolist()
        old, engine = batch.get("old_log_probs"), batch.get("rollout_log_probs")
        tensors = {"token_ids": batch["responses"].int()}
        tensors |= {} if known is None else {"token_log_probs": known.float()}
        tensors |= {} if old is None or engine is None else {"token_ratios": (old - engine).exp().float()}
        return {
            name: [row[:length] for row, length in zip(values.flatten(0, 1).numpy(), lengths, strict=True)]
            for name, values in tensors.items()
        }
