"""Groups of responses to packed rows: which tokens share a forward pass, and where each one lies in it.

A group is one prompt with its n sampled responses. Letters: G groups, n samples, P prompt tokens, R response
tokens, T tokens of a packed row, S responses in it, N response tokens in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Some responses of one group, computed together over one copy of its prompt."""

    group: int
    samples: tuple[int, ...]

    def num_tokens(self, prompt_lengths: Sequence[int], response_lengths: Sequence[Sequence[int]]) -> int:
        """Tokens of the packed row that this piece takes: P + sum of its R."""
        return prompt_lengths[self.group] + sum(response_lengths[self.group][i] for i in self.samples)


@dataclass(frozen=True)
class GroupLayout:
    """Where the prompts and responses of a packed row lie, as padded index tables for the attention.

    Attributes:
        prompt_index: [G, P] packed index of each prompt token, right-padded with 0.
        prompt_mask: [G, P] True where prompt_index holds a token.
        response_index: [S, R] packed index of each response token, right-padded with 0.
        response_mask: [S, R] True where response_index holds a token.
        response_group: [S] the row of prompt_index that each response continues.
        attention_mask: [S, 1, R, P + R] True where a response token sees a key: all of its prompt, then its own past.
        unpack_index: [T] place of each packed token among the valid prompt tokens, then the valid response tokens.
    """

    prompt_index: Tensor
    prompt_mask: Tensor
    response_index: Tensor
    response_mask: Tensor
    response_group: Tensor
    attention_mask: Tensor
    unpack_index: Tensor


@dataclass(frozen=True)
class PackedBatch:
    """One forward pass: T tokens in a row, each prompt once, its responses behind it.

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
        layout = GroupLayout(**{k: v.to(device, non_blocking=True) for k, v in vars(self.layout).items()})
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return PackedBatch(**moved, layout=layout, image_ids=self.image_ids, pieces=self.pieces)


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
    response that exceeds the budget with its prompt makes a micro-batch alone: it cannot be cut.
    """
    pieces: list[Piece] = []
    for group in range(len(prompt_lengths)) if groups is None else groups:
        lengths = response_lengths[group]
        current: list[int] = []
        for sample in range(len(lengths)):
            full = prompt_lengths[group] + sum(lengths[i] for i in current) + lengths[sample] > max_tokens
            if current and (full or not shared_prompt):
                pieces.append(Piece(group, tuple(current)))
                current = []
            current.append(sample)
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


def _padded_index(starts: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Index table [rows, longest] of consecutive positions from each start, and its mask."""
    width = max(lengths, default=0)
    offset = torch.arange(width)
    mask = offset < torch.tensor(lengths).unsqueeze(1)
    index = torch.tensor(starts).unsqueeze(1) + offset
    return index.masked_fill(~mask, 0), mask


def build_layout(prompt_lengths: Sequence[int], response_lengths: Sequence[Sequence[int]]) -> GroupLayout:
    """The layout of a row that holds, group after group, the prompt and then each of its responses."""
    prompt_starts, response_starts, response_group = [], [], []
    cursor = 0
    for group, (prompt_length, lengths) in enumerate(zip(prompt_lengths, response_lengths, strict=True)):
        prompt_starts.append(cursor)
        cursor += prompt_length
        for length in lengths:
            response_starts.append(cursor)
            response_group.append(group)
            cursor += length
    flat_lengths = [length for lengths in response_lengths for length in lengths]
    prompt_index, prompt_mask = _padded_index(prompt_starts, list(prompt_lengths))
    response_index, response_mask = _padded_index(response_starts, flat_lengths)
    groups = torch.tensor(response_group)
    width = response_index.shape[1]
    sees_prompt = prompt_mask[groups].unsqueeze(1).expand(-1, width, -1)  # [S, R, P]
    sees_own = torch.ones(width, width, dtype=torch.bool).tril().expand(len(groups), -1, -1)  # [S, R, R]
    attention_mask = torch.cat([sees_prompt, sees_own], dim=2).unsqueeze(1)
    unpack_index = torch.argsort(torch.cat([prompt_index[prompt_mask], response_index[response_mask]]))
    return GroupLayout(prompt_index, prompt_mask, response_index, response_mask, groups, attention_mask, unpack_index)


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
    ids, position_ids, predict, targets, image_ids = [], [], [], [], []
    prompt_lengths, response_lengths = [], []
    cursor = 0
    for piece in pieces:
        prompt, position = prompts[piece.group], positions[piece.group]
        prompt_end = cursor + len(prompt)
        next_position = int(position.max()) + 1
        ids.append(prompt)
        position_ids.append(position)
        image_ids.extend(images[piece.group])
        cursor = prompt_end
        for sample in piece.samples:
            response = responses[piece.group][sample]
            length = len(response)
            ids.append(response)
            position_ids.append(torch.arange(next_position, next_position + length).expand(3, -1))
            predict.append(torch.tensor([prompt_end - 1]))
            predict.append(torch.arange(cursor, cursor + length - 1))
            targets.append(response)
            cursor += length
        prompt_lengths.append(len(prompt))
        response_lengths.append([len(responses[piece.group][i]) for i in piece.samples])
    return PackedBatch(
        input_ids=torch.cat(ids),
        position_ids=torch.cat(position_ids, dim=1),
        layout=build_layout(prompt_lengths, response_lengths),
        predict_index=torch.cat(predict),
        targets=torch.cat(targets),
        image_ids=image_ids,
        pieces=list(pieces),
    )
