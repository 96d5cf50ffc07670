"""Padding-free packing of groups into micro-batches, with shared prompts, and balance over ranks.

A packed row holds sequences without padding; their boundaries are cumulative lengths (cu_seqlens). A group is one
prompt with its n sampled responses. Letters: G groups, n samples, P prompt tokens, R response tokens, T tokens of a
packed row, S responses in it, N response tokens in it.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, copied asynchronously through pinned memory; pageable memory would sync with the GPU."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Piece:
    """Some responses of one group that share one copy of its prompt in a packed row."""

    group: int
    samples: tuple[int, ...]

    def num_tokens(self, prompt_lengths: Sequence[int], response_lengths: Sequence[Sequence[int]]) -> int:
        """Packed tokens of this piece: P + sum of its R."""
        return prompt_lengths[self.group] + sum(response_lengths[self.group][i] for i in self.samples)


@dataclass(frozen=True)
class PaddedTables:
    """Right-padded index tables of a layout, for attention kernels without variable-length support.

    Attributes:
        prompt_index, prompt_mask: [G, P] packed index of each prompt token, padded with 0; False where padded.
        response_index, response_mask: [S, R] of responses.
        attention_mask: [S, 1, R, P + R] True where a response token attends: to its whole prompt, then causally.
    """

    prompt_index: Tensor
    prompt_mask: Tensor
    response_index: Tensor
    response_mask: Tensor
    attention_mask: Tensor


@dataclass(frozen=True)
class GroupLayout:
    """Sequence boundaries of a packed row: all prompts first, then all responses.

    Attributes:
        num_prompt_tokens: of the row; responses start at this index.
        prompt_ends: [G + 1] int32 cumulative prompt lengths (cu_seqlens), from 0.
        response_ends: [S + 1] int32 cumulative response lengths.
        group_ends: [G + 1] int32 cumulative lengths of all responses of a prompt together.
        response_group: [S] index of each response's prompt.
        longest_prompt, longest_response, longest_group: maximum lengths (max_seqlen), in tokens.
        experts: [T, layers, K] experts to replay in a mixture of experts; None: the model's own choice.
    """

    num_prompt_tokens: int
    prompt_ends: Tensor
    response_ends: Tensor
    group_ends: Tensor
    response_group: Tensor
    longest_prompt: int
    longest_response: int
    longest_group: int
    experts: Tensor | None = None

    def to(self, device: torch.device) -> "GroupLayout":
        """Copy of the layout on `device`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved = {k: to_device(v, device) for k, v in values.items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **moved)

    @cached_property
    def padded(self) -> PaddedTables:
        """The padded tables, built at first use."""
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
    """Inputs of one forward pass: a packed row of T tokens, prompts first, each once, then all responses.

    Attributes:
        input_ids: [T] token ids, image tokens expanded.
        position_ids: [3, T] rotary positions (time, height, width); every response continues its prompt.
        layout: sequence boundaries for attention.
        predict_index: [N] packed index of the token whose hidden state predicts each response token.
        targets: [N] the response tokens, piece by piece, sample by sample.
        image_ids: per image block of the row, in order, the index of its image in the batch.
        pieces: in packed order.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: GroupLayout
    predict_index: Tensor
    targets: Tensor
    image_ids: list[int]
    pieces: list[Piece]

    def to(self, device: torch.device) -> "PackedBatch":
        """Copy of the batch on `device`."""
        moved = {k: to_device(v, device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return PackedBatch(**moved, layout=self.layout.to(device), image_ids=self.image_ids, pieces=self.pieces)


def plan_micro_batches(
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[Sequence[int]],
    max_tokens: int,
    shared_prompt: bool = True,
    groups: Sequence[int] | None = None,
) -> list[list[Piece]]:
    """Micro-batches of at most `max_tokens` packed tokens, filled with pieces of groups in order.

    A group over the budget is split by responses; each piece still shares its prompt. Without `shared_prompt` every
    response is its own piece, so the prompt is recomputed for each. A response that exceeds the budget together with
    its prompt is a micro-batch of its own. Empty responses are left out.
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
    tokens_left = 0
    for piece in pieces:
        size = piece.num_tokens(prompt_lengths, response_lengths)
        if not batches or size > tokens_left:
            batches.append([])
            tokens_left = max_tokens
        batches[-1].append(piece)
        tokens_left -= size
    return batches


def split_to_count(batches: list[list[Piece]], count: int) -> list[list[Piece]]:
    """The same pieces in exactly `count` micro-batches; some stay empty when there are too few responses.

    All ranks must run the same number of passes, since FSDP gathers parameters collectively in each.
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
    """Order of groups so that contiguous shares of ranks hold equal, token-balanced parts of every mini-batch.

    Mini-batch k is groups [k * size, (k + 1) * size) for any number of ranks, so the gradient does not depend on it.
    Inside a mini-batch groups go, longest first, to the non-full rank with the fewest tokens.

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
    """Indices [rows, width] of the tokens between consecutive ends, padded with 0, and their mask."""
    offset = torch.arange(width, device=ends.device)
    mask = offset < ends.diff().unsqueeze(1)
    return (ends[:-1].unsqueeze(1) + offset).masked_fill(~mask, 0), mask


def _ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def build_layout(prompt_lengths: Sequence[int], response_lengths: Sequence[Sequence[int]]) -> GroupLayout:
    """The layout of a row of all prompts followed by all responses, group after group."""
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
    experts: Sequence[Tensor] | None = None,
) -> PackedBatch:
    """Packs pieces into one row.

    Args:
        pieces: non-empty.
        prompts: per group [P], unpadded.
        positions: per group [3, P].
        responses: per group and sample [R], unpadded, at least one token each.
        images: per group the indices of its images in the batch.
        experts: per group the chosen experts [P + sum of R, layers, K] of its prompt, then of its responses.
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
    layout = build_layout(
        prompt_lengths, [[len(responses[piece.group][i]) for i in piece.samples] for piece in pieces]
    )
    if experts is not None:
        layout = dataclasses.replace(layout, experts=_pack_experts(pieces, prompts, responses, experts))
    return PackedBatch(
        input_ids=torch.cat([*(prompts[piece.group] for piece in pieces), targets]),
        position_ids=torch.cat([*(positions[piece.group] for piece in pieces), *response_positions], dim=1),
        layout=layout,
        predict_index=torch.cat(predict),
        targets=targets,
        image_ids=[image for piece in pieces for image in images[piece.group]],
        pieces=list(pieces),
    )


def _pack_experts(
    pieces: Sequence[Piece],
    prompts: Sequence[Tensor],
    responses: Sequence[Sequence[Tensor]],
    experts: Sequence[Tensor],
) -> Tensor:
    """The experts [T, layers, K] of a packed row; arguments as of pack."""
    of_prompts, of_responses = [], []
    for piece in pieces:
        lengths = [len(response) for response in responses[piece.group]]
        prompt, *parts = experts[piece.group].split([len(prompts[piece.group]), *lengths])
        of_prompts.append(prompt)
        of_responses += [parts[sample] for sample in piece.samples]
    return torch.cat([*of_prompts, *of_responses])
