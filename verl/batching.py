"""Groups of responses to packed rows: which tokens share a forward pass, and where each one lies in it.

A group is one prompt with its n sampled responses. Letters: G groups, n samples, P prompt tokens, R response
tokens, T tokens of a packed row, S responses in it, N response tokens in it.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, without a wait: copies out of memory that is not pinned wait for all of a GPU's work."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Piece:
    """Some responses of one group, computed together over one copy of its prompt."""

    group: int
    samples: tuple[int, ...]

    def num_tokens(self, prompt_lengths: Sequence[int], response_lengths: Sequence[Sequence[int]]) -> int:
        """Tokens of the packed row that this piece takes: P + sum of its R."""
        return prompt_lengths[self.group] + sum(response_lengths[self.group][i] for i in self.samples)


@dataclass(frozen=True)
class PaddedTables:
    """A layout's prompts and responses as right-padded tables, for attention kernels that know no lengths.

    Attributes:
        prompt_index, prompt_mask: [G, P] packed index of each prompt token, padded with 0, and where it is one.
        response_index, response_mask: [S, R] the same for responses.
        attention_mask: [S, 1, R, P + R] True where a response token sees a key: all of its prompt, then its own past.
    """

    prompt_index: Tensor
    prompt_mask: Tensor
    response_index: Tensor
    response_mask: Tensor
    attention_mask: Tensor


@dataclass(frozen=True)
class GroupLayout:
    """Where the prompts and responses of a packed row lie: all prompts first, then all responses.

    Attributes:
        num_prompt_tokens: prompt tokens of the row; responses begin behind them.
        prompt_ends: [G + 1] int32 first token of each prompt, and the end of the last.
        response_ends: [S + 1] int32 the same of responses, counted from the first response token.
        group_ends: [G + 1] int32 the same of the responses of a prompt together.
        response_group: [S] the prompt that each response continues.
        longest_prompt, longest_response, longest_group: in tokens.
    """

    num_prompt_tokens: int
    prompt_ends: Tensor
    response_ends: Tensor
    group_ends: Tensor
    response_group: Tensor
    longest_prompt: int
    longest_response: int
    longest_group: int

    def to(self, device: torch.device) -> "GroupLayout":
        """This layout with every tensor on `device`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved = {k: send(v, device) for k, v in values.items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **moved)

    @cached_property
    def padded(self) -> PaddedTables:
        """The same as padded tables, made when first asked for."""
        prompt_index, prompt_mask = _padded_index(self.prompt_ends, self.longest_prompt)
        response_index, response_mask = _padded_index(self.response_ends, self.longest_response)
        response_index = (response_index + self.num_prompt_tokens).masked_fill(~response_mask, 0)
        width = self.longest_response
        sees_prompt = prompt_mask[self.response_group].unsqueeze(1).expand(-1, width, -1)  # [S, R, P]
        own_past = torch.ones(width, width, dtype=torch.bool, device=prompt_mask.device).tril()
        sees_own = own_past.expand(len(self.response_group), -1, -1)  # [S, R, R]
        attention_mask = torch.cat([sees_prompt, sees_own], dim=2).unsqueeze(1)
        return PaddedTables(prompt_index, prompt_mask, response_index, response_mask, attention_mask)


