"""Data of a step: each image once per prompt, however many responses it has."""

import pickle

import torch

from verl.bench.step_memory import make_prompts
from verl.data.dataset import collate_prompts
from verl.protocol import DataProto

IMAGE_BYTES = 50_000


def step_batch(num_prompts: int, samples: int) -> DataProto:
    prompts = collate_prompts(make_prompts(num_prompts, IMAGE_BYTES), 0)
    responses = torch.zeros(num_prompts, samples, 4, dtype=torch.long)
    return prompts.union(DataProto.from_dict(tensors={"responses": responses, "response_mask": responses.bool()}))


def bytes_beside_tokens(batch: DataProto) -> int:
    tensors = sum(tensor.numel() * tensor.element_size() for tensor in batch.batch.values())
    return len(pickle.dumps(batch)) - tensors


def test_a_batch_grows_with_prompts_and_not_with_samples():
    sizes = {(g, n): bytes_beside_tokens(step_batch(g, n)) for g in (4, 8) for n in (1, 4, 16)}
    for prompts in (4, 8):
        assert max(abs(sizes[prompts, n] - sizes[prompts, 1]) for n in (4, 16)) < 100
        assert 0 <= sizes[prompts, 16] - prompts * IMAGE_BYTES < prompts * 10_000


def test_reordering_and_splitting_groups_copies_no_image():
    batch = step_batch(4, 2)
    parts = batch[[2, 0, 3, 1]].chunk(2)
    held = {id(image) for part in [batch, *parts] for row in part.non_tensor_batch["images"] for image in row}
    assert len(held) == 4