@dataclass(frozen=True)
class PackedBatch:
    """One forward pass: T tokens in a row, each prompt once, all responses behind the prompts.

    Attributes:
        input_ids: [T] token ids, image tokens expanded.
        position_ids: [3, T] rotary positions (time, height, width); every response starts at its prompt's end.
        layout: the attention's view of the row.
        predict_index: [N] packed index of the token whose hidden state predicts each response token.
        targets: [N] the response tokens, piece by piece, sample by sample.
        image_ids: for each image block of the row, in order, its number in the worker's image store.
        pieces: what was packed, in order.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: GroupLayout
    predict_index: Tensor
    targets: Tensor
    image_ids: list[int]
    pieces: list[Piece]

    def to(self, device: torch.device) -> "PackedBatch":
        """This batch with every tensor on `device`."""
        moved = {k: send(v, device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return PackedBatch(**moved, layout=self.layout.to(device), image_ids=self.image_ids, pieces=self.pieces)


def plan_micro_batches(
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[Sequence[int]],
    max_tokens: int,
    shared_prompt: bool = True,
    groups: Sequence[int] | None = None,
) -> list[list[Piece]]:
    """Pieces of groups filled in order into micro-batches of at most `max_tokens` packed tokens.

    A group larger than the budget is cut over its responses and still shares its prompt inside each piece. Without
    `shared_prompt` every response is a piece of its own, so its prompt is computed again for each. A single
    response that exceeds the budget with its prompt makes a micro-batch alone: it cannot be cut. One without tokens is
    in no micro-batch: there is nothing to score or to learn from.
    """
    pieces: list[Piece] = []
    for group in range(len(prompt_lengths)) if groups is None else groups:
        lengths = response_lengths[group]
        current: list[int] = []
        for sample in (i for i, length in enumerate(lengths) if length):
            full = prompt_lengths[group] + sum(lengths[i] for i in current) + lengths[sample] > max_tokens
            if current and (full or not shared_prompt):
                pieces.append(Piece(group, tuple(current)))
                current = []
            current.append(sample)
        if current:
            pieces.append(Piece(group, tuple(current)))
    batches: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        size = piece.num_tokens(prompt_lengths, response_lengths)
        if not batches or size > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(piece)
        room -= size
    return batches


def split_to_count(batches: list[list[Piece]], count: int) -> list[list[Piece]]:
    """The same pieces in exactly `count` micro-batches; extra ones stay empty when there are too few responses.

    Ranks must run the same number of passes, since every pass gathers parameters together.
    """
    batches = [list(batch) for batch in batches]
    while len(batches) < count:
        widest = max(range(len(batches)), key=lambda i: sum(len(piece.samples) for piece in batches[i]), default=-1)
        if widest < 0 or sum(len(piece.samples) for piece in batches[widest]) < 2:
            batches.append([])
            continue
        batch = batches[widest]
        if len(batch) > 1:
            halves = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        else:
            (piece,) = batch
            middle = len(piece.samples) // 2
            halves = [[Piece(piece.group, piece.samples[:middle])], [Piece(piece.group, piece.samples[middle:])]]
        batches[widest : widest + 1] = halves
    return batches


def balanced_order(lengths: Sequence[int], mini_batch_size: int, num_ranks: int) -> list[int]:
    """Order of groups such that contiguous rank shares hold equal parts of every mini-batch, balanced in tokens.

    Mini-batch k is groups [k * size, (k + 1) * size) whatever the number of ranks, so the gradient of a step does
    not depend on it. Inside a mini-batch the longest group goes to the rank with the fewest tokens that has room.

    Args:
        lengths: tokens of each group.
        mini_batch_size: groups per optimizer step; a multiple of num_ranks that divides len(lengths).
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for start in range(0, len(lengths), mini_batch_size):
        loads = [0] * num_ranks
        parts: list[list[int]] = [[] for _ in range(num_ranks)]
        for group in sorted(range(start, start + mini_batch_size), key=lambda g: (-lengths[g], g)):
            open_ranks = [r for r in range(num_ranks) if len(parts[r]) < mini_batch_size // num_ranks]
            rank = min(open_ranks, key=lambda r: (loads[r], r))
            parts[rank].append(group)
            loads[rank] += lengths[group]
        for share, part in zip(shares, parts, strict=True):
            share.extend(sorted(part))
    return [group for share in shares for group in share]


def _padded_index(ends: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Index table [rows, width] of the tokens between consecutive ends, padded with 0, and its mask."""
    offset = torch.arange(width, device=ends.device)
    mask = offset < ends.diff().unsqueeze(1)
    return (ends[:-1].unsqueeze(1) + offset).masked_fill(~mask, 0), mask


def _ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def build_layout(prompt_lengths: Sequence[int], response_lengths: Sequence[Sequence[int]]) -> GroupLayout:
    """The layout of a row that holds the prompts and then, group after group, their responses."""
    response_group = [group for group, lengths in enumerate(response_lengths) for _ in lengths]
    flat_lengths = [length for lengths in response_lengths for length in lengths]
    group_lengths = [sum(lengths) for lengths in response_lengths]
    return GroupLayout(
        sum(prompt_lengths),
        _ends(prompt_lengths),
        _ends(flat_lengths),
        _ends(group_lengths),
        torch.tensor(response_group),
        max(prompt_lengths),
        max(flat_lengths),
        max(group_lengths),
    )


def pack(
    pieces: Sequence[Piece],
    prompts: Sequence[Tensor],
    positions: Sequence[Tensor],
    responses: Sequence[Sequence[Tensor]],
    images: Sequence[Sequence[int]],
) -> PackedBatch:
    """The packed row of some pieces.

    Args:
        pieces: non-empty.
        prompts: per group [P], unpadded.
        positions: per group [3, P].
        responses: per group and sample [R], unpadded, at least one token each.
        images: per group the store numbers of its images.
    """
    prompt_lengths = [len(prompts[piece.group]) for piece in pieces]
    own = [(piece.group, sample) for piece in pieces for sample in piece.samples]
    targets = torch.cat([responses[group][sample] for group, sample in own])
    response_positions, predict = [], []
    prompt_end, cursor = 0, sum(prompt_lengths)
    for piece, prompt_length in zip(pieces, prompt_lengths, strict=True):
        prompt_end += prompt_length
        next_position = int(positions[piece.group].max()) + 1
        for sample in piece.samples:
            length = len(responses[piece.group][sample])
            response_positions.append(torch.arange(next_position, next_position + length).expand(3, -1))
            predict.append(torch.tensor([prompt_end - 1]))
            predict.append(torch.arange(cursor, cursor + length - 1))
            cursor += length
    return PackedBatch(
        input_ids=torch.cat([*(prompts[piece.group] for piece in pieces), targets]),
        position_ids=torch.cat([*(positions[piece.group] for piece in pieces), *response_positions], dim=1),
        layout=build_layout(
            prompt_lengths, [[len(responses[piece.group][i]) for i in piece.samples] for piece in pieces]
        ),
        predict_index=torch.cat(predict),
        targets=targets,
        image_ids=[image for piece in pieces for image in images[piece.group]],
        pieces=list(pieces),
    )
